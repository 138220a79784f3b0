from __future__ import annotations

import pytest

from omni_grpo_core.errors import DataError
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.parse import render
from omni_grpo_core.types import Score

EMOTIONS = ["A. Urgent", "B. Calm", "C. Sad, but hopeful", "D. Plan B", "E. Joy"]


def score(kind: str, gold: str, answer: str, options: list[str]) -> Score:
    [result] = Accuracy().explain(
        ["q"],
        [render("c", "t", answer)],
        problem_type=[kind],
        options=[options],
        solution=[f"<answer>{gold}</answer>"],
    )
    return result


@pytest.mark.parametrize(
    "answer",
    ["A", "a", "(A)", "A.", "A)", "(a).", "[A]", "Ａ", "A、",
     "A. Urgent", "(A) urgent", "A: Urgent.", "Urgent", "urgent."],
)  # fmt: skip
@pytest.mark.parametrize("options", [EMOTIONS, [text[3:] for text in EMOTIONS]])
@pytest.mark.parametrize("gold", ["A", "A.", "A. Urgent", "Urgent"])
def test_every_way_to_name_the_right_option(answer: str, options: list[str], gold: str) -> None:
    assert score("multiple choice", gold, answer, options).value == 1.0


@pytest.mark.parametrize(
    "answer",
    ["B", "F", "A or B", "A, B", "A. Calm", "AA", "Answer", "A urgent plan",
     "not A", "Urge", ".", "A. Urgent B. Calm"],
)  # fmt: skip
def test_another_or_no_option_earns_nothing(answer: str) -> None:
    assert score("multiple choice", "A", answer, EMOTIONS).value == 0.0


@pytest.mark.parametrize(
    ("answer", "value"),
    [("A. Urgent", 1), ("A", 1), ("A. or B. or C.", 0), ("A. Urgent B. Calm", 0), ("B. Urgent", 0)],
)
def test_without_options_the_label_decides_but_hedging_does_not(answer: str, value: int) -> None:
    assert score("multiple choice", "A", answer, []).value == value


def test_an_option_text_that_two_options_share_names_neither() -> None:
    assert score("multiple choice", "A", "red", ["A. red", "B. red"]).value == 0.0


def test_the_reason_names_answer_and_gold() -> None:
    assert score("multiple choice", "A", "b", EMOTIONS).reason == "answer B, gold A"


def test_a_gold_outside_the_options_is_a_data_error() -> None:
    with pytest.raises(DataError, match=r"row 0: found gold answer 'F'.*one of the 5 options"):
        score("multiple choice", "F", "A", EMOTIONS)


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("A,E", 1.0),
        ("E, A", 1.0),
        ("a；e", 1.0),
        ("A E", 1.0),
        ("AE", 1.0),
        ("A. Urgent, E. Joy", 1.0),
        ("joy and urgent", 1.0),
        ("(A), (E).", 1.0),
        ("A, A, E, E", 1.0),
        ("A", 2 / 3),  # precision 1, recall 1/2
        ("A,B", 1 / 2),
        ("A,B,C,D,E", 4 / 7),
        ("A,E,F", 4 / 5),  # F is not an option of the row: a wrong piece
        ("A,E,x,y", 4 / 6),
        ("none of them", 0.0),
    ],
)
def test_sets_are_scored_by_f1(answer: str, value: float) -> None:
    assert score("emer_ov_mc", "A, E", answer, EMOTIONS).value == value


def test_a_comma_inside_an_option_does_not_split_it() -> None:
    assert score("emer_ov_mc", "C,A", "Urgent, sad, but hopeful", EMOTIONS).value == 1.0


def test_a_gold_set_with_an_unknown_option_is_a_data_error() -> None:
    with pytest.raises(DataError, match="labels or texts of the row's options"):
        score("emer_ov_mc", "A, Z", "A", EMOTIONS)
