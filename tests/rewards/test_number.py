from __future__ import annotations

import pytest

from omni_grpo_core.errors import DataError
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.parse import render


def score(kind: str, gold: str, answer: str) -> float | None:
    [value] = Accuracy()(
        ["q"],
        [render("c", "t", answer)],
        problem_type=[kind],
        solution=[f"<answer>{gold}</answer>"],
    )
    return value


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1000", "1,000"),
        ("1,000", "1000"),
        ("1000", "1 000"),
        ("1000", "１０００"),
        ("3", "3.0"),
        ("3.0", "3"),
        ("3", "3."),
        ("3", " 3 "),
        ("3", "+3"),
        ("-3", "−3"),
        ("0.5", ".5"),
        ("0.5", "1/2"),
        ("1/2", "0.5"),
        ("0.5", "½"),
        ("1.5", "1 1/2"),
        ("0.5", "50%"),
        ("50%", "0.5"),
        ("50%", "50"),
        ("50", "50 percent"),
        ("1200", "1.2e3"),
        ("1200", "1.2 × 10^3"),
        ("1200", "1.2*10^{3}"),
        ("0.0012", "1.2×10⁻³"),
        ("5", "$5"),
        ("5", "$5$"),
        ("3", "3 people"),
        ("5 cm", "5"),
        ("5 cm", "5cm"),
        ("1/3", "0.333"),
        ("3.14159", "3.14"),
        ("0.5", "\\frac{1}{2}"),
        ("\\frac{1}{2}", "0.5"),
        ("\\sqrt{2}", "2^{1/2}"),
        ("3", "\\boxed{3}"),
    ],
)
def test_the_same_number_however_it_is_written(gold: str, answer: str) -> None:
    assert score("numerical", gold, answer) == 1.0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "6"),
        ("5", "-5"),
        ("5", "5 or 6"),
        ("5", "between 4 and 6"),
        ("5", "1 2 3 4 5 6 7 8 9"),
        ("5", "1,2,3,4,5"),
        ("5", "fife"),
        ("5", "5 thousand"),
        ("5 cm", "5 m"),
        ("5", "None"),
        ("5", "nan"),
        ("5", "inf"),
        ("5", "5/0"),
        ("0.5", "0.5%"),
        ("0.001", "0.00"),
        ("0.005", "0.01"),
        ("1000", "1,0000"),
        ("5", "9^{9^{9}}"),
        ("5", "9^{9*999*999}"),
        ("5", "9999999999999999999999999999999999^{99}"),
        ("5", "9" * 10_000),
        ("5", "1e999999999"),
        ("5", "\\sum_{i=1}^{999} i"),
    ],
)
def test_other_numbers_and_other_text_earn_nothing(gold: str, answer: str) -> None:
    assert score("numerical", gold, answer) == 0.0


@pytest.mark.parametrize("kind", ["numerical", "regression"])
@pytest.mark.parametrize("gold", ["a few", "None", "nan", "5 or 6", "1/0", "0/0"])
def test_a_gold_that_is_not_a_number_is_a_data_error(kind: str, gold: str) -> None:
    with pytest.raises(DataError, match=r"row 0: found gold answer .* wanted a number"):
        score(kind, gold, "5")


@pytest.mark.parametrize(
    ("gold", "answer", "value"),
    [
        ("10", "10", 1.0),
        ("10", "9", 0.9),
        ("10", "11.0", 0.9),
        ("10", "20", 0.0),
        ("10", "-10", 0.0),
        ("-4", "-3", 0.75),
        ("1,000", "750", 0.75),
        ("0", "0.0", 1.0),
        ("0", "0.1", 0.0),
        ("40%", "30", 0.75),
        ("40%", "0.3", 0.75),
        ("10", "ten", 1.0),
        ("10", "some", 0.0),
        ("10", "10 thousand", 0.0),
        ("10", "9 or 10", 0.0),
        ("10", "1e308", 0.0),
    ],
)
def test_regression_pays_one_minus_the_relative_error(gold: str, answer: str, value: float) -> None:
    assert score("regression", gold, answer) == value


def test_works_outside_the_main_thread() -> None:
    """math-verify's own time limit is an alarm signal, which raises in any other thread."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(score, "numerical", "0.5", "\\frac{1}{2}").result() == 1.0
