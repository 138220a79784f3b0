"""On a CUDA device gradients leave on a stream of their own: the same bits, and less memory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from host_gradient_runs import OPTIMIZERS, same, small_blocks, three_steps
from torch import Tensor, nn

from omni_grpo_core import tiny
from omni_grpo_core.core.policy import load_policy
from omni_grpo_core.pipeline.settings import load_settings
from omni_grpo_core.training import loop
from omni_grpo_core.training.config import (
    GuardConfig,
    OptimizerConfig,
    RewardEntry,
    TrainConfig,
)
from omni_grpo_core.training.host_gradients import HostGradients

pytestmark = pytest.mark.gpu

MIB = 2**20


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_steps_are_the_same_to_the_last_bit(name: str, parts: int) -> None:
    wanted = three_steps(name, parts, device="cuda")
    assert same(three_steps(name, parts, small_blocks, "cuda"), wanted)


@pytest.mark.parametrize("passes", [1, 3])
def test_all_but_what_is_outstanding_leaves_the_device(passes: int) -> None:
    """32 matrices of 4 MiB: 128 MiB of gradients, of which 16 MiB may wait. One is being made, one
    may be an earlier sum on its way; the rest, 4 MiB, is norms and hidden states."""
    torch.manual_seed(0)
    layers = [nn.Linear(1024, 1024, bias=False, device="cuda") for _ in range(32)]
    model = nn.Sequential(*layers)
    weights = [*model.parameters()]
    rows = torch.randn(4, 1024, device="cuda")

    def peak() -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for index in range(passes):
            (model(rows) * (index + 1)).sum().backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    peak()  # matrix products take their workspace
    model.zero_grad()
    most = peak()
    kept = [weight.grad for weight in weights]
    norm = torch.nn.utils.get_total_norm([grad for grad in kept if grad is not None])
    model.zero_grad()
    host = HostGradients(weights, outstanding=16 * MIB)
    with host.attached():
        least = peak()
    assert all(weight.grad is None for weight in weights)
    assert most >= 128 * MIB
    assert least <= (16 + 2 * 4 + 4) * MIB
    assert torch.equal(host.norm(), norm)
    for weight, grad in zip(weights, kept, strict=True):
        found = host.gradient(weight)
        assert isinstance(found, Tensor)
        assert isinstance(grad, Tensor)
        assert torch.equal(found, grad)


@pytest.mark.tiny
@pytest.mark.parametrize("fast", ["on", "off"])
def test_a_run_is_the_same_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: Any
) -> None:
    """In bfloat16 with masters, two micro-batches, two updates on each rollout; with torch's
    deterministic kernels, without which a run differs from itself."""
    few = partial(HostGradients, outstanding=2**16, at_once=2**16)
    monkeypatch.setattr("omni_grpo_core.training.run.HostGradients", few)
    settings = load_settings(tiny.checkpoint_dir())
    sampled: dict[str, Any] = {"group_size": 4, "max_new_tokens": 8, "temperature": 3.0}

    def run(offloaded: bool) -> tuple[Any, dict[str, Tensor]]:
        out = tmp_path / str(offloaded)
        config = TrainConfig(
            checkpoint=str(tiny.checkpoint_dir()), data=str(tiny.data_file()), out=str(out),
            settings=replace(settings, **sampled), steps=3, batch_size=8, micro_batch_size=4,
            rewards={"toy_rewards:early_letters": RewardEntry()}, iterations=2, fast=fast,
            optimizer=OptimizerConfig(lr=1e-3), precision="bfloat16", device="cuda",
            freeze=("image", "video", "audio"),
            trained_weights="bfloat16_master", offload_gradients=offloaded, save_every=0,
            full_determinism=True,
            guard=GuardConfig(preflight=False, patience=99, garbage=1.0, drift=99.0), trackers=(),
        )  # fmt: skip
        lines: list[Any] = []
        loop.train(config, on_step=lambda view: lines.append(dict(view.record)))
        free = ("seconds", "memory/")
        kept = [{k: v for k, v in line.items() if not k.startswith(free)} for line in lines]
        return kept, load_policy(out / "model").model.state_dict()

    (lines, weights), (wanted, others) = run(True), run(False)
    assert len(wanted) == 3
    assert lines == wanted
    assert all(torch.equal(weights[name], others[name]) for name in others)
