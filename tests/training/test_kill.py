"""``kill -9`` before any write to the disk: each resume continues the uninterrupted curve."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from killed import die_before_change
from train_runs import log, short

from omni_grpo_core.core.policy import load_policy
from omni_grpo_core.training.loop import train

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

STEPS = 5


def _train(out: Path, kill: int | None, changes: Synchronized[int]) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    seen = die_before_change(kill)
    train(short(out, steps=STEPS))
    changes.value = seen()


def _run(out: Path, kill: int | None) -> int | None:
    """Train in a process of its own, killed before its ``kill``-th write to the disk; returns the
    number of writes if it finished."""
    changes = multiprocessing.Value("q", 0)
    child = multiprocessing.get_context("fork").Process(target=_train, args=(out, kill, changes))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), "a resume failed on its own"
    return None if child.exitcode else changes.value


def kill_and_compare(tmp_path: Path, kills: int, seed: int) -> None:
    moments = random.Random(seed)
    straight = tmp_path / "straight"
    changes = _run(straight, None)
    assert changes
    want = load_policy(straight / "model").model.state_dict()
    killed = runs = 0
    while killed < kills:
        out = tmp_path / f"run-{runs}"
        runs += 1
        while _run(out, moments.randrange(changes) if killed < kills else None) is None:
            killed += 1
        assert log(out) == log(straight)
        found = load_policy(out / "model").model.state_dict()
        assert all(torch.equal(found[name], want[name]) for name in want)


def test_killed_twice(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, kills=2, seed=0)


@pytest.mark.slow
def test_killed_at_20_random_moments(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, kills=20, seed=1)
