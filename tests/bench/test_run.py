"""What is measured again is the same again."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

from omni_grpo_core.bench.run import Options, _Bench
from omni_grpo_core.bench.shapes import ROUNDED, make_policy

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version("4.57"), reason="no attention functions"
)


def test_repeated_updates_do_not_add_up() -> None:
    """Three repeats held a second gradient of each weight: 35.3 GiB in place of 32.1."""
    policy = make_policy("tiny", "cpu", "float32")
    bench = _Bench(policy, ROUNDED["tiny"], Options())
    update = bench._parts("fast")["update"]
    update()
    first = [p.grad.clone() for p in bench.learning if p.grad is not None]
    update()
    again = [p.grad for p in bench.learning if p.grad is not None]
    assert len(first) > 0
    assert all(map(torch.equal, first, again))
