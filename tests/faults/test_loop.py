"""The clean loop is a correct trainer: what a fault changes must be right beforehand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.faults.config import ROWS, LoopAudio, LoopConfig
from omni_grpo_core.faults.makes import MAKES
from omni_grpo_core.faults.reference_loop import ReferenceLoop
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.trace.calls import AdvantageSeen, LossSeen, SamplesSeen

VARIED = LoopConfig()


class Notes(list[Any]):
    def note(self, value: Any) -> None:
        self.append(value)

    def only(self, kind: type) -> list[Any]:
        return [value for value in self if isinstance(value, kind)]


@pytest.mark.parametrize("audio", get_args(LoopAudio))
def test_greedy_answers_are_right_in_a_batch_of_every_kind(
    policy: Policy, audio: LoopAudio
) -> None:
    rows = tuple(sorted({row for rows in ROWS[audio].values() for row in rows}))
    loop = ReferenceLoop(policy, LoopConfig(audio=audio, rows=rows, max_new_tokens=64))
    answers = loop.answers()
    columns = loop.columns(loop.draw(0))
    assert Accuracy()(answers, answers, **columns) == [1.0] * len(rows)


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"lora": True, "beta": 0.04},
    {"checkpointing": True, "beta": 0.04},
    {"partial": True},
    {"accumulation": 2, "loss_type": "dapo"},
)


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_a_step_in_every_training_setting(policy: Policy, changes: dict[str, Any]) -> None:
    config = replace(VARIED, **changes)
    notes = Notes()
    loop = ReferenceLoop(policy, config)
    before = [p.detach().clone() for p in loop.model.parameters() if p.requires_grad]
    outcome = loop.step(notes)
    after = [p.detach() for p in loop.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert len(notes.only(SamplesSeen)) == len(notes.only(AdvantageSeen)) == config.accumulation
    losses = notes.only(LossSeen)
    assert [seen.loss for seen in losses] == list(outcome.losses)
    assert all(seen.requires_grad for seen in losses)
    assert any(seen.advantages.any() for seen in losses)
    if config.beta:
        # the reference is the policy before its first step: equal up to summation order
        gap = (losses[0].ref_logprobs - losses[0].logprobs).abs().max()
        assert gap < 1e-4
    assert loop.model.training


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        pytest.param(
            make,
            changes,
            id=f"{make}-{changes}",
            marks=() if changes == SETTINGS[-1] else pytest.mark.slow,
        )
        for make in ("per-prompt", "buffered", "experience")
        for changes in SETTINGS
    ],
)
def test_loops_of_other_makes_step_in_every_setting(
    policy: Policy, make: str, changes: dict[str, Any]
) -> None:
    """The loop that takes a prompt at a time joined the masks of two rollouts of other width:
    "Sizes of tensors must match", and five runs of the campaign were lost."""
    loop = MAKES[make].build(policy, replace(VARIED, group_size=2, **changes))
    before = [p.detach().clone() for p in loop.model.parameters() if p.requires_grad]
    outcome = loop.step()
    after = [p.detach() for p in loop.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (
        len(outcome.rewards)
        == len(outcome.texts)
        == 2 * len(VARIED.rows) * (changes.get("accumulation", 1))
    )


def test_a_replaced_method_is_restored_even_after_an_error(policy: Policy) -> None:
    loop = ReferenceLoop(policy, VARIED)

    def failing() -> None:
        with loop.replaced(repeat=lambda values: values):
            assert loop.repeat([1]) == [1]
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        failing()
    assert loop.repeat([1]) == [1] * VARIED.group_size


def test_only_methods_of_the_loop_can_be_replaced(policy: Policy) -> None:
    with pytest.raises(AttributeError), ReferenceLoop(policy, VARIED).replaced(reapeat=list):
        pass


def test_the_given_policy_is_not_trained(policy: Policy) -> None:
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    ReferenceLoop(policy, VARIED).step()
    after = policy.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not policy.model.training


def test_a_policy_in_another_dtype_is_rejected(policy: Policy) -> None:
    with pytest.raises(ConfigError, match="found a policy in float32, wanted bfloat16"):
        ReferenceLoop(policy, LoopConfig(dtype="bfloat16"))


def test_the_same_seed_gives_the_same_step(policy: Policy) -> None:
    one, other = (ReferenceLoop(policy, VARIED).step() for _ in range(2))
    assert one == other
