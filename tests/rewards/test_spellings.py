"""Right answers as people and models write them, and wrong ones that look alike.

The cases were collected from public reports of people who train on such data, each with the value
that is right; neighbours of them are generated in ``properties/test_spelling_properties.py``.
"""

from __future__ import annotations

import pytest

from omni_grpo_core.errors import DataError
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.parse import render

OPTIONS = ["A. Red", "B. Blue", "C. Green"]


def score(kind: str, gold: str, answer: str, options: list[str] = OPTIONS) -> float | None:
    [value] = Accuracy()(
        ["q"],
        [render("c", "t", answer)],
        problem_type=[kind],
        options=[options],
        solution=[f"<answer>{gold}</answer>"],
    )
    return value


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        # markup
        ("73", "**73**"),
        ("12", "$x = 12$"),
        ("5", r"5\text{ cm}"),
        ("12", r"\[ x = 12 \]"),
        ("12", r"$\boxed{12}$"),
        ("12", r"\(\boxed{\textbf{12}}\)"),
        ("1000", r"1{,}000"),
        ("1000", r"1\,000"),
        ("12", "`12`"),
        ("12", "The answer is **12**."),
        ("12", "答案：12"),
        ("0.5", r"$\dfrac{1}{2}$"),
        # golds
        (r"45^\circ", "45°"),
        (r"45^\circ", "45 degrees"),
        (r"5\text{ cm}", "5 cm"),
        ("5 m²", "5 m^2"),
        ("5 m²", "5 square meters"),
        ("5 m²", "5平方米"),
        ("5 km/h", "5 kilometers per hour"),
        ("π", r"\pi"),
        ("π", "pi"),
        ("π/2", r"\frac{\pi}{2}"),
        # units and scales
        ("7 seconds", "7 s"),
        ("5 km", "5 kilometers"),
        ("5 km", "5公里"),
        ("2000000", "2 million"),
        ("20000", "2万"),
        ("25000", "2万5千"),
        ("5", "五"),
        ("25", "二十五"),
        ("105", "一百零五"),
        ("2026", "二〇二六"),
        ("5", "five"),
        ("21", "twenty-one"),
        ("105", "one hundred and five"),
        ("12", "a dozen"),
        ("5", "٥"),
        ("12", "१२"),
        ("50%", "百分之五十"),
        ("73", "#### 73"),
        ("12", "= 12"),
        ("3", "three (3)"),
        ("0.5", "half"),
        ("2 kg", "2千克"),
        ("120 bpm", "120 beats per minute"),
        (r"2^\circ\text{C}", "2 °C"),
        (r"2\sqrt{2}", r"2 \cdot 2^{1/2}"),
        ("5", "I think the answer is 5."),
        ("$5", "5 dollars"),
        ("$5", "US$5"),
        ("$5", r"\$5"),
        ("5 yuan", "¥5"),
        ("5 m", "5"),
        ("10^20", r"10^{20}"),
        ("100000000000000000000", r"10^{20}"),
    ],
)
def test_the_same_number(gold: str, answer: str) -> None:
    assert score("numerical", gold, answer) == 1.0
    assert score("numerical", answer, gold) == 1.0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("10^{20}", r"\frac{1}{10^{21}}"),
        (r"\frac{1}{10^{20}}", r"\frac{1}{10^{21}}"),
        (r"\sqrt{2}", "1.4"),
        ("100000000000000000001", "10^{20}"),
        ("$5", "€5"),
        ("5 dollars", "5 euros"),
        ("5 seconds", "5 minutes"),
        ("5 s", "5 ms"),
        ("5 m", "5 m²"),
        ("5 km/h", "5 m/s"),
        ("5 m/s", "5 m/s²"),
        ("2000000", "2 billion"),
        ("20000", "2千"),
        ("5", "五十"),
        ("21", "twelve"),
        ("12", "x = 13"),
        ("5", r"\boxed{6}"),
        ("5", "minus five"),
        # policy: units are not converted
        ("5 m/s", "18 km/h"),
    ],
)
def test_other_numbers(gold: str, answer: str) -> None:
    assert score("numerical", gold, answer) == 0.0
    assert score("numerical", answer, gold) == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "five or six",
        "not 5",
        "five (6)",
        "There are no 5",
        "I count five of them on the left",
    ],
)
def test_no_number(answer: str) -> None:
    assert score("numerical", "5", answer) == 0.0
    with pytest.raises(DataError):
        score("numerical", answer, "5")


