"""What an answer says, however it is dressed: the one normaliser before every comparison.

:func:`plain` removes the markup of Markdown, LaTeX and HTML and writes the digits of every script
as ASCII; :func:`unlabelled` removes what announces an answer ("The answer is", "Option", "x =");
:func:`items` makes one line of a list. The words are in ``data/phrases.yaml``. None of them changes
what is said, so none may turn a wrong answer into a right one; what they leave is never empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files

from omni_grpo_core.rewards.words import fold, parse_lists, tidy

_LATEX: Mapping[str, str] = {
    r"\%": "%", r"\$": "$", r"\#": "#", r"\&": "&", r"\_": "_",
    r"\,": " ", r"\;": " ", r"\:": " ", r"\ ": " ", r"\!": "", "{,}": ",",
    r"\(": "", r"\)": "", r"\[": "", r"\]": "",
    r"^\circ": "°", r"^{\circ}": "°", r"\degree": "°", r"\mu": "µ", r"\pi": "π", r"\Omega": "Ω",
    r"\times": "×", r"\cdot": "·", r"\div": "/", r"\approx": "≈", r"\sim": "~", r"\pm": "±",
    r"\left": "", r"\right": "", r"\displaystyle": "", r"\quad": " ", r"\euro": "€",
    r"\pounds": "£", r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\lbrack": "[", r"\rbrack": "]",
}  # fmt: skip
_WRAPPERS = ("boxed", "fbox", "text", "textbf", "textit", "textrm", "mathrm", "mathbf", "mathit",
             "mathsf", "operatorname", "mbox", "emph", "underline", "bm", "ce", "si")  # fmt: skip
_COMMAND = re.compile(
    "|".join(
        re.escape(written) + ("(?![A-Za-z])" if written[-1].isalpha() else "")
        for written in sorted(_LATEX, key=len, reverse=True)
    )
)
_BRACE = re.compile(rf"\\(?:{'|'.join(_WRAPPERS)})\s*\{{|(?<!\\)[{{}}]")
# pandoc's rule: no space inside the dollars, no digit after them, so "$5 to $6" are two prices
_MATH = re.compile(r"(?<![\\$])(\${1,2})(?=[^\s$])([^$]*[^\s$\\])\1(?![\d$])")
_STRONG = re.compile(r"\*\*(?=\S)([^*]+)\*\*|`([^`]+)`")
_TAG = re.compile(r"</?(?:b|i|em|strong|u|mark|code|span|p|div|br)\s*/?>", re.IGNORECASE)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_RAISED = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+|<sup>\s*([+-]?\d{1,3})\s*</sup>")
_FOREIGN_DIGIT = re.compile(r"[^\D0-9]")
# folded, "1½" would be eleven halves and the ordinal sign, used for a degree, an o
_BEFORE_FOLDING = ((re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])"), " "), (re.compile(r"(?<=\d)\s?º"), "°"))
_QUOTES = {'"': '"', "'": "'", "«": "»", "「": "」", "『": "』", "*": "*", "_": "_", "`": "`"}
_BULLET = re.compile(r"\s*(?:[-*•·–]|\(?\d{1,2}[.)、])\s+(?=\S)|\s*#{1,6}\s+")
_BRACKETS = {"[": "]", "{": "}"}
_NAMED = re.compile(r"(?:[A-Za-z]\w{0,20}|\\[A-Za-z]{1,20})?\s?=\s?(?=[^\s=])")
_HEADING = re.compile(r"\s*#{1,6}\s+(?=\S)")
_CURLY = str.maketrans("‘’‚“”„", "'''\"\"\"")


@cache
def table(name: str) -> Mapping[str, Sequence[str]]:
    """The lists of ``data/<name>.yaml``."""
    file = f"{name}.yaml"
    return parse_lists((files(__package__) / "data" / file).read_text(encoding="utf-8"), file)


def plain(text: str) -> str:
    """``text`` without markup.

    >>> plain("**$5\\\\text{ cm}$**"), plain("\\\\boxed{\\\\frac{1}{2}}"), plain("٤²")
    ('5 cm', '\\\\frac{1}{2}', '4^2')
    """
    for pattern, instead in _BEFORE_FOLDING:
        text = pattern.sub(instead, text)
    text = _RAISED.sub(_power, text)
    text = tidy(_FOREIGN_DIGIT.sub(lambda digit: str(int(digit.group())), text))
    text = _HEADING.sub("", text.translate(_CURLY), count=1)
    for _ in range(4):  # markup in markup, as in **`x`**
        before = text
        text = _TAG.sub("", text)
        text = _MATH.sub(r"\2", _STRONG.sub(lambda found: found[1] or found[2], text))
        if "\\" in text or "{,}" in text:
            # commands first: without its braces, the C of \circ\text{C} would be part of one
            text = _unwrapped(_COMMAND.sub(lambda found: _LATEX[found.group()], text))
            text = text.replace(r"\{", "{").replace(r"\}", "}")
        text = _unquoted(tidy(text)) or before
        if text == before:
            break
    return text


def _power(raised: re.Match[str]) -> str:
    return "^" + (raised[1] or raised.group().translate(_SUPERSCRIPTS))


def _unwrapped(text: str) -> str:
    r"""Without ``\boxed{`` and its like, nor their closing braces."""
    parts, end = [], 0
    dropped: list[bool] = []
    for brace in _BRACE.finditer(text):
        opens = brace.group() != "}"
        if opens:
            dropped.append(brace.group() != "{")
        if dropped and (dropped[-1] if opens else dropped.pop()):
            parts.append(text[end : brace.start()])
            end = brace.end()
    return "".join((*parts, text[end:]))


def _unquoted(text: str) -> str:
    closing = _QUOTES.get(text[:1])
    if len(text) > 2 and text[-1] == closing and text[0] not in (inner := text[1:-1]):
        return inner.strip() if closing not in inner else text
    return text


def unlabelled(text: str, *, announced: bool = False) -> str:
    """Plain ``text`` without what stands before the answer. ``announced``: only where "is", a colon
    or the like comes after it.

    >>> unlabelled("The answer is: Option B"), unlabelled("x = 12"), unlabelled("Option")
    ('B', '12', 'Option')
    """
    *_, text = unlabellings(text, announced=announced)
    return text


def unlabellings(text: str, *, announced: bool = False) -> Iterator[str]:
    """``text`` and what is left of it label by label: an answer may begin like one.

    >>> [*unlabellings("The answer is both of them")]
    ['The answer is both of them', 'both of them', 'of them']
    """
    yield text
    label, joint = _labels()
    for _ in range(4):  # "Therefore, the answer is: option B"
        found = label.match(text)
        joined = joint.match(text, found.end()) if found else None
        if found is None or (announced and not joined):
            break
        rest = text[(joined or found).end() :].strip()
        if not fold(rest):
            break
        text = plain(rest)
        yield text
    named = None if announced else _NAMED.match(text)
    if named:
        yield plain(text[named.end() :])


@cache
def _labels() -> tuple[re.Pattern[str], re.Pattern[str]]:
    known = table("phrases")
    label = rf"\W{{0,2}}(?:{_any_of(known['labels'])})\s*(?:\W{{0,2}}(?=[:=]))?"
    signs = [word for word in known["connectors"] if not word[0].isalnum()]
    words = [word for word in known["connectors"] if word[0].isalnum()]
    # one of each at most, and something must be left: in 答案是是 the second 是 is the answer
    joint = rf"\s*(?:(?:{_any_of(words)})(?=.*\w)\s*(?:{_any_of(signs)})?|(?:{_any_of(signs)}))\s*"
    return re.compile(label, re.IGNORECASE), re.compile(joint, re.IGNORECASE)


def _any_of(words: Sequence[str]) -> str:
    """Longest first; a Latin word must end where it is matched."""
    return "|".join(
        re.escape(word) + (r"\b" if word[-1].isascii() and word[-1].isalpha() else "")
        for word in sorted(words, key=len, reverse=True)
    )


def without(text: str, words: str) -> str | None:
    """``text`` after one of the words of a list of ``data/phrases.yaml``; ``None`` where it begins
    with none of them.

    >>> without("minus five", "minus"), without("five", "minus")
    ('five', None)
    """
    found = re.match(rf"(?:{_any_of(table('phrases')[words])})\s*", text, re.IGNORECASE)
    return text[found.end() :] if found else None


def items(text: str) -> str:
    """A list, one item a line or as code writes it, with commas between its items.

    >>> items("1. A\\n2. **C**"), items("['A', 'C']"), items("red, [or] blue")
    ('A, C', "'A', 'C'", 'red, [or] blue')
    """
    lines = [_BULLET.sub("", line, count=1).strip() for line in text.splitlines()]
    listed = unlabelled(plain(", ".join(line.rstrip(",;") for line in lines if line)))
    inner = listed.strip(" .")
    if _BRACKETS.get(inner[:1]) == inner[-1:] and not set("[]{}") & set(inner[1:-1]):
        return inner[1:-1] if fold(inner[1:-1]) else listed
    return listed


def readings(gold: str, answer: str) -> Iterator[tuple[str, str]]:
    """Pairs of gold and answer as texts to compare: as written, without markup, and without what
    announces the answer. A label in the gold was to be read, so the gold keeps it."""
    pairs = [(tidy(gold), tidy(answer)), (plain(gold), plain(answer))]
    want, announced = pairs[1][0], unlabelled(pairs[1][1], announced=True)
    # the full stop is that of "The answer is"
    yield from dict.fromkeys([*pairs, (want, announced), (want, announced.rstrip(" .。"))])
