"""The table of bad input: a case is a command on something broken, and how it must end.

Every case runs in another process, so a crash of the interpreter, a hang or an exit code is seen as
a shell would see it. It is forked from a process that has loaded the libraries, or started from
scratch (``fresh``) where start-up itself is tested. Cases without code of their own that must be
refused share one: the next case would notice what a refused one left behind.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["preloaded"])
HERE = Path(__file__).parent
GONE = "a pipe that nobody reads"


@dataclass(frozen=True)
class Case:
    """``arguments`` makes the input in an empty folder and returns the command's words.

    ``code``: the expected exit code, or several where library versions differ. ``words``: expected
    in the output. ``limit``: seconds until it counts as a hang; no case takes a tenth of it.
    ``environment``: added to the current one. ``fresh``: a new interpreter (``python -m
    omni_grpo_core``) instead of a fork. Only for fresh ones: ``memory``: bytes of address space;
    ``stdout``: a file that output goes to, or ``GONE``, a pipe that nobody reads; ``shell``: a line
    of bash in which ``"$@"`` is the command. ``silent``: no message is expected.
    """

    name: str
    arguments: Callable[[Path], Sequence[object]]
    code: int | tuple[int, ...] = 2
    words: tuple[str, ...] = ()
    limit: float = 120.0
    environment: Mapping[str, str] = field(default_factory=dict)
    fresh: bool = False
    memory: int | None = None
    stdout: str | None = None
    shell: str = 'exec "$@"'
    silent: bool = False

    def __str__(self) -> str:
        return self.name


def words(*given: object) -> Callable[[Path], Sequence[object]]:
    """``arguments`` of a case that needs no input."""
    return lambda folder: given


@dataclass(frozen=True)
class Outcome:
    """``code``: negative is a signal, ``None`` a hang."""

    code: int | None
    stdout: str
    stderr: str

    @property
    def ending(self) -> str:
        """How it ended, in a word or two, for the summary."""
        if self.code is None:
            return "hang"
        if self.code < 0:
            return f"signal {-self.code}"
        return "traceback" if "Traceback (most recent" in self.stderr else f"exit {self.code}"


def check_case(case: Case, folder: Path, record_property: Callable[[str, object], None]) -> Outcome:
    """Run the case in ``folder`` and compare its ending with the expected one.

    Exit code 2 must come with exactly one message that says item, found, wanted and what to do, one
    JSON object on stdout if requested, and nothing new on disk.
    """
    given = folder / "given"
    given.mkdir()
    words = [str(word) for word in case.arguments(given)]
    before = _listing(folder)
    outcome = run(case, words, folder / "given")
    after = _listing(folder)
    new = sorted(set(after) - set(before))
    changed = sorted(name for name in before if after.get(name) != before[name])
    torn = [name for name in new if name.endswith(".partial")]
    spoiled = outcome.code == 2 and (new or changed)
    record_property("robustness", "half-written" if torn or spoiled else outcome.ending)
    codes = case.code if isinstance(case.code, tuple) else (case.code,)
    shown = f"{words}\nstdout: {outcome.stdout[-2000:]}\nstderr: {outcome.stderr[-4000:]}"
    assert outcome.ending in [f"exit {code}" for code in codes], f"{outcome.ending}: {shown}"
    assert not torn, torn
    if outcome.code == 2:
        assert not spoiled, (new, changed)
        messages = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
        assert len(messages) == (0 if case.silent else 1), shown
        parts = (": found ", ", wanted ", "; ")
        assert all(part in message for message in messages for part in parts), shown
    output = outcome.stderr + outcome.stdout
    assert [word for word in case.words if word not in output] == [], shown
    if "--json" in words and case.stdout is None:
        result = json.loads(outcome.stdout)
        assert isinstance(result, dict), shown
        assert ("error" in result) == (outcome.code == 2), shown
    return outcome


def run(case: Case, words: Sequence[str], folder: Path) -> Outcome:
    """Run the command in ``folder``, to its end or the case's limit."""
    scratch = folder.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    out, err = scratch / "stdout", scratch / "stderr"
    environment = {**os.environ, "TMPDIR": str(scratch), **case.environment}
    code = (_fresh if case.fresh else _forked)(case, words, folder, environment, out, err)
    stdout, stderr = (
        path.read_bytes().decode("utf-8", "backslashreplace") if path.is_file() else ""
        for path in (out, err)
    )
    for path in scratch.iterdir():
        if path.is_file() and path.name.startswith("omni-grpo-"):
            stderr += path.read_text(encoding="utf-8")  # why it ended with 3
    shutil.rmtree(scratch)  # with what libraries left there
    return Outcome(code, stdout, stderr)


