"""Killed at any moment, ``accept`` and ``regen`` leave every golden intact: the old or the new."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from golden_project import REASON, contents, with_goldens

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.golden.text import parse_golden

# Imports everything once, then forks a process per command, so that the command is killed, not half
# a minute of imports. It prints how many changes the command made to the disk.
WORKER = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from killed import die_before_change
from omni_grpo_core import tiny
from omni_grpo_core.golden.pending import regen
from omni_grpo_core.golden.review import accept
from omni_grpo_core.golden.suite import load_suite
from omni_grpo_core.core.policy import load_policy
golden = Path(sys.argv[1])
suite = load_suite(golden)
policy = load_policy(tiny.checkpoint_dir())
weight = policy.model.lm_head.weight
for line in sys.stdin:
    what, factor, kill = line.split()
    pid = os.fork()
    if pid == 0:
        with torch.no_grad():
            weight.mul_(float(factor))
        changes = die_before_change(None if kill == "None" else int(kill))
        if what == "regen":
            regen(policy, suite, golden, "cpu-fp32")
        else:
            accept(golden, ["words", "other"], {reason!r}, suite)
        print(changes(), flush=True)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        print("killed", flush=True)
"""


Run = Callable[[str, float, int | None], int]
"""One command with the head scaled by a factor, killed before that change to the disk (``None``:
never); returns how many changes it made, 0 if it was killed."""


@contextmanager
def worker(golden: Path) -> Iterator[Run]:
    with subprocess.Popen(
        [sys.executable, "-c", WORKER.replace("{reason!r}", repr(REASON)), str(golden)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        },
    ) as process:
        asks, answers = process.stdin, process.stdout
        assert asks is not None
        assert answers is not None

        def run(what: str, factor: float, kill: int | None) -> int:
            asks.write(f"{what} {factor} {kill}\n")
            asks.flush()
            answer = answers.readline().strip()
            # files left by a killed command can shorten the next one's work
            return 0 if answer == "killed" else int(answer)

        yield run
        # it exits at the end of its input
        asks.close()


def goldens(golden: Path) -> dict[str, bytes]:
    """Accepted goldens, each of which must be readable."""
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
    with worker(golden) as run:
        for kill in range(run("regen", 2.0, None)):
            run("regen", 3.0 + kill, kill)
            assert goldens(golden) == before
            for path in (golden / ".pending").glob("*/*.txt"):
                parse_golden(path.read_text(), str(path))


@pytest.mark.slow
def test_killed_while_it_accepts(policy: Policy, tmp_path: Path) -> None:
    golden, _ = with_goldens(tmp_path / "project", policy)
    cut = 0
    names = set(goldens(golden))
    with worker(golden) as run:
        run("regen", 2.0, None)
        for kill in range(run("accept", 1.0, None)):
            run("regen", 3.0 + kill, None)
            pending = set((golden / ".pending").glob("*/*.txt"))
            assert pending
            before = goldens(golden)
            run("accept", 1.0, kill)
            after = goldens(golden)
            assert set(after) == names, "a golden was lost"
            left = set((golden / ".pending").glob("*/*.txt"))
            cut += 0 < len(left) < len(pending)
            for path in left:
                parse_golden(path.read_text(), str(path))
            # a file that is no longer pending has replaced its golden
            done = {f"{path.parent.name}/{path.name}" for path in pending - left}
            assert {name for name in names if after[name] != before[name]} >= done
    assert cut, "no kill interrupted an acceptance"
