"""From recorded values to the named cause: whole diagnoses of hand-written steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_recordings import EVAL, advantaged, case, generated, lost, rewarded, samples, stepped

from omni_grpo_core.doctor.diagnose import diagnose

TRAINING = replace(EVAL, training=True, checkpointing=True)
OLD = torch.full((4, 3), 1 / 3).log()
SAME = ((5, 6, 9), (5, 6, 9), (7, 8, 9), (7, 8, 9))
DAPO = {"loss_type": "dapo"}


@pytest.mark.parametrize(
    ("cause", "values"),
    [
        ("gen.checkpointing-train", [generated(cached=(0, 0), modes=TRAINING)]),
        ("gen.history-lost", [generated(cached=(0, 0))]),
        ("gen.no-eos", [generated(config={"eos_token_id": None})]),
        ("gen.topk", [generated(config={"top_p": 0.9})]),
        ("gen.repetition-penalty", [generated(config={"repetition_penalty": 1.3})]),
        ("gen.identical", [generated(completions=SAME, config={"do_sample": False}),
                           advantaged()]),
        ("gen.group-order", [samples(), generated(prompts=(0, 1, 0, 1)), rewarded(),
                             advantaged()]),
        ("reward.by-position", [samples(), generated(), advantaged(),
                                rewarded(columns={"sample_id": ["b", "b", "a", "a"]})]),
        ("reward.nan", [rewarded((1.0, float("nan"), 2.0, 0.0))]),
        ("adv.group-mixed", [samples(), generated(), rewarded(),
                             advantaged(group_ids=("a", "b", "a", "b"))]),
        ("adv.zero-variance", [rewarded(), advantaged((0.0,) * 4, rewards=(0.0,) * 4,
                                                      weights={"length": 0.0})]),
        ("adv.batch-scale", [advantaged((0.25, -0.75, 1.25, -0.75), scale="none")]),
        ("loss.sign", [lost(0.2, settings=DAPO)]),
        ("loss.normaliser", [lost(-0.2)]),
        ("loss.after-eos", [generated(), lost(0.0, mask=((1, 1, 1),) * 4)]),
        ("loss.hidden-beta", [lost(0.0, ref=OLD)]),
        ("loss.old-recomputed", [lost(0.0, settings={"num_iterations": 2})]),
        ("step.detached", [lost(0.5, requires_grad=False), stepped()]),
        ("step.frozen-wrong", [stepped(trainable={"vision": 5})]),
        ("step.not-updated", [stepped(held={"text": 0, "head": 10})]),
        ("step.accumulation", [stepped(settings={"gradient_accumulation_steps": 4})]),
        ("step.nan-gradient", [stepped(norms={"text": float("nan")})]),
    ],
)  # fmt: skip
def test_the_likeliest_cause(cause: str, values: list[Any]) -> None:
    verdict = diagnose(case(*values))
    named = [finding.causes[0] for finding in verdict.findings if finding.causes]
    assert cause in [explanation.cause for explanation in named]
    for explanation in named:
        texts = (explanation.seen, explanation.harm, explanation.fix, explanation.confirm)
        assert all("unknown)" not in text for text in texts), "a value that was not recorded"
        assert all("{" not in text for text in texts)
    assert not [note for note in verdict.missing if "failed on this recording" in note]


def test_without_causes_the_stage_is_still_named() -> None:
    verdict = diagnose(case(generated(cached=(0, 0), modes=TRAINING)), causes=False)
    assert [finding.stage for finding in verdict.findings] == ["completion"]
    assert verdict.findings[0].causes == ()


def test_an_inherited_error_is_not_blamed() -> None:
    """Equal rewards for equal answers: the group has no signal, which is the rollout's fault."""
    flat = advantaged((0.0,) * 4, rewards=(1.0,) * 4)
    call = generated(completions=SAME, config={"do_sample": False})
    verdict = diagnose(case(call, rewarded((1.0,) * 4), flat))
    assert [finding.stage for finding in verdict.findings] == ["completion"]
    assert verdict.state("advantage") == "inherited"
