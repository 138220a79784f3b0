"""``accelerate launch``: data-parallel and sharded runs equal the run of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from train_runs import log

import omni_grpo_core
from omni_grpo_core import tiny
from omni_grpo_core.core.policy import load_policy

TESTS = Path(__file__).parents[1]
SOURCE = Path(omni_grpo_core.__file__).parents[1]
RUN: Mapping[str, Any] = {
    "checkpoint": str(tiny.checkpoint_dir()),
    "data": str(tiny.data_file()),
    "settings": {"group_size": 4, "max_new_tokens": 8, "temperature": 3.0},
    "rewards": {"toy_rewards:early_letters": {}},
    "batch_size": 8,
    "micro_batch_size": 4,
    # the second iteration has a ratio: its loss is not the 0 of an on-policy step
    "iterations": 2,
    "loss": {"beta": 0.05},
    "optimizer": {"lr": 1e-3},
    "save_every": 1,
    # the tiny policy is truncated at 8 tokens, which the guard would report
    "guard": {"preflight": False, "patience": 99, "garbage": 1.0},
}
SHARDED: Mapping[str, Any] = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_auto_wrap_policy": "NO_WRAP",
    },
}
BY_LAYER = {
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_transformer_layer_cls_to_wrap": "Qwen2_5OmniDecoderLayer",
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
}
KINDS: Mapping[str, Mapping[str, Any]] = {
    # MULTI_CPU, and --cpu, start one process whatever num_processes says: they are meant for MPI
    "data-parallel": {"distributed_type": "MULTI_GPU"},
    "sharded": SHARDED,
    "sharded by layer": {**SHARDED, "fsdp_config": {**SHARDED["fsdp_config"], **BY_LAYER}},
}

pytestmark = pytest.mark.slow


PLAIN: Mapping[str, Any] = {}
# the reference is the policy with the adapter off, and is scored by parts of a sharded model
LORA: Mapping[str, Any] = {"lora": {"rank": 2}, "gradient_checkpointing": True}


def launch(
    folder: Path, changes: Mapping[str, Any], steps: int, kind: Mapping[str, Any] | None
) -> Path:
    """Train ``steps`` steps in ``folder/run`` with the command, in processes of its own."""
    run = folder / "run.yaml"
    run.write_text(yaml.safe_dump({**RUN, **changes, "steps": steps, "out": "run"}))
    command = [sys.executable, "-m", "omni_grpo_core"]
    if kind is not None:
        settings = folder / "accelerate.yaml"
        settings.write_text(
            yaml.safe_dump(
                {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2,
                 "mixed_precision": "no", "use_cpu": True, **kind}
            )
        )  # fmt: skip
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings),
            "--main_process_port", "0", "-m", "omni_grpo_core",
        ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{SOURCE}"}
    done = subprocess.run(
        [*command, "train", str(run)],
        capture_output=True, text=True, check=False, env=environment, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    world = 1 if kind is None else kind.get("num_processes", 2)
    assert f"{steps} steps on {world} process" in done.stderr
    return folder / "run"


@pytest.fixture(scope="module", params=[PLAIN, LORA], ids=["plain", "lora"])
def alone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Mapping[str, Any]]:
    """The run of one process, and its changes to the configuration."""
    return launch(tmp_path_factory.mktemp("alone"), request.param, 2, None), request.param


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_two_processes_equal_one_even_across_a_resume(
    tmp_path: Path, alone: tuple[Path, Mapping[str, Any]], kind: Mapping[str, Any]
) -> None:
    straight, changes = alone
    launch(tmp_path, changes, 1, kind)
    out = launch(tmp_path, changes, 2, kind)
    ours, theirs = log(out), log(straight)
    assert abs(theirs[0]["loss/1"]) > 1e-4
    for line, want in zip(ours, theirs, strict=True):
        for name in ("reward", "loss", "loss/1", "grad_norm", "grad_norm/1", "kl/1", "entropy"):
            # float32 sums in another order
            assert line[name] == pytest.approx(want[name], rel=1e-3, abs=1e-5), name
    found, wanted = (load_policy(run / "model").model.state_dict() for run in (out, straight))
    start = load_policy(tiny.checkpoint_dir()).model.state_dict()
    for name, weight in wanted.items():
        # AdamW's first steps follow the sign of a gradient: if it is nearly 0, another order of
        # sums may flip it. Four steps of 1e-3 at most.
        difference = (found[name] - weight).abs()
        assert difference.max() <= 8e-3, name
    moved = torch.cat([(wanted[n] - start[n]).flatten() for n in wanted])
    apart = torch.cat([(found[n] - wanted[n]).flatten() for n in wanted])
    assert apart.norm() < 0.05 * moved.norm()