@pytest.mark.parametrize(
    "answer",
    ["**A**", "Option A", r"\boxed{A}", "$A$", "**A.** Red", "The answer is A.", "Answer: (A)",
     "The correct option is **A**", r"\text{A}", r"$\boxed{\text{A}}$", "选A", "答案是A。",
     "选项 A", "`A`", '"Red"', "**Red**", "A. **Red**", "Choice A: red", "<b>A</b>", "option a)",
     "The correct answer is A. Red"],
)  # fmt: skip
def test_the_same_option(answer: str) -> None:
    assert score("multiple choice", "A", answer) == 1.0
    assert score("multiple choice", "B", answer) == 0.0


@pytest.mark.parametrize(
    "answer",
    ["Option B", "**B**", "Option A or B", "The answer is not A", "答案不是A", r"\boxed{A, B}",
     "Option", "None of the options", "**Option**", "A. Blue"],
)  # fmt: skip
def test_another_option(answer: str) -> None:
    assert score("multiple choice", "A", answer) == 0.0


@pytest.mark.parametrize(
    "answer",
    ["['A', 'C']", '["A","C"]', "{A, C}", "[A, C]", "(A), (C)", "**A**, **C**", "- A\n- C",
     "1. A\n2. C", r"\boxed{A, C}", r"\boxed{A},\boxed{C}", "A/C", "AC", "A and C",
     "Options A and C", "Option A, Option C", "A. Red\nC. Green", "选A和C", "The answers are A, C"],
)  # fmt: skip
def test_the_same_set_of_options(answer: str) -> None:
    assert score("emer_ov_mc", "A,C", answer) == 1.0
    assert score("emer_ov_mc", "B", answer) == 0.0


@pytest.mark.parametrize(
    ("options", "gold", "answers"),
    [
        (["Red", "Blue"], "Blue", ("B", "blue", "(B)")),
        (["Red", "Blue"], "B", ("B", "Blue")),
        (["1. Red", "2. Blue"], "2", ("2", "Blue", "2. Blue", "(2)")),
        (["1. Red", "2. Blue"], "Blue", ("2", "blue")),
        (["A. 12", "B. 15"], "15", ("B", "15", "B. 15")),
        (["12", "15"], "15", ("B", "15")),
        (["Option one", "Option two"], "Option two", ("B", "option two", "Option B")),
        (["A. the red car", "B. the answer is unknown"], "B", ("B", "the answer is unknown")),
    ],
)
def test_options_however_they_are_lettered(
    options: list[str], gold: str, answers: tuple[str, ...]
) -> None:
    for answer in answers:
        assert score("multiple choice", gold, answer, options) == 1.0


@pytest.mark.parametrize(
    ("yes", "no"),
    [
        ("Yes", "No"), ("True", "False"), ("正确", "错误"), ("对", "错"), ("是的", "不是"),
        ("**Yes**", "**No**"), ("Correct", "Incorrect"), (r"\boxed{Yes}", r"\boxed{No}"),
        ("The answer is yes", "The answer is no"), ("true.", "not true"), ("Y", "N"),
        ("Yes - he is", "It is false"), ("The answer is 是的，他在笑.", "✗"),
        ("Yes, he is.", "No, he is not."), ("答案：对", "答案：不对"), ("有", "没有"),
    ],
)  # fmt: skip
def test_the_same_verdict(yes: str, no: str) -> None:
    for gold in ("Yes", "True", "对", yes):
        assert score("judge", gold, yes) == 1.0
        assert score("judge", gold, no) == 0.0
    for gold in ("No", "False", "错", no):
        assert score("judge", gold, no) == 1.0
        assert score("judge", gold, yes) == 0.0


@pytest.mark.parametrize(
    ("gold", "answer", "value"),
    [
        ("中文abc", "中文 abc", 1.0),
        ("a long english line 中文", "a long english line中文", 1.0),
        ("no entry", "**no entry**", 1.0),
        ("no entry", "“no entry”", 1.0),
        ("It's open", "It’s open", 1.0),
        ("a_b_c", "The answer is a_b_c.", 1.0),
        ("the end.", "The answer is the end.", 1.0),
        ("no entry", r"\boxed{no entry}", 1.0),
        ("no entry", "The answer is: no entry", 1.0),
        ("**", "**", 1.0),
        ("$5 only", "$5 only", 1.0),
        # what a sign says is to be read: the words before the colon too
        ("Answer: 42", "42", 0.5),
        ("Answer: 42", "Answer: 42", 1.0),
        ("no entry", "no exit", 0.5),
    ],
)
def test_text_that_was_read(gold: str, answer: str, value: float) -> None:
    assert score("OCR", gold, answer) == value


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("happy, anxious", "['happy', 'anxious']"),
        ("happy, anxious", "- **happy**\n- **anxious**"),
        ("happy, anxious", "1. happy\n2. anxious"),
        ("happy, anxious", "The answer is happy and anxious."),
    ],
)
def test_the_same_words(gold: str, answer: str) -> None:
    assert score("emer_ov", gold, answer) == 1.0
