"""``kill -9`` at random moments: every resume goes on, and the curve is the uninterrupted one's."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from train_runs import log, short

from omni_grpo_core.grpo.train import train
from omni_grpo_core.policy import load_policy

STEPS = 5


def _train(out: Path) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    train(short(out, steps=STEPS))


def _run(out: Path, seconds: float | None) -> bool:
    """Train in a process of its own, killed after ``seconds``; whether it came to its end."""
    child = multiprocessing.get_context("fork").Process(target=_train, args=(out,))
    child.start()
    child.join(seconds)
    if child.is_alive() and child.pid is not None:
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), "a resume failed by itself"
    return child.exitcode == 0


def kill_and_compare(tmp_path: Path, kills: int, seed: int) -> None:
    moments = random.Random(seed)
    straight = tmp_path / "straight"
    assert _run(straight, None)
    want = load_policy(straight / "model").model.state_dict()
    killed = runs = 0
    while killed < kills:
        out = tmp_path / f"run-{runs}"
        runs += 1
        while not _run(out, moments.uniform(0.1, 2.5) if killed < kills else None):
            killed += 1
        assert log(out) == log(straight)
        found = load_policy(out / "model").model.state_dict()
        assert all(torch.equal(found[name], want[name]) for name in want)


def test_killed_twice(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, kills=2, seed=0)


@pytest.mark.slow
def test_killed_at_20_random_moments(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, kills=20, seed=1)
