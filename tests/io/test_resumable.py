"""Work in steps: killed at any moment it goes on, and it is never done twice at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from killed import die_before_change

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.resumable import resumable

STEPS = ("plan", "record", "check")


def work(folder: Path, made: list[str], *, keep: bool = True, key: str = "k") -> list[str]:
    """Three steps, each of which leaves a folder too; returns those that were resumed."""

    def make(name: str) -> Callable[[], object]:
        def step() -> object:
            made.append(name)
            own = steps.empty(f"made by {name}")
            own.mkdir()
            (own / "file").write_text(name)
            return {"name": name, "text": "ü\ud800"}

        return step

    with resumable(folder, key, keep=keep) as steps:
        for name in STEPS:
            assert steps.step(name, make(name)) == {"name": name, "text": "ü\ud800"}
            assert (folder / f"made by {name}/file").read_text() == name
        return steps.resumed


def test_a_finished_step_is_not_done_again(tmp_path: Path) -> None:
    made: list[str] = []
    folder = tmp_path / "a/b"
    assert work(folder, made) == []
    (folder / "check.json").unlink()
    assert work(folder, made) == ["plan", "record"]
    assert made == [*STEPS, "check"]


def test_what_succeeded_is_removed_unless_it_is_kept(tmp_path: Path) -> None:
    work(tmp_path / "gone/with its parent", [], keep=False)
    work(tmp_path / "kept", [])
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def killed(folder: Path, number: int | None) -> tuple[int, int]:
    """The work in a process of its own, killed before that change to the disk -> exit status and
    the number of changes."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        changes = die_before_change(number)
        work(folder, [], keep=False)
        os.write(write, str(changes()).encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(read) as found:
        return os.waitstatus_to_exitcode(status), int(found.read() or 0)


def test_killed_before_any_change_it_goes_on_to_the_same_end(tmp_path: Path) -> None:
    code, changes = killed(tmp_path / "whole", None)
    assert (code, list(tmp_path.iterdir())) == (0, [])
    assert changes > 20
    for number in range(changes):
        folder = tmp_path / str(number)
        assert killed(folder, number)[0] == -signal.SIGKILL
        work(folder, [], keep=False)
        assert not folder.exists()


HOLDER = """
import sys
from pathlib import Path
from omni_grpo_core.io.resumable import resumable
with resumable(Path(sys.argv[1]), "k", keep=True) as steps:
    print(steps.folder, flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_and_a_dead_one_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    path = os.pathsep.join(filter(None, sys.path))
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(ConfigError, match=f"under way in process {holder.pid}, wanted one run"):
            work(folder, [])
        assert folder.is_dir()
        holder.kill()
    made: list[str] = []
    work(folder, made)
    assert made == [*STEPS]


def test_an_error_leaves_nothing_that_this_run_made(tmp_path: Path) -> None:
    error = ConfigError("index", got="no answer", want="an index", fix="check it")

    def stopped(folder: Path, by: BaseException) -> None:
        with resumable(folder, "k", keep=True) as steps:
            steps.step("plan", dict)
            raise by

    with pytest.raises(ConfigError):
        stopped(tmp_path / "a/b/c", error)
    assert list(tmp_path.iterdir()) == []
    # a folder of an earlier run is kept, and so is this run's after Ctrl-C
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "c", KeyboardInterrupt())
    with pytest.raises(ConfigError):
        stopped(tmp_path / "c", error)
    assert (tmp_path / "c/plan.json").is_file()


@pytest.mark.parametrize("what", ["a file in it", "another key", "a broken key", "a file"])
def test_a_folder_of_something_else_is_left_alone(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    if what == "a file":
        folder.write_text("mine")
    else:
        folder.mkdir()
        name = "notes.txt" if what == "a file in it" else "key.json"
        text = json.dumps({"key": "other"}) if what == "another key" else "mine"
        (folder / name).write_text(text)
    with pytest.raises(ConfigError, match="wanted a new or empty folder"):
        work(folder, [])
    assert folder.exists()
    assert not list(tmp_path.rglob("plan.json"))
