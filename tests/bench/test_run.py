"""What is measured again is the same again."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

from omni_grpo_core.bench.run import Options, _Bench
from omni_grpo_core.bench.shapes import ROUNDED, SETTINGS, make_batch, make_policy

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


def test_prompts_of_the_tiny_size_are_as_long_as_asked_for() -> None:
    """From 900 tokens on its sound was longer than the 8 s of the shipped extractor: the sweep of
    prompts told people to cut a clip that they had never seen."""
    policy = make_policy("tiny", "cpu", "float32")
    (row,) = make_batch(policy, replace(SETTINGS["tiny"], prompt=2048, groups=1)).rows
    assert len(row.input_ids) == pytest.approx(2048, rel=0.02)
