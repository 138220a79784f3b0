"""Killed at any moment, ``accept`` and ``regen`` leave every golden intact: the old or the new."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest
from golden_project import KEY, REASON, contents, doubled, make_project, with_goldens

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.golden.checking import check
from omni_grpo_core.golden.pending import pending_changes, regen
from omni_grpo_core.golden.review import unsound
from omni_grpo_core.golden.suite import load_suite
from omni_grpo_core.golden.text import parse_golden, with_header

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
from omni_grpo_core.errors import OmniGrpoError
policy = load_policy(tiny.checkpoint_dir())
weight = policy.model.lm_head.weight
for line in sys.stdin:
    what, factor, kill, folder = line.split()
    golden = Path(folder)
    suite = load_suite(golden)
    pid = os.fork()
    if pid == 0:
        with torch.no_grad():
            weight.mul_(float(factor))
        changes = die_before_change(None if kill == "None" else int(kill))
        try:
            if what == "regen":
                regen(policy, suite, golden, "cpu-fp32")
            else:
                accept(golden, (), {reason!r}, suite)
        except OmniGrpoError as error:
            print("refused", error, flush=True)
            os._exit(0)
        print(changes(), flush=True)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        print("killed", flush=True)
"""


class Run(Protocol):
    """One command with the head scaled by a factor, killed before that change to the disk
    (``None``: never), in ``folder``, else in the worker's own. Returns how many changes it made, 0
    if it was killed, -1 if it refused."""

    def __call__(
        self, what: str, factor: float, kill: int | None, folder: Path | None = None
    ) -> int: ...


@contextmanager
def worker(golden: Path) -> Iterator[Run]:
    with subprocess.Popen(
        [sys.executable, "-c", WORKER.replace("{reason!r}", repr(REASON))],
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

        def run(what: str, factor: float, kill: int | None, folder: Path | None = None) -> int:
            asks.write(f"{what} {factor} {kill} {folder or golden}\n")
            asks.flush()
            answer = answers.readline().strip()
            if answer.startswith("refused"):
                return -1
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


def undated(data: bytes) -> str:
    """A golden as if it were not accepted on any day."""
    return with_header(data.decode(), {"accepted": ""})


def everything(golden: Path) -> dict[str, str]:
    """Every file, hidden ones too."""
    return {
        name: undated(data) if name.endswith(".txt") else data.decode()
        for name, data in contents(golden).items()
    }


@pytest.fixture(scope="module")
def much_pending(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The goldens of two cases are to be replaced, and those of a third are new."""
    folder = tmp_path_factory.mktemp("much")
    first, suite = make_project(folder / "first"), load_suite(folder / "first" / "golden")
    regen(policy, suite, first, KEY)
    golden, suite = with_goldens(folder / "project", policy)
    regen(doubled(policy), suite, golden, KEY)
    shutil.copytree(first / ".pending" / "words", golden / ".pending" / "third")
    return golden


def neither_old_nor_new(
    before: dict[str, str], found: dict[str, str], wanted: dict[str, str]
) -> list[str]:
    """Goldens that are not as they were, with their pending file, nor as they will be."""
    waiting = [name for name in before if name.startswith(".pending/")]
    return [
        name
        for name in waiting
        if found.get(golden := name.removeprefix(".pending/")) != wanted[golden]
        and (found.get(golden), found.get(name)) != (before.get(golden), before[name])
    ]


@pytest.mark.slow
def test_killed_while_it_accepts_everything(much_pending: Path, tmp_path: Path) -> None:
    """The same command completes it, to the same bytes."""
    before = everything(much_pending)
    shutil.copytree(much_pending.parent, tmp_path / "whole")
    with worker(much_pending) as run:
        changes = run("accept", 1.0, None, tmp_path / "whole" / "golden")
        wanted = everything(tmp_path / "whole" / "golden")
        assert changes >= 50
        for kill in range(changes):
            golden = tmp_path / str(kill) / "golden"
            shutil.copytree(much_pending.parent, golden.parent)
            assert run("accept", 1.0, kill, golden) == 0
            found = everything(golden)
            assert not neither_old_nor_new(before, found, wanted), f"kill {kill}"
            left = any(name.startswith(".pending/") for name in found)
            assert left == bool(unsound(golden))
            assert left == bool(pending_changes(golden, load_suite(golden)))
            assert run("accept", 1.0, None, golden) > 0 or not left
            assert everything(golden) == wanted, f"kill {kill}"


@pytest.mark.slow
def test_regenerated_between_the_kill_and_the_next_acceptance(
    much_pending: Path, policy: Policy, tmp_path: Path
) -> None:
    moved, suite = doubled(policy), load_suite(much_pending)
    names = {name.removeprefix(".pending/") for name in contents(much_pending)} - {"suite.yaml"}
    with worker(much_pending) as run:
        for kill in range(0, 72, 6):
            golden = tmp_path / str(kill) / "golden"
            shutil.copytree(much_pending.parent, golden.parent)
            assert run("accept", 1.0, kill, golden) == 0
            assert run("regen", 2.0, None, golden) >= 0
            run("accept", 1.0, None, golden)
            assert set(goldens(golden)) == names, f"kill {kill}"
            assert not unsound(golden)
            report = check(moved, suite, golden, KEY)
            assert report.verdict in ("exact", "within"), f"kill {kill}"


@pytest.mark.slow
def test_accept_beside_regen(much_pending: Path, tmp_path: Path) -> None:
    """Files that vanished between being listed and being read were a traceback."""
    shutil.copytree(much_pending.parent, tmp_path / "project")
    golden = tmp_path / "project" / "golden"
    names = set(goldens(golden))
    with worker(golden) as one, worker(golden) as other, ThreadPoolExecutor() as pool:
        made = pool.submit(lambda: [one("regen", 1.0 + n, None) for n in range(12)])
        accepted = []
        while not made.done():
            accepted.append(other("accept", 1.0, None))
        assert all(made.result()), "a regeneration crashed"
    assert 0 not in accepted, "an acceptance crashed"
    assert max(accepted) > 0
    assert set(goldens(golden)) > names
    assert all(".pending" in line for line in unsound(golden))
