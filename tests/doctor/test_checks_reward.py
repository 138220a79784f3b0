"""Wrong rewards, found by their values and by probe completions of known score."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from small_recordings import case, found, rewarded, stepped

from omni_grpo_core.doctor.causes.reward import RULES
from omni_grpo_core.doctor.checks.reward import LOOKS, kind_of
from omni_grpo_core.doctor.evidence import Explanation
from omni_grpo_core.recorder.plain import Plain
from omni_grpo_core.recorder.probe import probe
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.format import Format

Function = Callable[..., Sequence[float | None]]


def probed(function: Any, name: str, values: Sequence[float | None] = (0.0,) * 4) -> Any:
    return rewarded(values, name=name, probe=probe(function, Plain()))


def causes(*values: Any) -> list[str]:
    """The causes of all looks' evidence, proved ones first."""
    recorded = case(*values)
    evidence = [item for look in LOOKS for item in look(recorded)]
    made: list[Explanation] = [e for rule in RULES for e in rule(recorded, evidence)]
    return [e.cause for e in sorted(made, key=lambda e: not e.proved)]


def test_the_built_in_rewards_are_no_evidence() -> None:
    for function, name in ((Format(), "format"), (Accuracy(), "accuracy")):
        call = probed(function, name)
        assert {e.origin for e in found(LOOKS, case(call)).values()} <= {"inherited"}


def test_a_function_s_name_shows_what_it_measures() -> None:
    names = {"format_reward": "format", "accuracy_reward": "accuracy", "people_focus": "other"}
    assert {name: kind_of(rewarded(name=name)) for name in names} == names


def test_the_full_reward_may_exceed_one() -> None:
    def accuracy_reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [2 * (v or 0.0) for v in Accuracy()(prompts, completions, **columns)]

    call = probed(accuracy_reward, "accuracy_reward")
    # rejecting a bare gold by raising is no fault
    assert found(LOOKS, case(call)) == {}


@pytest.mark.parametrize(
    ("values", "error", "fact"),
    [
        ((1.0, math.nan, 1.0, 1.0), None, "not-a-number"),
        ((None,) * 4, None, "never-scored"),
        ((1.0, 1.0), None, "count-differs"),
        ((), "KeyError: 'solution'", "raised"),
    ],
)
def test_values_that_are_no_rewards(values: tuple[Any, ...], error: str | None, fact: str) -> None:
    assert set(found(LOOKS, case(rewarded(values, error=error)))) == {fact}


def _floor(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [max(0.1, 0.5 * ("man" in text)) for text in completions]


def _swallowed(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [0.0 for _ in completions]


def _first_row(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    kind = [columns["problem_type"][0]] * len(completions)
    values: list[float | None] = []
    for at, text in enumerate(completions):
        own = {"options": [columns["options"][at]], "solution": [columns["solution"][at]]}
        try:
            values += Accuracy()([prompts[at]], [text], problem_type=[kind[at]], **own)
        except Exception:
            values.append(0.0)
    return values


@pytest.mark.parametrize(
    ("function", "name", "cause"),
    [
        (_floor, "people_focus", "reward.floor"),
        (_swallowed, "accuracy", "reward.swallowed"),
        (_first_row, "accuracy", "reward.first-type"),
    ],
)
def test_a_cause_is_named(function: Function, name: str, cause: str) -> None:
    assert causes(probed(function, name))[0] == cause


def test_a_function_that_raises_is_not_judged_by_its_other_scores() -> None:
    def accuracy(prompts: Any, completions: Any, **columns: Any) -> Any:
        if "OCR" in columns["problem_type"]:
            raise ModuleNotFoundError("No module named 'jiwer'")
        return Accuracy()(prompts, completions, **columns)

    assert causes(probed(accuracy, "accuracy")) == ["reward.raised"]


def test_a_judge_that_is_down_and_one_whose_reply_cannot_be_parsed() -> None:
    zero = rewarded((0.0,) * 4, name="context_judge")
    down = stepped(warnings=("judge request failed: connection refused",))
    assert causes(zero, down)[0] == "reward.judge-down"
    unread = stepped(warnings=("cannot read the judge's reply '5 points'",))
    assert causes(zero, unread)[0] == "reward.judge-format"


def test_a_constant_for_equal_completions_is_right() -> None:
    same = rewarded((0.5,) * 4, name="length", completions=("one",) * 4)
    assert found(LOOKS, case(same)) == {}


def test_malformed_completions_are_inherited() -> None:
    call = rewarded((0.0,) * 4, name="format")
    evidence = found(LOOKS, case(call))["all-malformed"]
    assert (evidence.stage, evidence.origin) == ("parsed", "inherited")
