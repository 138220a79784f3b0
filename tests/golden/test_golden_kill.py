"""Killed at any moment, ``accept`` and ``regen`` leave every golden whole: the old or the new."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from golden_project import REASON, contents, with_goldens

from omni_grpo_core.golden.text import parse_golden
from omni_grpo_core.policy import Policy

ROUNDS = 50
# Loads everything once, then each round is a process of its own, forked from it: what is killed is
# the command, not half a minute of imports. It answers "go" just before it begins.
WORKER = """
import os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from omni_grpo_core import tiny
from omni_grpo_core.golden.pending import regen
from omni_grpo_core.golden.review import accept
from omni_grpo_core.golden.suite import load_suite
from omni_grpo_core.policy import load_policy
golden = Path(sys.argv[1])
suite = load_suite(golden)
policy = load_policy(tiny.checkpoint_dir())
weight = policy.model.lm_head.weight
for line in sys.stdin:
    what, factor, stays = line.split()
    pid = os.fork()
    if pid == 0:
        with torch.no_grad():
            weight.mul_(float(factor))
        print("go", os.getpid(), flush=True)
        if what == "regen":
            regen(policy, suite, golden, "cpu-fp32")
        else:
            accept(golden, ["words", "other"], {reason!r}, suite)
        if stays == "True":
            time.sleep(600)  # what is to be killed is there to be killed
        os._exit(0)
    os.waitpid(pid, 0)
    print("gone", flush=True)
"""


Run = Callable[[str, float, float | None], float]
"""One command with the head scaled by a factor, killed after so many seconds (``None``: it may
end); returns how long it lived."""


@contextmanager
def worker(golden: Path) -> Iterator[Run]:
    with subprocess.Popen(
        [sys.executable, "-c", WORKER.replace("{reason!r}", repr(REASON)), str(golden)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
    ) as process:
        asks, answers = process.stdin, process.stdout
        assert asks is not None
        assert answers is not None

        def run(what: str, factor: float, after: float | None) -> float:
            asks.write(f"{what} {factor} {after is not None}\n")
            asks.flush()
            go, pid = answers.readline().split()
            assert go == "go"
            begin = time.perf_counter()
            if after is not None:
                time.sleep(after)
                os.kill(int(pid), signal.SIGKILL)
            assert answers.readline() == "gone\n"
            return time.perf_counter() - begin

        yield run
        # the end of its input ends it
        asks.close()


def goldens(golden: Path) -> dict[str, bytes]:
    """Accepted goldens; every one can be read."""
    found = {
        name: data
        for name, data in contents(golden).items()
        if name.endswith(".txt") and not name.startswith(".pending")
    }
    for name, data in found.items():
        parse_golden(data.decode(), name)
    return found


@pytest.mark.slow
def test_killed_while_it_regenerates(policy: Policy, tmp_path: Path) -> None:
    golden, _ = with_goldens(tmp_path / "project", policy)
    before = goldens(golden)
    rng = random.Random(0)
    with worker(golden) as run:
        lasts = run("regen", 2.0, None)
        for number in range(ROUNDS):
            run("regen", 2.0 + number, rng.uniform(0, lasts))
            assert goldens(golden) == before
            for path in (golden / ".pending").glob("*/*.txt"):
                parse_golden(path.read_text(), str(path))


@pytest.mark.slow
def test_killed_while_it_accepts(policy: Policy, tmp_path: Path) -> None:
    golden, _ = with_goldens(tmp_path / "project", policy)
    rng, cut = random.Random(1), 0
    names = set(goldens(golden))
    with worker(golden) as run:
        run("regen", 2.0, None)
        lasts = run("accept", 1.0, None)
        for number in range(ROUNDS):
            run("regen", 3.0 + number, None)
            pending = set((golden / ".pending").glob("*/*.txt"))
            assert pending
            before = goldens(golden)
            run("accept", 1.0, rng.uniform(0, lasts))
            after = goldens(golden)
            assert set(after) == names, "a golden was lost"
            left = set((golden / ".pending").glob("*/*.txt"))
            cut += 0 < len(left) < len(pending)
            for path in left:
                parse_golden(path.read_text(), str(path))
            # what is no longer pending stands in the golden's place
            done = {f"{path.parent.name}/{path.name}" for path in pending - left}
            assert {name for name in names if after[name] != before[name]} >= done
    assert cut, "no kill fell into the middle of an acceptance"
