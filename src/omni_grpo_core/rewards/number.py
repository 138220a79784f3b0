"""Numbers as people write them, and the two measures that compare them.

Values are exact fractions. An irrational one is known to 60 digits, and equal to another if they
agree to 40: constants of at most 40 characters are not that close to one another by chance.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from omni_grpo_core.io.extras import extra
from omni_grpo_core.rewards import RewardRow
from omni_grpo_core.rewards.normalise import plain, unlabelled, without
from omni_grpo_core.rewards.numerals import Numeral, read_numeral
from omni_grpo_core.rewards.parse import Gold, bad_gold
from omni_grpo_core.rewards.units import known, read_unit
from omni_grpo_core.types import Score

_LONGEST = 200
_LONGEST_LATEX = 40
_DIGITS, _SAME_DIGITS = 60, Fraction(1, 10**40)
_CURRENCY = re.compile(r"[A-Z]{3}(?=\s?[\d.+-])|(?:[A-Z]{0,3}|Rs\.?\s?)[$€£¥₩₹₽¢]|Rs\.?(?=\s?\d)")
_SIGN = re.compile(r"[+\-−]\s?")
# constant arithmetic only, one plain exponent: at most 40 * 99 digits, below Python's limit of
# 4,300 for printing an integer, and nothing that takes sympy long
_SAFE_LATEX = re.compile(
    r"(?:\\(?:frac|sqrt|pi|times)(?![A-Za-z])|\^\{-?\d{1,2}(?:/\d{1,2})?\}|\^-?\d{1,2}(?!\d)"
    r"|[\d\s.,+\-*×·/(){}])+"
)
_SPELLED = ((re.compile(r"√\s?\(?(\d+)\)?|\bsqrt\((\d+)\)"), r"\\sqrt{\1\2}"),
            (re.compile(r"π|(?<![A-Za-z\\])pi\b", re.IGNORECASE), r"\\pi "),
            (re.compile("[×·]"), r"\\times "))  # fmt: skip
_TWICE = re.compile(r"([^()\\]+?)\s*\(([^()\\]*[^()\\\d.+*/^-][^()\\]*|\d+)\)")
"""A number said again in brackets: "three (3)", "5 (five)"."""
_POINT = re.compile(r"\d*\.\d+|\d+\.")


@dataclass(frozen=True, slots=True)
class Figure:
    """A written number. ``value``: for a percentage the number before the sign; ``exact``: no
    rounding of an irrational one. ``units``: what its unit may be, empty for none. ``decimals``:
    digits after the point as written, 0 for fractions and scientific notation."""

    value: Fraction
    units: frozenset[str]
    decimals: int
    exact: bool = True

    @property
    def percent(self) -> bool:
        return "percent" in self.units

    @classmethod
    def read(cls, text: str) -> Figure | None:
        """``text`` as a number, or ``None``: a sentence that contains a number is not one.

        Raises :class:`~omni_grpo_core.errors.MissingExtra` for a formula without math-verify.

        >>> Figure.read("1,000.50").value, Figure.read("1.2×10³").value
        (Fraction(2001, 2), Fraction(1200, 1))
        >>> Figure.read("2 million dollars") == Figure.read("$2,000,000")
        True
        >>> Figure.read("5 or 6") is None
        True
        """
        if len(text) > _LONGEST:
            return None
        said = unlabelled(plain(text)).rstrip(" .!。")
        said = without(said, "about") or said
        said = said[1:-1] if (said[:1], said[-1:]) in (("[", "]"), ("{", "}")) else said
        twice = _TWICE.fullmatch(said)
        if twice:
            first, again = cls.read(twice[1]), cls.read(twice[2])
            return first if first and again and first.value == again.value else None
        return _figure(said) or _formula(said)


def numerical(row: RewardRow, truth: Gold, answer: str) -> Score:
    """1 for the same number however it is written: thousands separators, trailing zeros, fractions,
    scientific notation, in words, as LaTeX, with a unit or currency that the gold does not
    contradict. Units are compared by name and never converted.

    ``x%`` equals ``x/100``; if only one side has the sign, a bare number above 1 matches as well.
    A rounded answer counts if it has at least two decimals and three significant digits.
    """
    right, given, verdict = _both(row, truth, answer)
    if given is None:
        return Score(0.0, verdict)
    hit = any(
        _equal(a, g, given.exact and right.exact) or _rounded(g, a, given.decimals)
        for a, g in _pairs(given, right)
    )
    return Score(float(hit), verdict)


def regression(row: RewardRow, truth: Gold, answer: str) -> Score:
    """``max(0, 1 - |answer - gold| / |gold|)``; with a gold of 0, 1 for exactly 0."""
    right, given, verdict = _both(row, truth, answer)
    if given is None:
        return Score(0.0, verdict)
    errors = [abs(a - g) / abs(g) if g else Fraction(a != g) for a, g in _pairs(given, right)]
    return Score(float(max(Fraction(0), 1 - min(errors))), verdict)


def _both(row: RewardRow, truth: Gold, answer: str) -> tuple[Figure, Figure | None, str]:
    """Gold, answer and how to show them; no answer where it is no number or has another unit."""
    right = Figure.read(truth.answer)
    if right is None:
        raise bad_gold(row, truth.answer, "a number")
    shown = repr(answer.strip()[:40])
    given = Figure.read(answer)
    if given is None:
        return right, None, f"{shown} is no number"
    verdict = f"{shown} against {truth.answer!r}"
    named = [figure.units - {"percent"} for figure in (given, right)]
    if all(named) and not named[0] & named[1]:
        return right, None, f"{verdict}: other unit"
    return right, given, verdict


def _figure(text: str) -> Figure | None:
    """A number in digits or words between sign, currency and unit."""
    minus, text = _signed(text)
    price = _CURRENCY.match(text)
    units: frozenset[str] = frozenset()
    if price and (units := known(price.group().strip())):
        again, text = _signed(text[price.end() :].strip())
        minus ^= again
    number = read_numeral(text)
    if number is None:
        return None
    rest = text[number.end :].strip()
    if rest:
        named = read_unit(rest)
        if named is None or (units and not units & named):
            return None
        units = named
    if text.startswith("百分之"):
        number, units = Numeral(number.value * 100, number.decimals, 0), frozenset({"percent"})
    return Figure(-number.value if minus else number.value, units, number.decimals)


def _signed(text: str) -> tuple[bool, str]:
    sign = _SIGN.match(text)
    if sign:
        return sign.group()[0] != "+", text[sign.end() :]
    rest = without(text, "minus")
    return (False, text) if rest is None else (True, rest)


def _formula(text: str) -> Figure | None:
    """A constant expression, read by math-verify, and its unit."""
    minus, text = _signed(text)
    for pattern, latex in _SPELLED:
        text = pattern.sub(latex, text)
    found = _SAFE_LATEX.match(text)
    if not found or len(found.group()) > _LONGEST_LATEX or found.group().count("^") > 1:
        return None
    formula, rest = found.group(), text[found.end() :].strip()
    if not re.search(r"\d|\\pi", formula):
        return None
    units = read_unit(rest) if rest else frozenset()
    value = None if units is None else _constant(formula.strip())
    if value is None or units is None:
        return None
    return Figure(-value[0] if minus else value[0], units, 0, value[1])


def _constant(latex: str) -> tuple[Fraction, bool] | None:
    """The value of constant arithmetic, and whether it is exact."""
    with extra("rewards"):
        import math_verify
        import sympy

    # its own time limit needs the main thread's alarm signal; these expressions need no limit
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # it would make binary floats of decimals
    exact = _POINT.sub(lambda n: f"({_as_fraction(n.group())})", latex)
    found: Any = math_verify.parse(
        f"${exact}$",
        extraction_config=[math_verify.LatexExtractionConfig()],
        parsing_timeout=None,
    )
    number = found[0].doit() if found and isinstance(found[0], sympy.Expr) else None
    # one over zero is a constant too
    if number is None or not (number.is_finite and number.is_real):
        return None
    if number.is_Rational:
        return Fraction(int(number.p), int(number.q)), True
    return Fraction(str(sympy.N(number, _DIGITS))), False


def _as_fraction(point: str) -> str:
    value = Fraction(point)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _pairs(given: Figure, right: Figure) -> list[tuple[Fraction, Fraction]]:
    """Answer and gold on every scale on which they may be compared."""
    a, g = (f.value / 100 if f.percent else f.value for f in (given, right))
    pairs = [(a, g)]
    if given.percent != right.percent and abs(given.value) > 1:
        pairs.append((given.value, right.value))
    return pairs


def _equal(answer: Fraction, gold: Fraction, exact: bool) -> bool:
    return answer == gold or (not exact and abs(answer - gold) <= _SAME_DIGITS * abs(gold))


def _rounded(gold: Fraction, answer: Fraction, decimals: int) -> bool:
    """Whether ``answer``, written with ``decimals`` decimals, is ``gold`` rounded."""
    unit = Fraction(1, 10**decimals)
    return decimals >= 2 and abs(answer) >= 100 * unit and abs(gold - answer) <= unit / 2
