"""Two processes under FSDP2 with ``fsdp_reshard_after_forward: false``: the weights that sampling
gathered serve the update."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import FSDP, codes, together
from test_several import LORA, groups, on, run
from torch import Tensor
from train_runs import log, short

from omni_grpo_core.core.policy import load_policy
from omni_grpo_core.training.config import RewardEntry, TrainConfig
from omni_grpo_core.training.distributed import make_accelerator
from omni_grpo_core.training.sharding import gathered, initialise_root, zero_of_weights
from omni_grpo_core.training.step import Scorer

KEPT: Mapping[str, str] = {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}
UNITS = 3 + 1
"""What FSDP gathers at once: each layer of the tiny text model, and all else."""


def _counted(out: Path, config: TrainConfig, rank: int) -> None:
    own, count = torch.distributed.all_gather_into_tensor, [0]

    def counting(*values: Any, **named: Any) -> Any:
        count[0] += 1
        return own(*values, **named)

    torch.distributed.all_gather_into_tensor = counting
    run(out, config, rank)
    (out / f"gathers-{rank}").write_text(str(count[0]))


@pytest.mark.parametrize(
    "changes",
    [
        groups(4, 4, 4, fast="on", gradient_checkpointing=True),
        pytest.param(groups(4, 4, 4, fast="on", **LORA), marks=pytest.mark.slow),
        pytest.param(groups(4, 2, 2, fast="off", iterations=2), marks=pytest.mark.slow),
    ],
    ids=["all weights", "lora and a reference", "iterations"],
)
def test_weights_that_sampling_gathered_stay_for_the_update(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """``fsdp_reshard_after_forward: false``, with two micro-batches on each process. A second
    iteration has other weights, and gathers them."""
    gathers = {}
    for name, kind in (("resharded", FSDP), ("kept", KEPT)):
        out = tmp_path / name
        config = short(out / "run", **{**changes, "steps": 2})
        ended = together(2, partial(_counted, out, config), out, kind)
        assert codes(ended) == [0, 0], ended
        gathers[name] = {int((out / f"gathers-{rank}").read_text()) for rank in (0, 1)}
    assert gathers["kept"] == {2 * config.iterations * UNITS}
    assert min(gathers["resharded"]) > 3 * max(gathers["kept"])
    for line, other in zip(*(log(tmp_path / n / "run") for n in gathers), strict=True):
        assert line["grad_norm"] > 0
        assert line == other
    for part in ("part-1-of-2.bin", "part-2-of-2.bin"):
        one, two = (tmp_path / n / "run" / "state" / "000002" / part for n in gathers)
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_weights_are_sharded_again_after_a_step_without_a_loss(tmp_path: Path) -> None:
    """No backward pass gave them back, and each process would have saved all of them."""
    ended = on(2, tmp_path, KEPT, rewards={"accuracy": RewardEntry()}, drop_zero_variance=True)
    state = ended / "run" / "state" / "000001"
    assert sorted(p.name for p in state.glob("part-*")) == ["part-1-of-2.bin", "part-2-of-2.bin"]


def _zeros(out: Path, config: TrainConfig, rank: int) -> None:
    accelerator = make_accelerator(config)
    policy = load_policy(config.checkpoint)
    optimizer = torch.optim.SGD(policy.model.parameters())
    scorer, _ = accelerator.prepare(Scorer(policy, 1.0), optimizer)
    initialise_root(scorer)
    with gathered(scorer):
        zero = zero_of_weights(scorer)
        assert isinstance(zero, Tensor)
        zero.backward()  # type: ignore[no-untyped-call]
        names = [n for n, p in scorer.named_parameters() if p.grad is not None]
    (out / f"names-{rank}").write_text("\n".join(names))


def test_layers_that_are_whole_have_no_zeros_for_gradients(tmp_path: Path) -> None:
    """With ``fsdp_reshard_after_forward: false`` an update of a 7B made 12 GiB of them."""
    ended = together(2, partial(_zeros, tmp_path, short(tmp_path / "run")), tmp_path, FSDP)
    assert codes(ended) == [0, 0], ended
    names = (tmp_path / "names-0").read_text().split()
    assert {"model.model.embed_tokens.weight", "model.lm_head.weight"} <= set(names)
    assert any("audio_tower" in name for name in names)
    assert not any(name.startswith("model.model.layers.") for name in names)
