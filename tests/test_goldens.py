"""Goldens of the shipped clips: every stage of one sample of each kind, alone.

After a library or model upgrade these say which stage moved first. Update them with
``pytest tests/test_goldens.py --snapshot-update`` and read the diff before committing it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from omni_grpo_core import tiny
from omni_grpo_core.pipeline import run
from omni_grpo_core.policy import Policy
from omni_grpo_core.settings import load_settings
from omni_grpo_core.types import Sample, StageRecord, Trace

if TYPE_CHECKING:
    from omni_grpo_core.golden.pytest_fixture import OmniGolden

CASES = {
    "interleaved": 0,
    "interleaved-3s": 12,
    "separate": 3,
    "silent-film": 14,
    "image": 16,
    "audio": 18,
    "text": 20,
}
"""Golden case -> row of the shipped data."""
LEFT_OUT = {"sample", "conversation", "media"}
"""The text shows what these hold; decoded frames are held by the batch's pixel values."""


def without_sampling(trace: Trace) -> Trace:
    """Greedy completions only: sampled ones may turn at a rounding error."""
    stages: list[StageRecord] = []
    for record in trace.stages:
        if record.stage in LEFT_OUT:
            continue
        value = record.value[0] if record.stage == "completion" else record.value
        stages.append(replace(record, value=value))
    return Trace(trace.header, tuple(stages))


@pytest.mark.parametrize("case", CASES)
def test_shipped_sample(
    case: str, policy: Policy, samples: tuple[Sample, ...], omni_golden: OmniGolden
) -> None:
    settings = replace(load_settings(tiny.checkpoint_dir()), group_size=2)
    trace = run(policy, [samples[CASES[case]]], settings)
    omni_golden.check_trace(without_sampling(trace), case=case, decode=policy.decode)


def test_the_cases_are_what_their_names_say(samples: tuple[Sample, ...]) -> None:
    kinds = {case: [r.modality for r in samples[row].media] for case, row in CASES.items()}
    assert kinds == {
        "interleaved": ["video"],
        "interleaved-3s": ["video"],
        "separate": ["video", "audio"],
        "silent-film": ["video"],
        "image": ["image"],
        "audio": ["audio"],
        "text": [],
    }
