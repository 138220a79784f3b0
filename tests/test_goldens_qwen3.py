"""Goldens of the shipped clips under the second family: the same rows as the first family's.

The pair of folders ``golden/interleaved`` and ``golden/qwen3-interleaved`` is what a model upgrade
looks like on paper. Update with ``pytest tests/test_goldens_qwen3.py --snapshot-update``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from omni_grpo_core.pipeline import run
from omni_grpo_core.policy import Policy
from omni_grpo_core.settings import Settings
from omni_grpo_core.types import Sample, StageRecord, Trace

if TYPE_CHECKING:
    from omni_grpo_core.golden.pytest_fixture import OmniGolden

CASES = {
    "qwen3-interleaved": 0,
    "qwen3-interleaved-3s": 12,
    "qwen3-separate": 3,
    "qwen3-silent-film": 14,
    "qwen3-image": 16,
    "qwen3-audio": 18,
    "qwen3-text": 20,
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
    case: str,
    qwen3_policy: Policy,
    samples: tuple[Sample, ...],
    qwen3_settings: Settings,
    omni_golden: OmniGolden,
) -> None:
    trace = run(qwen3_policy, [samples[CASES[case]]], qwen3_settings)
    assert [record.stage for record in trace.stages if not record.ok] == []
    omni_golden.check_trace(without_sampling(trace), case=case, decode=qwen3_policy.decode)
