"""Trainers call rewards in ways of their own: verl's got no text that was known to be a completion,
so that none was probed, none was followed, and a reward of the wrong gold passed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from omni_grpo_core.doctor.probed import learned
from omni_grpo_core.recorder.plain import Plain
from omni_grpo_core.recorder.reward_arguments import Form, form_of
from omni_grpo_core.recorder.step_buffer import Bounds, StepBuffer
from omni_grpo_core.recorder.watch_rewards import RewardWatch
from omni_grpo_core.trace.calls import GenerateCall, RewardCall

SAID = ("<answer>B</answer>", "<answer>C</answer>")


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any) -> Any:
    return {"score": float(solution_str == f"<answer>{ground_truth}</answer>"), "acc": True}


def in_batches(
    data_sources: Sequence[str], solution_strs: Sequence[str], ground_truths: Sequence[str]
) -> list[float]:
    rows = zip(data_sources, solution_strs, ground_truths, strict=True)
    return [compute_score(kind, text, gold, {})["score"] for kind, text, gold in rows]


def of_two(shown: Sequence[str], gold: Sequence[str]) -> list[float]:
    return [float(f">{one}<" in text) for text, one in zip(shown, gold, strict=True)]


def sampled(*texts: str) -> GenerateCall:
    given: dict[str, Any] = dict.fromkeys(f.name for f in dataclasses.fields(GenerateCall))
    given |= {"decoded": {"kept": texts, "skipped": texts}}
    return GenerateCall(**given)


def recorded(function: Any, *calls: Mapping[str, Any], said: Sequence[str] = SAID) -> RewardCall:
    buffer = StepBuffer(Bounds(), Plain())
    buffer.add(sampled(*said))
    watch = RewardWatch([function], buffer, probing=True)
    for given in calls:
        watch.functions[0](**given)
    last = buffer.take()[0][-1].value
    assert isinstance(last, RewardCall)
    return last


def test_one_text_in_a_call() -> None:
    rows = zip(SAID, "BB", strict=True)
    calls = [
        {"data_source": "d", "solution_str": text, "ground_truth": gold, "extra_info": {"index": 1}}
        for text, gold in rows
    ]
    call = recorded(compute_score, *calls)
    assert call.completions == (SAID[1],)
    assert call.values == (0.0,)
    assert call.columns["ground_truth"] == "B"
    what = learned(call)
    assert (what.kind, what.form, what.top) == ("accuracy", "answer", 1.0)


def test_lists_of_another_name() -> None:
    given = {"data_sources": ["d"] * 2, "solution_strs": [*SAID], "ground_truths": ["B", "C"]}
    call = recorded(in_batches, given)
    assert call.completions == SAID
    assert call.values == (1.0, 1.0)
    assert "solution_strs" not in call.columns
    assert learned(call).kind == "accuracy"


def test_a_name_that_says_nothing_is_known_by_what_was_sampled() -> None:
    """Also with the prompt in front, in capitals or cut: these are faults of what is passed."""
    for changed in (SAID, [f"why? {text}" for text in SAID], [text.upper() for text in SAID],
                    [text[:11] for text in SAID]):  # fmt: skip
        call = recorded(of_two, {"shown": [*changed], "gold": ["B", "C"]})
        assert call.completions == tuple(changed)
    assert form_of({"gold": ["B", "C"]}, lambda: SAID) == Form("")
    assert form_of({"a": 1.0, "gold": None, "rows": [{"x": 1}]}, lambda: SAID) == Form("")


@pytest.mark.parametrize("value", ["yes", ["yes", "no"], [{"role": "assistant", "content": "yes"}]])
def test_the_name_tells_where_nothing_was_sampled(value: Any) -> None:
    form = form_of({"reference": value, "response": value}, tuple)
    assert form == Form("response", alone=value != ["yes", "no"])


def test_trl_s_own_name_asks_for_nothing() -> None:
    def never() -> Sequence[str]:
        raise AssertionError("reading what was sampled waits for the device")

    assert form_of({"completions": ["x"], "solution": ["y"]}, never) == Form("completions")


def test_tensors_of_one_number_are_numbers() -> None:
    def score(response: str) -> torch.Tensor:
        return torch.tensor(0.5)

    assert recorded(score, {"response": SAID[0]}).values == (0.5,)
