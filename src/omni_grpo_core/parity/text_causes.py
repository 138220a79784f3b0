"""Why two prompts read differently: changes of one text that, one after the other, give the other.

Texts are ChatML with one placeholder per medium, as
:attr:`~omni_grpo_core.types.Prompt.text` has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher

from omni_grpo_core.parity.ids_causes import Cause
from omni_grpo_core.pipeline import GENERATION_PROMPT

UNNAMED = "text"
"""The name of a difference that is only shown."""
_START, _END = "<|im_start|>", "<|im_end|>\n"
_SPECIAL = re.compile(r"<\|[^|>]*\|>")
_MARKUP = re.compile(r"((?:<\|[^|>]*\|>)+)")
_WORDS = re.compile(r"<\|[^|>]*\|>|\s+|\w+|.", re.DOTALL)
_SYSTEM = re.compile(
    r"(?:<\|im_start\|>system\n(?:(?!<\|im_start\|>).)*?<\|im_end\|>\n)*", re.DOTALL
)
_TURN = re.compile(r"(<\|im_start\|>\w+\n)(.*?)(?=<\|im_end\|>|<\|im_start\|>|\Z)", re.DOTALL)
_SHOWN = 120
Change = tuple[Cause, str]


def explain_text(was: str, now: str) -> Iterator[Cause]:
    """What the second did to the text of the first.

    >>> was = "<|im_start|>user\\nWhy?<|im_end|>\\n<|im_start|>assistant\\n"
    >>> [cause.sentence for cause in explain_text(was, was[:-22])]
    ["the end is missing: '<|im_start|>assistant\\\\n'"]
    """
    for facet in (_system, _ending, _order, _whitespace, _template):
        found = facet(was, now) if was != now else None
        if found is not None:
            cause, was = found
            yield cause
    if was != now:
        yield Cause(UNNAMED, _first_difference(was, now))


def _system(was: str, now: str) -> Change | None:
    # the pattern matches nothing, too
    mine, theirs = (next(_SYSTEM.finditer(text))[0] for text in (was, now))
    if mine == theirs or not now.startswith(_START) or (not theirs and "system\n" in now):
        return None
    changed = theirs + was[len(mine) :]
    if not theirs:
        return Cause("no-system", f"the system message is missing: {_shown(mine)}"), changed
    if theirs.endswith(mine):
        added = theirs.removesuffix(mine)
        said = f"a system message that the first has not: {_shown(added)}"
        return Cause("default-system", said), changed
    if len(set(mine.split()) & set(theirs.split())) * 2 > len(set(mine.split())):
        said = f"in the system message, {_first_difference(mine, theirs)}"
    else:
        said = f"{_shown(theirs)} instead of {_shown(mine)}"
    return Cause("other-system", said), changed


def _ending(was: str, now: str) -> Change | None:
    """What comes after the last message: the turn that the model is to continue."""
    mine, theirs = (text.rpartition(_END)[2] for text in (was, now))
    changed = was.removesuffix(mine) + theirs
    if mine == theirs or mine != GENERATION_PROMPT:
        return None
    if not theirs:
        return Cause("no-generation-prompt", f"the end is missing: {mine!r}"), changed
    if theirs == GENERATION_PROMPT * (theirs.count(_START) or 1):
        return Cause("generation-prompt-twice", f"the end is {_shown(theirs)}"), changed
    begun = theirs.removeprefix(GENERATION_PROMPT)
    if begun != theirs and not _SPECIAL.match(begun):
        return Cause("answer-begun", f"the answer begins with {_shown(begun)}"), changed
    return None


def _order(was: str, now: str) -> Change | None:
    """The same words and media of a message in another order; or a clip as pictures."""
    pairs = list(zip(_TURN.findall(was), _TURN.findall(now), strict=False))
    for (head, mine), (other, theirs) in pairs:
        if head != other or mine == theirs:
            continue
        parts, others = (_MARKUP.split(content) for content in (mine, theirs))
        if "".join(parts[::2]) != "".join(others[::2]):
            continue
        changed = was.replace(head + mine, other + theirs, 1)
        media, given = ("".join(side[1::2]) for side in (parts, others))
        if media == given:
            said = f"the message is {_outline(others)} instead of {_outline(parts)}"
            return Cause("content-order", said), changed
        if sorted(_SPECIAL.findall(media)) == sorted(_SPECIAL.findall(given)):
            said = f"media in the order {_shown(given)} instead of {_shown(media)}"
            return Cause("content-order", said), changed
        pictures, clips = given.lower().count("image"), media.lower().count("video")
        if pictures > clips > 0 and "video" not in given.lower():
            return Cause("video-as-images", f"{pictures} images in place of video"), changed
    return None


def _outline(parts: list[str]) -> str:
    return ", ".join(
        ("media" if number % 2 else "text") for number, part in enumerate(parts) if part
    )


def _whitespace(was: str, now: str) -> Change | None:
    words = [[word for word in _WORDS.findall(text) if word.strip()] for text in (was, now)]
    if words[0] != words[1]:
        return None
    return Cause("whitespace", _first_difference(was, now)), now


def _template(was: str, now: str) -> Change | None:
    """The same messages between other marks, or between none."""
    if now == _SPECIAL.sub("", was):
        return Cause("special-tokens-dropped", "every special token is missing"), now
    if _START in now and _END.strip() in now:
        return None
    place = 0
    for _, content in _TURN.findall(was):
        for words in _MARKUP.split(content)[::2]:
            at = now.find(words.strip(), place)
            if at < 0:
                return None
            place = at + len(words.strip())
    return Cause("other-template", f"the same messages between other marks: {_shown(now)}"), now


def _first_difference(was: str, now: str) -> str:
    mine, theirs = _WORDS.findall(was), _WORDS.findall(now)
    for tag, i, j, k, m in SequenceMatcher(None, mine, theirs, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        lost, added, place = "".join(mine[i:j]), "".join(theirs[k:m]), len("".join(mine[:i]))
        if not added:
            return f"without {_shown(lost)} at character {place}"
        if not lost:
            return f"with {_shown(added)} at character {place}"
        return f"{_shown(added)} instead of {_shown(lost)} at character {place}"
    return ""


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
