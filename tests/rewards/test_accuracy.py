from __future__ import annotations

from collections.abc import Sequence

import pytest

from omni_grpo_core.errors import DataError, RewardError
from omni_grpo_core.rewards import Reward, RewardRow
from omni_grpo_core.rewards.accuracy import MEASURES, Accuracy
from omni_grpo_core.rewards.parse import Gold, render
from omni_grpo_core.types import PROBLEM_TYPES, Score

RIGHT = render("c", "t", "A")
OPTIONS = ["A. red", "B. blue"]


def test_every_problem_type_has_a_measure() -> None:
    assert set(MEASURES) == set(PROBLEM_TYPES)


def test_each_row_is_scored_by_its_own_type() -> None:
    values = Accuracy()(
        ["q"] * 3,
        [render("c", "t", "1,000"), RIGHT, render("c", "t", "yes")],
        problem_type=["numerical", "multiple choice", "judge"],
        options=[[], OPTIONS, None],
        solution=["<answer>1000</answer>", "<answer>A</answer>", "<answer>no</answer>"],
    )
    assert values == [1.0, 1.0, 0.0]


def test_a_malformed_completion_earns_nothing_and_says_why() -> None:
    [score] = Accuracy().explain(
        ["q"], ["A"], problem_type=["multiple choice"], solution=["<answer>A</answer>"]
    )
    assert score == Score(0.0, "malformed: text outside the tags: 'A' at 0")


@pytest.mark.parametrize(
    "solution",
    ["A", "", "<answer></answer>", "<answer> \n</answer>", "<answer>A", "<ANSWER>A</ANSWER>",
     "<answer>A</answer><answer>B</answer>",
     "<think><answer>A</answer></think>", "<think>t</think>"],
)  # fmt: skip
@pytest.mark.parametrize("completion", [RIGHT, "", "garbage"])
@pytest.mark.parametrize("kind", PROBLEM_TYPES)
def test_a_gold_without_an_answer_is_a_data_error_naming_the_row(
    kind: str, completion: str, solution: str
) -> None:
    with pytest.raises(DataError, match=r"row 1 \(sample_id 'clip7'\): found gold"):
        Accuracy()(
            ["q", "q"],
            [RIGHT, completion],
            sample_id=["clip6", "clip7"],
            problem_type=["multiple choice", kind],
            solution=["<answer>A</answer>", solution],
        )


@pytest.mark.parametrize(
    "solution", [RIGHT, "<think>t</think><answer>A</answer>", " <answer>A</answer>\n"]
)
def test_a_gold_may_leave_context_and_think_out(solution: str) -> None:
    assert Accuracy()(["q"], [RIGHT], problem_type=["multiple choice"], solution=[solution]) == [
        1.0
    ]


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"solution": ["<answer>A</answer>"]}, "wanted a column 'problem_type'"),
        ({"problem_type": ["multiple choice"]}, "wanted a column 'solution'"),
        ({"problem_type": ["essay"], "solution": ["<answer>A</answer>"]},
         "found problem_type 'essay'"),
        ({"problem_type": ["judge"], "solution": [7]}, "found solution of type int"),
        (
            {"problem_type": ["multiple choice"], "solution": ["<answer>A</answer>"],
             "options": ["A. x"]},
            "found options 'A. x'",
        ),
    ],
)  # fmt: skip
def test_a_broken_row_is_a_data_error(columns: dict[str, list[object]], match: str) -> None:
    with pytest.raises(DataError, match=match):
        Accuracy()(["q"], [RIGHT], **columns)


def test_a_short_column_is_rejected() -> None:
    with pytest.raises(RewardError, match="column 'solution': found 1 values, wanted a list of 2"):
        Accuracy()(
            ["q"] * 2, [RIGHT] * 2, problem_type=["judge"] * 2, solution=["<answer>A</answer>"]
        )


def test_a_measure_can_be_replaced() -> None:
    def strict(row: RewardRow, truth: Gold, answer: str) -> Score:
        return Score(float(answer == truth.answer), "literal")

    columns = {"problem_type": ["multiple choice"], "solution": ["<answer>A</answer>"]}
    assert Accuracy({"multiple choice": strict})(["q"], [render("c", "t", "a")], **columns) == [0.0]


class Batching(Reward):
    """A judge that records how many rows it was given at once."""

    def __init__(self) -> None:
        super().__init__("judge")
        self.batches: list[list[int]] = []

    def score_rows(self, rows: Sequence[RewardRow]) -> list[Score]:
        self.batches.append([row.index for row in rows])
        return [Score(row.index / 10, "judged") for row in rows]

    def score(self, row: RewardRow) -> Score:
        raise AssertionError("a judge is asked for all rows at once")


def test_a_configured_judge_gets_its_rows_together() -> None:
    judge = Batching()
    values = Accuracy(judge=judge)(
        ["q"] * 4,
        [RIGHT] * 4,
        problem_type=["free-form", "multiple choice", "emer_ov", "free-form"],
        solution=["<answer>A</answer>"] * 4,
    )
    assert values == [0.0, 1.0, 0.2, 0.3]
    assert judge.batches == [[0, 2, 3]]
