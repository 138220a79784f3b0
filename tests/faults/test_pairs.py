"""Pairs of which one fault hid the other, or made a cause "proved" that was not true."""

from __future__ import annotations

import pytest

from omni_grpo_core.faults.campaign import perform
from omni_grpo_core.faults.healthy import run_healthy
from omni_grpo_core.faults.healthy.world import Setting
from omni_grpo_core.faults.plan import BY_ID, named_pairs

pytestmark = pytest.mark.slow

HIDDEN = (
    ("buffered", "batch.resized", "reward.golds-shifted"),
    ("buffered", "batch.grids-exchanged", "reward.by-position"),
    ("reference", "loss.sign", "adv.batch-deviation"),
    ("experience", "reward.first-type", "adv.batch-deviation"),
    ("buffered", "conv.options-missing", "adv.batch-deviation"),
    ("buffered", "step.not-updated", "gen.adapter-off"),
    ("experience", "media.frames-clamped", "loss.padded-mean"),
    ("reference", "batch.padding-side-config", "adv.broadcast"),
    ("experience", "batch.grids-exchanged", "media.video-not-scored"),
    ("reference", "logits.low-precision", "adv.batch-scale"),
    ("experience", "adv.broadcast", "loss.shift"),
    ("experience", "text.media-dropped", "adv.group-mixed"),
)
MISTAKEN = (
    ("buffered", "conv.resampled-item", "gen.adapter-off"),
    ("experience", "conv.resampled-item", "batch.silent-clip"),
    ("experience", "batch.flag-processor", "logits.low-precision"),
    ("buffered", "media.images-only", "batch.flag-processor"),
    ("reference", "loss.prompt-included", "gen.adapter-off"),
)


@pytest.mark.parametrize(("loop", "one", "other"), [*HIDDEN, *MISTAKEN])
def test_both_faults_are_found_and_no_cause_is_wrong(loop: str, one: str, other: str) -> None:
    [task] = [task for task in named_pairs(BY_ID[one], BY_ID[other]) if task.loop == loop]
    row = perform(task, causes=True)
    assert row.without_effect == ()
    assert row.stage_right, row.findings
    assert row.wrong == ()


def test_a_divisor_that_16_bits_leave_near_another_one_is_no_proof() -> None:
    """A mean of sums, whose factor is within 2 % of what the batch's deviation would give, and in
    another run of a mean over the padded width."""
    for setting in (Setting("off", "bfloat16"), Setting("off", "bfloat16", lora=True)):
        found = run_healthy("text_batched_twice", setting).findings
        proved = {one.cause for finding in found for one in finding.causes if one.proved}
        assert not {"adv.batch-deviation", "loss.padded-mean"} & proved
