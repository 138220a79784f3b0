from __future__ import annotations

import pytest

from omni_grpo_core.errors import RewardError
from omni_grpo_core.rewards.format import Format

GOOD = "<context>c</context><think>t</think><answer>A</answer>"


def test_exact_structure_and_nothing_else_earns_one() -> None:
    scores = Format()(["q"] * 3, [GOOD, "A", GOOD + " bye"])
    assert scores == [1.0, 0.0, 0.0]


def test_plain_and_conversational_completions_score_the_same() -> None:
    spoken = [{"role": "assistant", "content": GOOD}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}]
    assert Format()(["q"] * 3, [GOOD, spoken, parts]) == [1.0, 1.0, 1.0]


def test_the_trainers_own_keywords_are_ignored() -> None:
    extras = {"completion_ids": [[1, 2]], "trainer_state": object(), "log_extra": print}
    assert Format()(prompts=["q"], completions=[GOOD], **extras) == [1.0]


@pytest.mark.parametrize(
    ("completion", "thirds"),
    [
        (GOOD, 3),
        (GOOD + " bye", 2),
        ("<context>c</context><think>t</think>", 2),
        ("<think>t</think>", 1),
        ("<context>c</context><context>d</context>", 0),
        ("<answer>A</answer><context>c</context>", 1),
        ("<context></context><think> </think>", 0),
        ("<context><think>t</think></context>", 1),
        ("A", 0),
    ],
)
def test_graded_pays_a_third_for_each_whole_section_in_order(completion: str, thirds: int) -> None:
    assert Format(graded=True)(["q"], [completion]) == [thirds / 3]


def test_a_completion_that_is_not_text_is_a_broken_contract() -> None:
    with pytest.raises(RewardError, match="completion 1: found int"):
        Format()(["q", "q"], [GOOD, 7])  # type: ignore[list-item]


def test_a_wrong_number_of_prompts_is_rejected() -> None:
    with pytest.raises(RewardError, match="'prompts': found 1 values, wanted a list of 2"):
        Format()(["q"], [GOOD, GOOD])
