"""The accepted goldens of a CUDA device: ``golden/*/*@cuda-sm90-bf16.txt`` and the like."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_grpo_core.core.policy import load_policy
from omni_grpo_core.golden.checking import check
from omni_grpo_core.golden.environment import platform_key
from omni_grpo_core.golden.results import FINE
from omni_grpo_core.golden.suite import load_suite

pytestmark = [pytest.mark.gpu, pytest.mark.tiny]
FOLDER = Path(__file__).parent.parent.parent / "golden"


@pytest.mark.parametrize(
    ("folder", "dtype"),
    # not the second family in bfloat16: rounding routes tokens to other experts, and a tolerance
    # that allows that would find nothing
    [(FOLDER, "float32"), (FOLDER, "bfloat16"), (FOLDER / "qwen3", "float32")],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_the_goldens_of_this_device_hold(folder: Path, dtype: str) -> None:
    suite = load_suite(folder)
    policy = load_policy(suite.checkpoint_dir(), device="cuda", dtype=dtype)
    report = check(policy, suite, folder, platform_key("cuda", dtype))
    failed = [(case.case, case.reason) for case in report.cases if case.verdict not in FINE]
    assert report.verdict in FINE, failed
