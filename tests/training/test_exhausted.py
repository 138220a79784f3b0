"""A run that is out of memory: one message with the stage and what was in use, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import log, short

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.losses import LossConfig
from omni_grpo_core.training.config import as_values
from omni_grpo_core.training.loop import train

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
MACHINE = OSError(errno.ENOMEM, "Cannot allocate memory")


@pytest.mark.parametrize(
    ("stage", "where", "error", "held", "fix"),
    [
        ("loading", "transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained",
         CUDA, (0, 0), "use lora"),
        ("sampling", "omni_grpo_core.training.run.rollout", CUDA, (1, 0), "lower batch_size"),
        ("reference", "omni_grpo_core.training.trainable.Scorer.forward", CPU, (1, 0),
         "loss: beta 0"),
        ("update", "omni_grpo_core.training.step.policy_loss", CPU, (1, 0),
         "lower micro_batch_size"),
        ("optimizer", "torch.optim.AdamW.step", MemoryError(), (1, 0), "adamw_8bit"),
        ("saving", "torch.save", MACHINE, (1, 2), "memory of the machine"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
)  # fmt: skip
def test_out_of_memory_is_one_message_with_the_stage_and_what_was_in_use(
    tmp_path: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch,
    stage: str, where: str, error: Exception, held: tuple[int, int], fix: str,
) -> None:  # fmt: skip
    """``held``: float32 numbers of each weight in weights and in optimizer: none before loading,
    two moments after an update."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(where, fail)
    out = tmp_path / "run"
    loss = LossConfig(beta=0.1 if stage == "reference" else 0.0)
    with pytest.raises(ConfigError) as caught:
        train(short(out, steps=1, batch_size=4, loss=loss))
    assert caught.value.item == f"memory, {stage}"
    size = 4 * sum(p.numel() for p in policy.model.parameters()) / 2**30
    weights, moments = held
    assert f"in use, GiB: weights {weights * size:.3g}, " in caught.value.got
    assert f"optimizer {moments * size:.2g}" in caught.value.got
    assert fix in caught.value.fix
    # nothing before its first step is logged, no half of a state after it
    left = {"config.json", "log.jsonl", "state"} if stage == "saving" else set()
    assert {path.name for path in out.rglob("*")} == left


@pytest.mark.slow
def test_a_command_without_memory_exits_2_and_goes_on_when_it_is_started_again(
    tmp_path: Path,
) -> None:
    """At the second optimizer step, after the first was saved."""
    values = as_values(short(tmp_path / "run", steps=2, batch_size=4))
    path = tmp_path / "run.json"
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    fault = (
        "import sys, torch; from omni_grpo_core.__main__ import main\n"
        "right, calls = torch.optim.AdamW.step, []\n"
        "def step(*given, **named):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2: raise torch.OutOfMemoryError('CUDA out of memory.')\n"
        "    return right(*given, **named)\n"
        "if sys.argv.pop(1) == 'fails': torch.optim.AdamW.step = step\n"
        "main()"
    )

    def run(how: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", fault, how, "train", str(path)],
            capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip

    failed = run("fails")
    assert failed.returncode == 2, failed.stderr
    assert "Traceback" not in failed.stderr
    assert "memory, optimizer: found CUDA out of memory. (in use, GiB: weights" in failed.stderr
    assert [folder.name for folder in (tmp_path / "run" / "state").iterdir()] == ["000001"]
    assert run("runs").returncode == 0
    assert [line["step"] for line in log(tmp_path / "run")] == [0, 1]
