"""Numbers in words, and in digits with words: "2 million", "2万5千", "twenty-one", "百分之五十"."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cache

from omni_grpo_core.rewards.normalise import table
from omni_grpo_core.rewards.units import known

# an exponent has at most three digits, so that every answer evaluates fast
_EXPONENT = r"10\s?\^\s?[({]?(?P<NAME>[+-]?\d{1,3})[)}]?"
_PLAIN = r"(?:\d{1,3}(?:[, ]\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
_DIGITS = re.compile(
    rf"{_EXPONENT.replace('NAME', 'bare')}|"
    rf"(?:(?P<whole>\d+) (?=\d+\s?[/⁄]))?(?P<top>{_PLAIN})"
    rf"(?:e(?P<e>[+-]?\d{{1,3}})(?!\w)|\s?[x×*·]\s?{_EXPONENT.replace('NAME', 'power')})?"
    rf"(?:\s?[/⁄]\s?(?P<bottom>{_PLAIN}))?",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Za-z]+")
_BETWEEN = re.compile(r"[\s-]*(?:and\s+)?")
_ARTICLE = re.compile(r"an?\s+(?=[A-Za-z])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Numeral:
    """``value`` is exact. ``decimals``: digits after the point as written, 0 for fractions and what
    has words in it. ``end``: where it ends in the text."""

    value: Fraction
    decimals: int
    end: int


@dataclass(frozen=True, slots=True)
class _Token:
    value: Fraction
    kind: str  # digits, adds, times; a Chinese digit is "digit", the point in words "point"
    start: int
    end: int
    decimals: int = 0


def read_numeral(text: str) -> Numeral | None:
    """The number that ``text`` begins with, or ``None``.

    >>> read_numeral("2 million dollars").value, read_numeral("一百二十三米").value
    (Fraction(2000000, 1), Fraction(123, 1))
    >>> read_numeral("cars") is None
    True
    """
    share = re.match(r"(.{1,12}?)分之(.+)", text)
    if share:
        bottom, top = read_numeral(share[1]), read_numeral(share[2])
        if not (bottom and top and bottom.end == len(share[1]) and bottom.value):
            return None
        return Numeral(top.value / bottom.value, 0, share.start(2) + top.end)
    tokens = list(_tokens(text))
    value = _combined(tokens) if tokens else None
    if value is None:
        return None
    return Numeral(value, tokens[0].decimals if len(tokens) == 1 else 0, tokens[-1].end)


def _tokens(text: str) -> Iterator[_Token]:
    article = _ARTICLE.match(text)
    at = article.end() if article else 0
    first = True
    while at < len(text):
        token = _token(text, at, first)
        if token is None or (article and first and token.kind != "times"):
            return
        yield token
        first = False
        between = _BETWEEN.match(text, token.end)
        at = between.end() if between else token.end


def _token(text: str, at: int, first: bool) -> _Token | None:
    found = _DIGITS.match(text, at)
    if found:
        value = _value(found)
        if value is None:
            return None
        fraction = found["bare"] or found["bottom"] or found["power"] or found["e"]
        decimals = 0 if fraction else len(found["top"].partition(".")[2])
        return _Token(value, "digits", at, found.end(), decimals)
    word = _WORD.match(text, at)
    if word:
        written = word.group()
        # "5k" and "2M" are counts; "5 K" is a temperature
        if len(written) == 1 and (first or not text[at - 1].isdigit()):
            return None
        kind, value = _words().get(written) or _words().get(written.casefold()) or ("", None)
        return None if value is None else _Token(value, kind, at, word.end())
    if not first and known(text[at : at + 2]):
        return None  # 千克 and 千米 are units
    kind, value = _words().get(text[at]) or ("digit", None)
    number = unicodedata.numeric(text[at], -1) if value is None else float(value)
    if text[at] == "点" and not first:
        return _Token(Fraction(0), "point", at, at + 1)
    if number < 0 or number != int(number):
        return None
    return _Token(Fraction(int(number)), "digit" if number < 10 else "times", at, at + 1)


@cache
def _words() -> dict[str, tuple[str, Fraction]]:
    return {
        word: ("times" if value[0] == "×" else "adds", Fraction(value.lstrip("×")))
        for value, words in table("numbers").items()
        for word in words
    } | {"point": ("point", Fraction(0))}


def _value(found: re.Match[str]) -> Fraction | None:
    if found["bare"]:
        return Fraction(10) ** int(found["bare"])
    bottom = _decimal(found["bottom"] or "1")
    if not bottom:
        return None
    power = Fraction(10) ** int(found["power"] or found["e"] or 0)
    return _decimal(found["top"]) * power / bottom + int(found["whole"] or 0)


def _decimal(text: str) -> Fraction:
    return Fraction(Decimal(text.replace(",", "").replace(" ", "")))


def _combined(tokens: list[_Token]) -> Fraction | None:
    """The number that the tokens make: units and tens add up, hundreds multiply what stands before
    them since the last thousand, thousands and more multiply all before or close a part of it."""
    kinds = [token.kind for token in tokens]
    if "point" in kinds:
        return _with_decimals(tokens, kinds.index("point"))
    total = section = Fraction(0)
    pending: Fraction | None = None
    scale = last = Fraction(0)
    zero = False
    for token, before in zip(tokens, (None, *tokens), strict=False):
        value = token.value
        if token.kind == "times":
            if value < 1000 or (value == 1000 and token.end - token.start == 1):
                section += (1 if pending is None else pending) * value
            else:
                part = section + (pending or 0)
                if value > scale and scale:
                    total = (total + part) * value
                else:
                    total += (part or 1) * value
                section, scale = Fraction(0), value
            pending, last, zero = None, value, False
        elif pending is None:
            pending, zero = value, zero or value == 0
        elif token.kind == "digit" and before is not None and before.kind == "digit":
            # 二〇二六, but also the zero in 一百零五
            pending = pending * 10 + value
        elif token.kind == "adds" and pending % 10 == 0 and 0 < value < 10 <= pending < 100:
            pending += value
        else:
            return None
    if pending is not None and tokens[-1].kind == "digit" and last >= 100 and not zero:
        # 一百五 is 150, 三万五 is 35,000
        pending *= last / 10
    return total + section + (pending or 0)


def _with_decimals(tokens: list[_Token], at: int) -> Fraction | None:
    """三点一四, "three point one four"."""
    whole, digits = _combined(tokens[:at]), tokens[at + 1 :]
    if whole is None or not digits or any(token.value >= 10 for token in digits):
        return None
    return whole + Fraction(int("".join(str(t.value) for t in digits)), 10 ** len(digits))
