"""Numbers as people write them, and the two measures that compare them."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from omni_grpo_core.io.extras import extra
from omni_grpo_core.rewards import RewardRow
from omni_grpo_core.rewards.parse import Gold, bad_gold
from omni_grpo_core.rewards.words import tidy
from omni_grpo_core.types import Score

_LONGEST = 200
_LONGEST_LATEX = 40
_PLAIN = r"(?:\d{1,3}(?:[, ]\d{3})+|\d+)(?:\.\d*)?|\.\d+"
# an exponent has at most three digits, so that every answer evaluates fast
_POWER = r"(?:e[+-]?\d{1,3}|\s?[x×*·]\s?10\s?\^\s?[({]?[+-]?\d{1,3}[)}]?)"
_NUMBER = re.compile(
    rf"(?P<currency>[$€£¥])?\s?(?P<sign>[+-]?)\s?"
    rf"(?:(?P<whole>\d+) (?=\d+\s?/))?(?P<top>{_PLAIN})(?P<power>{_POWER})?"
    rf"(?:\s?/\s?(?P<bottom>{_PLAIN}))?"
    rf"(?P<percent>\s?(?:%|percent|per cent))?(?:\s?(?P<unit>[^\W\d_][^\s\d,]*|°[cf]?))?",
    re.IGNORECASE,
)
_EXPONENT = re.compile(r"[+-]?\d+[)}]?$")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_SCALES = {
    "hundred", "thousand", "million", "billion", "trillion", "dozen", "k", "m", "b", "bn", "mn",
    "百", "千", "万", "亿",
}  # fmt: skip
# constant arithmetic only, one plain exponent: at most 40 * 99 digits, below Python's limit of
# 4,300 for printing an integer, and nothing that takes sympy long
_SAFE_LATEX = re.compile(
    r"(?:\\(?:d?frac|tfrac|sqrt|pi|cdot|times|left|right|%|,)|\^\{-?\d{1,2}(?:/\d{1,2})?\}|\^-?\d{1,2}(?!\d)"
    r"|[\d\s.,+\-*/(){}])+"
)


@dataclass(frozen=True, slots=True)
class Figure:
    """A written number. ``value`` is exact; for a percentage it is the number before the sign.
    ``decimals``: digits after the point as written, 0 for fractions and scientific notation."""

    value: Fraction
    percent: bool
    unit: str
    decimals: int

    @classmethod
    def read(cls, text: str) -> Figure | None:
        """``text`` as a number, or ``None``: a sentence that contains a number is not one.

        >>> Figure.read("1,000.50").value, Figure.read("1.2×10³").value
        (Fraction(2001, 2), Fraction(1200, 1))
        >>> Figure.read("5 or 6") is None
        True
        """
        if len(text) > _LONGEST:
            return None
        raised = _RAISED.sub(lambda run: "^" + run.group().translate(_SUPERSCRIPTS), text)
        plain = tidy(raised).replace("−", "-").replace("⁄", "/").rstrip(".")
        if len(plain) > 2 and plain[0] == plain[-1] == "$":
            plain = plain[1:-1].strip()
        match = _NUMBER.fullmatch(plain)
        if not match:
            return None
        top, bottom = _decimal(match["top"]), _decimal(match["bottom"] or "1")
        if not bottom:
            return None
        value = top * _power(match["power"]) / bottom + int(match["whole"] or 0)
        fraction = bool(match["bottom"] or match["power"])
        return cls(
            value=-value if match["sign"] == "-" else value,
            percent=bool(match["percent"]),
            unit=(match["unit"] or "").casefold(),
            decimals=0 if fraction else len(match["top"].partition(".")[2]),
        )


def numerical(row: RewardRow, truth: Gold, answer: str) -> Score:
    """1 for the same number however it is written: thousands separators, trailing zeros,
    fractions, scientific notation, a currency sign or a unit that the gold does not contradict.

    ``x%`` equals ``x/100``; if only one side has the sign, a bare number above 1 matches as well.
    A rounded answer counts if it has at least two decimals and three significant digits. LaTeX that
    is not a plain number is compared by math-verify.
    """
    right = Figure.read(truth.answer)
    if right is None and not _same_latex(truth.answer, truth.answer):
        raise bad_gold(row, truth.answer, "a number")
    given = Figure.read(answer)
    if right is None or given is None:
        same = _same_latex(truth.answer, answer)
        if same is None:
            return Score(0.0, f"{answer.strip()[:40]!r} is no number")
        return Score(float(same), f"{answer.strip()[:40]!r} against {truth.answer!r} (math-verify)")
    verdict = f"{answer.strip()[:40]!r} against {truth.answer!r}"
    if not _units_agree(given.unit, right.unit):
        return Score(0.0, f"{verdict}: other unit")
    hit = any(a == g or _rounded(g, a, given.decimals) for a, g in _pairs(given, right))
    return Score(float(hit), verdict)


def regression(row: RewardRow, truth: Gold, answer: str) -> Score:
    """``max(0, 1 - |answer - gold| / |gold|)``; with a gold of 0, 1 for exactly 0."""
    right = Figure.read(truth.answer)
    if right is None:
        raise bad_gold(row, truth.answer, "a number")
    given = Figure.read(answer)
    if given is None:
        return Score(0.0, f"{answer.strip()[:40]!r} is no number")
    verdict = f"{answer.strip()[:40]!r} against {truth.answer!r}"
    if not _units_agree(given.unit, right.unit):
        return Score(0.0, f"{verdict}: other unit")
    errors = [abs(a - g) / abs(g) if g else Fraction(a != g) for a, g in _pairs(given, right)]
    return Score(float(max(Fraction(0), 1 - min(errors))), verdict)


def _decimal(text: str) -> Fraction:
    return Fraction(Decimal(text.replace(",", "").replace(" ", "")))


def _power(text: str | None) -> Fraction:
    exponent = _EXPONENT.search(text) if text else None
    return Fraction(10) ** int(exponent.group().strip(")}")) if exponent else Fraction(1)


def _pairs(given: Figure, right: Figure) -> list[tuple[Fraction, Fraction]]:
    """Answer and gold on every scale on which they may be compared."""
    a, g = (f.value / 100 if f.percent else f.value for f in (given, right))
    pairs = [(a, g)]
    if given.percent != right.percent and abs(given.value) > 1:
        pairs.append((given.value, right.value))
    return pairs


def _rounded(gold: Fraction, answer: Fraction, decimals: int) -> bool:
    """Whether ``answer``, written with ``decimals`` decimals, is ``gold`` rounded."""
    unit = Fraction(1, 10**decimals)
    return decimals >= 2 and abs(answer) >= 100 * unit and abs(gold - answer) <= unit / 2


def _units_agree(given: str, right: str) -> bool:
    if given == right:
        return True
    # "3 people" for 3 is right, "3 thousand" is not; "5" for "5 cm" is
    return not (given and right) and given not in _SCALES and right not in _SCALES


def _bare_latex(text: str) -> str:
    bare = tidy(text).strip("$ ")
    boxed = re.fullmatch(r"\\boxed\{(.*)\}", bare)
    return boxed.group(1) if boxed else bare


def _is_constant(latex: str) -> bool:
    """Whether it is arithmetic on numbers that sympy evaluates quickly."""
    if len(latex) > _LONGEST_LATEX or latex.count("^") > 1 or not any(map(str.isdigit, latex)):
        return False
    return bool(_SAFE_LATEX.fullmatch(latex))


def _same_latex(gold: str, answer: str) -> bool | None:
    """math-verify's verdict on two constant expressions; ``None`` if either is not one."""
    both = [_bare_latex(gold), _bare_latex(answer)]
    if not all(map(_is_constant, both)):
        return None
    with extra("rewards"):
        import math_verify

    # its own time limit needs the main thread's alarm signal; these expressions need no limit
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = [math_verify.LatexExtractionConfig()]
    wanted, found = (
        math_verify.parse(f"${text}$", extraction_config=config, parsing_timeout=None)
        for text in both
    )
    # one over zero is also a constant, and equal to itself
    if not wanted or not found or not wanted[0].is_finite:
        return None
    return bool(math_verify.verify(wanted, found, timeout_seconds=None))
