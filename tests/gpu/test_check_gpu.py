"""The good path on a CUDA device, in the precision people train in and in float32."""

from __future__ import annotations

import pytest

from omni_grpo_core import tiny
from omni_grpo_core.check import check
from omni_grpo_core.policy import load_policy
from omni_grpo_core.settings import load_settings
from omni_grpo_core.types import Sample

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_passes_on_cuda(dtype: str, samples: tuple[Sample, ...]) -> None:
    policy = load_policy(tiny.checkpoint_dir(), device="cuda", dtype=dtype)
    result = check(policy, samples, load_settings(tiny.checkpoint_dir()))
    broken = [(r.stage, c) for r in result.trace.stages for c in r.checks if not c.ok]
    assert result.verdict == "pass", broken
    assert result.trace.header["device"] == "cuda"