def _forked(
    case: Case,
    words: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    out: Path,
    err: Path,
) -> int | None:
    arguments = (tuple(words), folder, dict(environment), out, err)
    if case.code == 2 and not any(folder.rglob("*.py")):
        return Shared.run(arguments, case.limit)
    return forked(_child, arguments, case.limit)


class Shared:
    """A process that runs one command after another, until one is not refused."""

    process: BaseProcess | None = None
    link: Connection

    @classmethod
    def run(cls, arguments: tuple[object, ...], limit: float) -> int | None:
        if cls.process is None:
            cls.link, theirs = CONTEXT.Pipe()
            cls.process = start(_in_a_group, _serve, theirs)
            theirs.close()
            atexit.register(cls.link.close)  # else both wait for each other's end
        cls.link.send(arguments)
        try:
            code: int | None = cls.link.recv() if cls.link.poll(limit) else None
        except EOFError:
            cls.process.join()
            code = cls.process.exitcode
        if code != 2:
            with suppress(ProcessLookupError):
                os.killpg(cls.process.pid or 0, signal.SIGKILL)
            cls.process.join()
            cls.process = None
            cls.link.close()
        return code


def forked(target: Callable[..., None], arguments: tuple[object, ...], limit: float) -> int | None:
    """How a call ends in a separate process: exit code, negative signal, or ``None`` for a hang."""
    child = start(_in_a_group, target, *arguments)
    child.join(limit)
    if child.is_alive():
        os.killpg(child.pid or 0, signal.SIGKILL)
        child.join()
        return None
    code: int | None = child.exitcode
    return code


def start(target: Callable[..., object], *arguments: object) -> BaseProcess:
    """A process forked from the one that has loaded the libraries."""
    with pytest.MonkeyPatch.context() as patch:
        # the fork server finds the preloaded modules by the path in its environment
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, sys.path)]))
        child = CONTEXT.Process(target=target, args=arguments)
        child.start()
    return child


def _in_a_group(target: Callable[..., None], *arguments: object) -> None:
    os.setsid()
    target(*arguments)


def _serve(link: Connection) -> None:
    path, environment = [*sys.path], {**os.environ}
    with suppress(EOFError):  # the tests are over
        while True:
            code = _run_here(*link.recv())
            sys.stdout.flush()
            sys.stderr.flush()
            os.chdir(HERE)
            sys.path[:] = path
            os.environ.clear()
            os.environ.update(environment)
            tempfile.tempdir = None  # each case has its own
            link.send(code)


def _child(*arguments: Any) -> None:
    sys.exit(_run_here(*arguments))


def _run_here(
    words: Sequence[str], folder: Path, environment: dict[str, str], out: Path, err: Path
) -> int:
    from omni_grpo_core.cli.main import app
    from omni_grpo_core.io.exits import run as run_command

    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(folder))  # as python -m does
    sys.argv[:] = ["omni-grpo", *words]
    return run_command(lambda: app, words)


def _fresh(
    case: Case,
    words: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    out: Path,
    err: Path,
) -> int | None:
    def limited() -> None:
        if case.memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (case.memory, case.memory))

    command = [sys.executable, "-m", "omni_grpo_core", *words]
    with _target(case, out) as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            ["bash", "-c", case.shell, "bash", *command],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            preexec_fn=limited,
            start_new_session=True,
        )
        try:
            return process.wait(case.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def _target(case: Case, out: Path) -> IO[bytes]:
    if case.stdout != GONE:
        return Path(case.stdout or out).open("wb")
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "wb")


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file in a folder."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }
