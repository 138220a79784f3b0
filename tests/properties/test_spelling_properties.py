"""For every comparison of the accuracy reward: pairs that are equal by construction earn 1, pairs
that are unequal by construction earn 0.

How an answer is written comes from what people and models write, and knows nothing of the
reward's own tables. ``HYPOTHESIS_PROFILE=slow`` makes 2,000 pairs of each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.parse import render

PAIRS = settings(max_examples=10 if settings().max_examples == 100 else 2_000)
REWARD = Accuracy()


def score(kind: str, gold: str, answer: str, options: Sequence[str] = ()) -> float | None:
    [value] = REWARD(
        ["q"],
        [render("c", "t", answer)],
        problem_type=[kind],
        options=[list(options)],
        solution=[f"<answer>{gold}</answer>"],
    )
    return value


# --------------------------------------------------------------------------- dressed answers

Dress = Callable[[str], str]
BARE: tuple[Dress, ...] = (
    lambda x: x,
    lambda x: f" {x} ",
    lambda x: f"**{x}**",
    lambda x: f"`{x}`",
    lambda x: f"**`{x}`**",
    lambda x: f"<b>{x}</b>",
)
LATEX: tuple[Dress, ...] = (
    lambda x: f"\\boxed{{{x}}}",
    lambda x: f"$\\boxed{{{x}}}$",
    lambda x: f"\\[\\boxed{{\\text{{{x}}}}}\\]",
    lambda x: f"\\text{{{x}}}",
    lambda x: f"\\(\\mathrm{{{x}}}\\)",
)
ANNOUNCED: tuple[Dress, ...] = (
    lambda x: f"The answer is {x}.",
    lambda x: f"The answer is: **{x}**",
    lambda x: f"**Answer:** {x}",
    lambda x: f"Final answer: {x}",
    lambda x: f"Therefore, the correct answer is \\boxed{{{x}}}.",
    lambda x: f"答案：{x}",
    lambda x: f"答案是{x}。",
    lambda x: f"ANSWER: {x}",
)
DRESSES = st.sampled_from(BARE + LATEX + ANNOUNCED)

# --------------------------------------------------------------------------- numbers

# fmt: off
_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
         "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
         "nineteen")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on


def in_english(n: int) -> str:
    """
    >>> in_english(1_250_071)
    'one million two hundred and fifty thousand and seventy-one'
    """
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10 - 2] + (f"-{_ONES[n % 10]}" if n % 10 else "")
    for size, name in ((10**6, "million"), (10**3, "thousand"), (100, "hundred")):
        if n >= size:
            rest = n % size
            joint = " and " if 0 < rest < 100 else " "
            return f"{in_english(n // size)} {name}" + (joint + in_english(rest) if rest else "")
    raise AssertionError(n)


def in_chinese(n: int) -> str:
    """
    >>> in_chinese(10_205), in_chinese(12), in_chinese(230)
    ('一万零二百零五', '十二', '二百三十')
    """
    if n >= 10**4:
        rest = n % 10**4
        zero = "零" if 0 < rest < 1000 else ""
        return in_chinese(n // 10**4) + "万" + (zero + in_chinese(rest) if rest else "")
    text, digits = "", str(n)
    for at, digit in enumerate(digits):
        place = len(digits) - at - 1
        if digit != "0":
            text += "零一二三四五六七八九"[int(digit)] + ("", "十", "百", "千")[place]
        elif text and text[-1] != "零" and int(digits[at:] or 0):
            text += "零"
    return (text.removeprefix("一") if text.startswith("一十") else text) or "零"


def digits_of(zero: str) -> Callable[[int], str]:
    return lambda n: "".join(chr(ord(zero) + int(d)) for d in str(n))


def scaled(n: int) -> str:
    for size, name in ((10**9, " billion"), (10**6, " million"), (10**4, "万"), (10**3, "k")):
        if n and n * 100 % size == 0:
            return f"{n / size:g}{name}"
    return str(n)


WAYS: tuple[Callable[[int], str], ...] = (
    str,
    lambda n: f"{n:,}",
    lambda n: f"{n:,}".replace(",", " "),
    lambda n: f"{n:,}".replace(",", "{,}"),
    lambda n: f"{n}.0",
    lambda n: f"{2 * n}/2",
    lambda n: f"\\frac{{{3 * n}}}{{3}}",
    lambda n: f"{n}e0",
    lambda n: f"{n / 1000!r} \\times 10^{{3}}",
    in_english,
    lambda n: in_english(n).capitalize(),
    in_chinese,
    scaled,
    digits_of("０"),
    digits_of("٠"),
    digits_of("०"),
    lambda n: f"x = {n}",
    lambda n: f"about {n}",
)
NUMBERS = st.integers(0, 9_999) | st.integers(1, 99).map(lambda n: n * 10**6)
WAY = st.sampled_from(WAYS)
SIGNED: tuple[Callable[[str], str], ...] = (
    lambda x: f"-{x}", lambda x: f"−{x}", lambda x: f"minus {x}", lambda x: f"negative {x}",
)  # fmt: skip


@PAIRS
@given(NUMBERS, WAY, WAY, DRESSES)
def test_the_same_number(n: int, one: Callable[[int], str], other: Callable[[int], str],
                         dress: Dress) -> None:  # fmt: skip
    assert score("numerical", one(n), dress(other(n))) == 1.0
    assert score("regression", one(n), dress(other(n))) == 1.0


def changed(n: int) -> st.SearchStrategy[int]:
    return st.sampled_from([n + 1, n * 10, n * 100, n * 1000, n + 1000]).filter(lambda m: m != n)


@PAIRS
@given(st.data(), NUMBERS, WAY, WAY, DRESSES)
def test_another_number(data: st.DataObject, n: int, one: Callable[[int], str],
                        other: Callable[[int], str], dress: Dress) -> None:  # fmt: skip
    answer = dress(other(data.draw(changed(n))))
    assert score("numerical", one(n), answer) == 0.0


@PAIRS
@given(NUMBERS.filter(bool), WAY, st.integers(0, 5), st.sampled_from(SIGNED), DRESSES)
def test_another_sign_or_size(n: int, way: Callable[[int], str], power: int,
                              sign: Callable[[str], str], dress: Dress) -> None:  # fmt: skip
    assert score("numerical", way(n), dress(sign(str(n)))) == 0.0
    assert score("numerical", sign(str(n)), dress(way(n))) == 0.0
    assert score("regression", way(n), dress(sign(str(n)))) == 0.0
    assert score("regression", way(n), dress(f"{n * 10 ** (power + 1)}")) == 0.0
    assert score("numerical", way(n), dress(f"not {n}")) == 0.0
    assert score("numerical", way(n), dress(f"{n} or {n + 1}")) == 0.0


UNITS: tuple[tuple[str, ...], ...] = (
    (
        " km",
        "km",
        " kilometers",
        " kilometres",
        " Kilometers",
        " KM",
        "公里",
        "千米",
        "\\text{ km}",
    ),
    (" m", " meters", " metres", "米", "\\,\\mathrm{m}"),
    (" cm", "cm", " centimeters", "厘米", "\\text{ cm}"),
    (" mm", " millimetres", "毫米"),
    (" m²", " m^2", " m2", " square meters", " sq m", "平方米", " m<sup>2</sup>", "\\text{ m}^2"),
    (" m³", " cubic meters", " m^3", "立方米"),
    (" s", "s", " sec", " seconds", " second", "秒", "\\text{ s}"),
    (" ms", " milliseconds", "毫秒"),
    (" min", " mins", " minutes", "分钟"),
    (" h", " hrs", " hours", "小时"),
    (" days", " day", "天"),
    (" kg", " kilograms", "公斤", "千克"),
    (" g", " grams", "克"),
    (" km/h", " kilometers per hour", " kph", "公里/小时"),
    (" m/s", " meters per second", " m / s", "米每秒", "\\text{ m/s}"),
    (" m/s²", " m/s^2", " meters per second squared"),
    (" mph", " miles per hour"),
    (" liters", " L", " litres", "升"),
    ("°C", " °C", " degrees Celsius", "℃", "^\\circ\\text{C}", "摄氏度"),
    ("°F", " degrees Fahrenheit", "℉"),
    (" dollars", " USD", "美元"),
    (" euros", " EUR", "欧元"),
    (" people", " persons", "人", "个人"),
    (" apples", " apple"),
    (" Hz", " hertz"),
    (" dB", " decibels", "分贝"),
)
PRICES: tuple[tuple[Callable[[int], str], ...], ...] = (
    (lambda n: f"${n}", lambda n: f"${n}.00", lambda n: f"US${n}", lambda n: f"{n} dollars",
     lambda n: f"\\${n}", lambda n: f"USD {n}", lambda n: f"{n:,} USD"),
    (lambda n: f"€{n}", lambda n: f"{n} €", lambda n: f"{n} euros", lambda n: f"EUR {n}"),
    (lambda n: f"£{n}", lambda n: f"{n} pounds", lambda n: f"{n} GBP"),
    (lambda n: f"₹{n}", lambda n: f"{n} rupees", lambda n: f"Rs. {n}"),
    (lambda n: f"{n}元", lambda n: f"{n} yuan", lambda n: f"{n} RMB", lambda n: f"￥{n}"),
)  # fmt: skip


@PAIRS
@given(st.data(), st.integers(2, 999), st.sampled_from(UNITS), DRESSES)
def test_the_same_unit(data: st.DataObject, n: int, unit: tuple[str, ...], dress: Dress) -> None:
    one, other = (data.draw(st.sampled_from(unit)) for _ in range(2))
    for kind in ("numerical", "regression"):
        assert score(kind, f"{n}{one}", dress(f"{n}{other}")) == 1.0
        assert score(kind, f"{n}{one}", dress(str(n))) == 1.0


@PAIRS
@given(st.data(), st.integers(2, 999), st.sampled_from(UNITS), st.sampled_from(UNITS), DRESSES)
def test_another_unit(data: st.DataObject, n: int, unit: tuple[str, ...],
                      wrong: tuple[str, ...], dress: Dress) -> None:  # fmt: skip
    assume(unit != wrong)
    one, other = (data.draw(st.sampled_from(names)) for names in (unit, wrong))
    for kind in ("numerical", "regression"):
        assert score(kind, f"{n}{one}", dress(f"{n}{other}")) == 0.0


@PAIRS
@given(st.data(), st.integers(2, 9999), st.sampled_from(BARE), st.booleans())
def test_prices(data: st.DataObject, n: int, dress: Dress, same: bool) -> None:
    gold = data.draw(st.sampled_from(PRICES))
    answers = gold if same else data.draw(st.sampled_from([p for p in PRICES if p is not gold]))
    one, other = data.draw(st.sampled_from(gold)), data.draw(st.sampled_from(answers))
    assert score("numerical", one(n), dress(other(n))) == float(same)


# --------------------------------------------------------------------------- formulas

Formula = tuple[Callable[[int, int], str], ...]
FORMULAS: tuple[Formula, ...] = (
    (lambda a, b: f"\\frac{{{a}}}{{{b}}}", lambda a, b: f"{a}/{b}",
     lambda a, b: f"\\dfrac{{{3 * a}}}{{{3 * b}}}", lambda a, b: f"{a} / {b}"),
    (lambda a, b: f"{a}\\sqrt{{{b}}}", lambda a, b: f"\\sqrt{{{a * a * b}}}",
     lambda a, b: f"{a}√{b}", lambda a, b: f"{a} \\cdot {b}^{{1/2}}"),
    (lambda a, b: f"\\frac{{{a}\\pi}}{{{b}}}", lambda a, b: f"{a}π/{b}",
     lambda a, b: f"\\frac{{{a}}}{{{b}}}\\pi", lambda a, b: f"{2 * a}\\pi/{2 * b}"),
    (lambda a, b: f"{a} \\times 10^{{-{b}}}", lambda a, b: f"\\frac{{{a}}}{{10^{{{b}}}}}",
     lambda a, b: f"{a}e-{b}", lambda a, b: f"{10 * a}×10^-{b + 1}"),
)  # fmt: skip


def _value(formula: Formula, a: int, b: int) -> tuple[int, Fraction]:
    """What tells two of one kind apart."""
    at = FORMULAS.index(formula)
    return at, (Fraction(a, b), Fraction(a * a * b), Fraction(a, b), Fraction(a, 10**b))[at]


@PAIRS
@given(st.data(), st.sampled_from(FORMULAS), st.integers(2, 30), st.integers(2, 30),
       st.sampled_from(BARE + LATEX[:2] + ANNOUNCED[:2]))  # fmt: skip
def test_formulas(data: st.DataObject, formula: Formula, a: int, b: int, dress: Dress) -> None:
    one, other = (data.draw(st.sampled_from(formula)) for _ in range(2))
    assert score("numerical", one(a, b), dress(other(a, b))) == 1.0
    c, d = data.draw(st.sampled_from([(a + 1, b), (b, a), (10 * a, b), (a, b + 1)]))
    assume(_value(formula, a, b) != _value(formula, c, d))
    assert score("numerical", one(a, b), dress(other(c, d))) == 0.0
    assert score("numerical", one(a, b), dress(f"-{other(a, b)}")) == 0.0


# --------------------------------------------------------------------------- options

_THINGS = ("red car", "blue house", "a dog", "the man in black", "nothing", "12", "15 minutes",
           "she is happy", "绿色", "sad, but hopeful", "both of them", "Oslo", "1.5 m")  # fmt: skip
LISTS = st.lists(st.sampled_from(_THINGS), min_size=3, max_size=6, unique=True)
LETTERED: tuple[Callable[[str, str], str], ...] = (
    lambda letter, text: f"{letter}. {text}",
    lambda letter, text: f"({letter}) {text}",
    lambda letter, text: f"{letter}) {text}",
    lambda letter, text: f"{letter}: {text}",
    lambda letter, text: text,
)
NAMED: tuple[Callable[[str, str], str], ...] = (
    lambda letter, text: letter,
    lambda letter, text: letter.lower(),
    lambda letter, text: f"({letter})",
    lambda letter, text: f"{letter}.",
    lambda letter, text: f"{letter}. {text}",
    lambda letter, text: f"**{letter}.** {text}",
    lambda letter, text: f"({letter}) {text.upper()}",
    lambda letter, text: text,
    lambda letter, text: f'"{text}"',
    lambda letter, text: f"Option {letter}",
    lambda letter, text: f"option ({letter})",
    lambda letter, text: f"Option {letter}: {text}",
    lambda letter, text: f"选项{letter}",
    lambda letter, text: f"选{letter}",
)


@PAIRS
@given(st.data(), LISTS, st.sampled_from(LETTERED), DRESSES)
def test_options(data: st.DataObject, texts: list[str],
                 lettered: Callable[[str, str], str], dress: Dress) -> None:  # fmt: skip
    both = [("ABCDEF"[at], text) for at, text in enumerate(texts)]
    options = [lettered(*one) for one in both]
    right, wrong = data.draw(st.permutations(both))[:2]
    named, gold = data.draw(st.sampled_from(NAMED)), data.draw(st.sampled_from(NAMED[:9]))
    assert score("multiple choice", gold(*right), dress(named(*right)), options) == 1.0
    assert score("multiple choice", gold(*right), dress(named(*wrong)), options) == 0.0
    contradiction = f"{right[0]}. {wrong[1]}"
    for answer in (contradiction, f"not {right[0]}", f"{right[0]} or {wrong[0]}",
                   f"{wrong[0]}. {wrong[1]} {right[0]}. {right[1]}"):  # fmt: skip
        assert score("multiple choice", gold(*right), dress(answer), options) == 0.0


LISTED: tuple[Callable[[list[str]], str], ...] = (
    ", ".join, ",".join, " and ".join, "; ".join, "、".join, "/".join, "\n".join, str,
    lambda items: "[" + ", ".join(items) + "]",
    lambda items: "\n".join(f"- {item}" for item in items),
    lambda items: "\n".join(f"* **{item}**" for item in items),
    lambda items: "\n".join(f"{at}. {item}" for at, item in enumerate(items, 1)),
    lambda items: ", ".join(f"({item})" for item in items),
    lambda items: ", ".join(f"\\boxed{{{item}}}" for item in items),
    lambda items: "The answers are " + ", ".join(items[:-1]) + " and " + items[-1] + ".",
)  # fmt: skip
SEVERAL = st.lists(st.sampled_from("ABCDEF"), min_size=2, max_size=3, unique=True)
JOINED = st.sampled_from(LISTED)


@PAIRS
@given(st.data(), SEVERAL, JOINED, JOINED)
def test_sets_of_options(data: st.DataObject, right: list[str],
                         one: Callable[[list[str]], str],
                         other: Callable[[list[str]], str]) -> None:  # fmt: skip
    options = [f"{letter}. {text}" for letter, text in zip("ABCDEF", _THINGS, strict=False)]
    shuffled = data.draw(st.permutations(right))
    assert score("emer_ov_mc", one(right), other(list(shuffled)), options) == 1.0
    wrong = [letter for letter in "ABCDEF" if letter not in right]
    assert score("emer_ov_mc", one(right), other(wrong), options) == 0.0


# --------------------------------------------------------------------------- words

_FEELINGS = ("happy", "sad", "angry", "proud", "bored", "jealous", "grateful", "tired", "hopeful")
FEELINGS = st.lists(st.sampled_from(_FEELINGS), min_size=2, max_size=4, unique=True)


@PAIRS
@given(st.data(), FEELINGS, JOINED, JOINED)
def test_open_words(data: st.DataObject, right: list[str], one: Callable[[list[str]], str],
                    other: Callable[[list[str]], str]) -> None:  # fmt: skip
    shuffled = list(data.draw(st.permutations(right)))
    assert score("emer_ov", one(right), other(shuffled)) == 1.0
    assert score("emer_ov", one(right), other([word.upper() for word in shuffled])) == 1.0
    wrong = [word for word in _FEELINGS if word not in right]
    assert score("emer_ov", one(right), other(wrong)) == 0.0
    assert score("emer_ov", one(right), other([f"not {word}" for word in right])) == 0.0


YES = ("Yes", "yes", "YES.", "True", "true", "Correct", "是", "是的", "对", "正确", "Yes, he is.",
       "Yes, that is right", "是的，他在笑", "Yes!", "That is correct.")  # fmt: skip
NO = ("No", "no", "NO.", "False", "false", "Incorrect", "不是", "不", "错", "错误", "不对", "否",
      "No, he is not.", "No, that is wrong", "不是，他在哭", "Not true", "Not correct")  # fmt: skip
SIDE = st.sampled_from((YES, NO))


@PAIRS
@given(st.data(), SIDE, SIDE, DRESSES)
def test_yes_and_no(data: st.DataObject, right: tuple[str, ...], given_: tuple[str, ...],
                    dress: Dress) -> None:  # fmt: skip
    gold, answer = data.draw(st.sampled_from(right)), data.draw(st.sampled_from(given_))
    assert score("judge", gold, dress(answer)) == float(right is given_)


_SIGNS = ("no entry after dark", "OPEN 24 hours", "禁止入内", "出口 EXIT 右转", "Room 12B",
          "50% off", "$5 only", "Tel. 555-0100", "ห้ามเข้า", "C++ & Rust", "x_y")  # fmt: skip
SPACED: tuple[Callable[[str], str], ...] = (
    lambda text: text, lambda text: text.replace(" ", "  "), lambda text: text.replace(" ", "\n"),
    lambda text: f"“{text}”", lambda text: f'"{text}"',
)  # fmt: skip


@PAIRS
@given(st.data(), st.sampled_from(_SIGNS), st.sampled_from(SPACED), st.sampled_from(BARE + LATEX),
       st.sampled_from(["OCR", "free-form"]))  # fmt: skip
def test_text(data: st.DataObject, text: str, spaced: Callable[[str], str], dress: Dress,
              kind: str) -> None:  # fmt: skip
    assume(dress in BARE or not set("$%&_") & set(text))  # as is, no LaTeX
    assert score(kind, text, dress(spaced(text))) == 1.0
    wrong = data.draw(st.sampled_from(_SIGNS).filter(lambda other: other != text))
    assert score(kind, text, dress(spaced(wrong))) == 0.0


@PAIRS
@given(st.sampled_from(_SIGNS), st.sampled_from(ANNOUNCED))
def test_announced_text(text: str, dress: Dress) -> None:
    assume("\\" not in dress(text) or not set("$%&_") & set(text))
    assert score("OCR", text, dress(text)) == 1.0


@pytest.mark.parametrize("gold", ["no entry", "12 people"])
def test_a_sentence_is_no_answer_by_policy(gold: str) -> None:
    assert score("numerical", "12", f"I think that it says {gold}") == 0.0
