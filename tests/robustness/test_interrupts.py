"""Ctrl-C at any moment: one line, 130, no process left behind and nothing half-written.

A terminal sends it to the whole process group, including workers; so do these tests, once an event
says that the moment has come.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

PATIENCE = 300.0
"""Seconds until a moment that never comes fails the test."""
SLEEP = "import pathlib, time; pathlib.Path('event').touch(); time.sleep(600)\n"


@dataclass(frozen=True)
class Moment:
    """``prepare`` makes what the command needs in an empty folder, with ``event`` appearing there
    ``events`` times (``event*``) when the moment has come; returns the command's words."""

    name: str
    prepare: Callable[[Path], Sequence[str]]
    events: int = 1

    def __str__(self) -> str:
        return self.name


def _importing(package: str, *command: str) -> Callable[[Path], Sequence[str]]:
    def prepare(folder: Path) -> Sequence[str]:
        (folder / f"{package}.py").write_text(SLEEP)
        return command

    return prepare


def _reward(folder: Path) -> Sequence[str]:
    (folder / "mine.py").write_text(f"def reward(**columns):\n    {SLEEP}")
    return ["rewards", "test", "mine:reward"]


def _pipeline(folder: Path) -> Sequence[str]:
    (folder / "mine.py").write_text(f"def run(*batch, **columns):\n    {SLEEP}")
    return ["doctor", "--import", "mine:run"]


def _child(*command: str) -> Callable[[Path], Sequence[str]]:
    def prepare(folder: Path) -> Sequence[str]:
        python = folder / "python"
        # exec: a shell that waits for a child forgets a SIGINT if the child succeeds
        python.write_text("#!/bin/sh\n: > event\nexec sleep 600\n")
        python.chmod(0o755)
        return command

    return prepare


def _workers(folder: Path) -> Sequence[str]:
    (folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if any('spawn_main' in word for word in sys.orig_argv):\n"
        f"    open(os.path.join({str(folder)!r}, f'event{{os.getpid()}}'), 'w').close()\n"
    )
    return ["faults", "--jobs", "2", "--pairs", "0", "--clean", "0"]


QUICK = (
    Moment("typer is imported", _importing("typer", "check")),
    Moment("yaml is imported", _importing("yaml", "train", "run.yaml")),
    Moment("torch is imported", _importing("torch", "check")),
    Moment("a reward is tried", _reward),
    Moment("another python records", _child("golden", "bisect", "./python", "./python")),
)
SLOW = (
    Moment("another python is probed", _child("versions", "compare", "a=./python")),
    Moment("a pipeline is run", _pipeline),
    Moment("workers start", _workers, events=2),
)


@pytest.mark.parametrize(
    "moment", [*QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)], ids=str
)
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["", "json"])
def test_one_line_and_130(moment: Moment, flags: list[str], tmp_path: Path) -> None:
    work, scratch = tmp_path / "work", tmp_path / "scratch"
    work.mkdir()
    scratch.mkdir()
    command = [*moment.prepare(work), *flags]
    # the moment's folder comes first on the path: its sleeping package is imported instead
    path = os.pathsep.join([str(work), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(scratch)}
    code, out, err = _interrupted(command, work, environment, moment.events)
    assert (code, err.splitlines()[-1:]) == (130, ["interrupted"]), (out, err)
    assert "Traceback" not in err
    # only torch's own cache folder may stay
    left = [path.name for path in scratch.iterdir() if not path.name.startswith("torchinductor")]
    assert left == []
    assert list(work.rglob("*.partial")) == []
    if flags:
        assert json.loads(out)["error"]["got"] == "Ctrl-C"


def _interrupted(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], events: int
) -> tuple[int, str, str]:
    out, err = folder.parent / "out", folder.parent / "err"
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "omni_grpo_core", *command],
            cwd=folder,
            env=dict(environment),
            stdout=stdout,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            _wait(lambda: len(list(folder.glob("event*"))) >= events, process, err)
            os.killpg(process.pid, signal.SIGINT)
            code = process.wait(PATIENCE)
            _wait(lambda: not _alive(process.pid), None, err)
        finally:
            if _alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
    return code, out.read_text(), err.read_text()


def _wait(come: Callable[[], bool], process: subprocess.Popen[bytes] | None, err: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not come():
        ended = process is not None and process.poll() is not None
        assert not ended, err.read_text()
        assert time.monotonic() < end, err.read_text()
        time.sleep(0.01)


def _alive(group: int) -> bool:
    """Whether a process of the group still runs; zombies, which still accept signals, do not
    count."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended in the meantime
            # state, parent, group; the name before them may contain anything
            state, _, of = status.read_text().rpartition(")")[2].split()[:3]
            if int(of) == group and state not in "ZX":
                return True
    return False
