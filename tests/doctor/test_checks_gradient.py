"""What is trainable, held by the optimizer, changed: hand-written optimizer steps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_recordings import case, found, generated, lost, samples, stepped

from omni_grpo_core.doctor.checks import run as checks_run
from omni_grpo_core.doctor.checks.gradient import LOOKS


def facts(*values: Any) -> set[str]:
    return set(found(LOOKS, case(*values)))


def test_a_healthy_step_is_no_evidence() -> None:
    assert facts(lost(0.5), stepped()) == set()
    assert facts(lost(0.5), stepped(trainable={"adapter": 8})) == set()
    # a part with zero gradient need not change; towers may be trained with the text model
    norms, still = {"text": 0.5, "vision": 0.0}, {"text": True, "vision": False}
    towers = stepped(trainable={"text": 9, "vision": 9}, norms=norms, changed=still)
    assert facts(lost(0.5), towers) == set()


@pytest.mark.parametrize(
    ("fact", "step"),
    [
        ("nothing-trainable", stepped(trainable={}, norms={})),
        ("no-gradient", stepped(norms={"text": 0.0})),
        ("no-gradient", stepped(norms={})),
        ("text-frozen", stepped(trainable={"vision": 5})),
        ("beside-adapter", stepped(trainable={"adapter": 5, "text": 5})),
        ("tower-trained", stepped(trainable={"text": 5, "vision": 5},
                                  settings={"freeze_vision": True})),
        ("not-held", stepped(held={"head": 10})),
        ("not-moved", stepped(changed={"text": False, "head": True})),
        ("accumulation-differs", stepped(settings={"gradient_accumulation_steps": 4})),
        ("batch-cuts-groups", stepped(settings={"per_device_train_batch_size": 3,
                                                "num_generations": 2})),
        ("gradient-not-finite", stepped(norms={"text": math.nan})),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_step(fact: str, step: Any) -> None:
    assert facts(lost(0.5), step) == {fact}


def test_a_detached_loss() -> None:
    assert facts(lost(0.5, requires_grad=False), stepped()) == {"loss-detached"}


def test_no_gradient_is_right_without_a_signal() -> None:
    assert facts(lost(0.5, advantages=(0.0,) * 4), stepped(norms={"text": 0.0})) == set()


def test_backward_on_other_numbers() -> None:
    two = (lost(0.5, settings={"loss_type": "?"}),) * 2
    assert facts(*two, stepped(losses=(0.5, 0.7))) == {"backward-differs"}
    # halved for accumulation, or scaled up for 16 bits
    assert facts(*two, stepped(losses=(0.25, 0.25))) == set()
    assert facts(*two, stepped(losses=(32768.0, 32768.0))) == set()


def test_groups_spread_over_processes_are_whole() -> None:
    """Four processes with one completion and two passes each make four groups of two."""
    settings = {"per_device_train_batch_size": 1, "num_generations": 2}
    alone = case(lost(0.5), stepped(settings=settings))
    four = replace(alone, trace=replace(alone.trace, header={"world": "4"}))
    assert set(found(LOOKS, alone)) == {"batch-cuts-groups"}
    assert found(LOOKS, four) == {}


def test_a_negated_backward_is_the_loss_s_fault() -> None:
    assert (
        found(LOOKS, case(lost(0.5), stepped(losses=(-0.5,))))["backward-differs"].stage == "loss"
    )


# --------------------------------------------------------------------------- from step to step

LIKELY = torch.tensor([[0.5] * 3] * 4).log()
RARE = torch.tensor([[1e-3] * 3] * 4).log()


def again(first: Any, second: Any) -> set[str]:
    earlier = case(*first, stepped(step=0))
    later = case(*second, stepped(step=1))
    _, later = checks_run.in_order([earlier, later])
    return set(found(checks_run.LOOKS, later))


def test_repeated_samples() -> None:
    """Ten tokens of 1e-3: e^-69 by chance. Tokens of 1/2: 2^-10 over four rows may happen."""
    step = (samples(), generated(logprobs=RARE))
    assert again(step, step) == {"began-anew"}
    usual = (samples(), generated(logprobs=LIKELY))
    assert again(usual, usual) == set()


def test_the_same_samples_on_other_rows_are_no_restart() -> None:
    step = (samples(), generated(logprobs=RARE))
    assert again(step, (samples(("b", "a")), generated(logprobs=RARE))) == set()


def test_a_counter_that_goes_back() -> None:
    earlier = case(generated(), stepped(settings={"global_step": 7}))
    later = case(generated(), stepped(step=1, settings={"global_step": 1}))
    _, later = checks_run.in_order([earlier, later])
    assert set(found(checks_run.LOOKS, later)) == {"counter-back"}


def test_steps_of_another_rank_do_not_follow() -> None:
    first, second = case(generated(), stepped(step=2)), case(generated(), stepped(step=0))
    assert [one.before for one in checks_run.in_order([first, second])] == [None, None]
