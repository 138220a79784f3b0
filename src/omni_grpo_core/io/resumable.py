"""Long work in steps, in a folder of its own: a run that was killed goes on after its last finished
step.

A step's result is JSON and appears whole. The folder belongs to one task, named by its key, and to
one process at a time: the lock dies with its holder.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_grpo_core.errors import ConfigError, OmniGrpoError
from omni_grpo_core.io.atomic import write_file

_KEY, _LOCK = "key.json", "lock"


@dataclass(slots=True)
class Steps:
    """``resumed``: steps whose results an earlier run left, in the order of :meth:`step`."""

    folder: Path
    resumed: list[str] = field(default_factory=list)

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def step(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of the step ``name``: an earlier run's, else that of ``make``, as JSON."""
        if self.file(name).is_file():
            self.resumed.append(name)
        else:
            text = json.dumps(make(), ensure_ascii=False)
            write_file(self.file(name), text.encode("utf-8", "surrogatepass"))
        return json.loads(self.file(name).read_text("utf-8", "surrogatepass"))

    def empty(self, name: str) -> Path:
        """A folder for what a step makes besides its result; what a killed run left is removed."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder


def begun(folder: Path) -> bool:
    """Whether some task's steps are in the folder."""
    return any((folder / name).is_file() for name in (_KEY, _LOCK))


@contextmanager
def resumable(folder: Path, key: str, *, keep: bool) -> Iterator[Steps]:
    """The steps of the task ``key`` in ``folder``, which is created where it is missing.

    Without ``keep`` the folder is removed when the block succeeds. A folder that this run created
    is removed when an :class:`~omni_grpo_core.errors.OmniGrpoError` ends the block. After anything
    else, Ctrl-C for one, the next run goes on from here.

    Raises:
        ConfigError: the folder holds something else, or another process works in it.
    """
    folder = folder.absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = _locked(folder)
    try:
        _claim(folder, key)
        yield Steps(folder)
        if not keep:
            _remove(folder, made)
    except OmniGrpoError:
        if folder in made:
            _remove(folder, made)
        raise
    finally:
        os.close(lock)


def _locked(folder: Path) -> int:
    """The handle of the folder's lock, held. Its text is the holder's process id, for the message;
    the lock itself is the kernel's, so it is never left behind."""
    path = folder / _LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not begun(folder):
            raise _not_ours(folder, "a folder that is not empty")
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
                os.close(handle)
                raise ConfigError(
                    str(folder),
                    got=f"the same work under way in process {holder}",
                    want="one run at a time",
                    fix="wait for it, or end it: this command then goes on from its last step",
                ) from None
            # its last holder may have removed the folder in between
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    os.pwrite(handle, f"{os.getpid()}".encode().ljust(20), 0)
                    return handle
            os.close(handle)
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_ours(folder, error.strerror or str(error)) from error


def _remove(folder: Path, made: Sequence[Path]) -> None:
    """Results go first: a kill in between leaves none without what else its step made. The key and
    the lock go last: what is left is still this task's own. Parents that were ``made`` go too."""

    def order(path: Path) -> tuple[bool, bool]:
        return path.name in (_KEY, _LOCK), path.suffix != ".json"

    for path in sorted(folder.iterdir(), key=order):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for path in (folder, *made):
        with suppress(OSError):  # by now another run may use it, or it is gone
            path.rmdir()


def _claim(folder: Path, key: str) -> None:
    """Write the folder's key, or compare it with the one that is there."""
    file = folder / _KEY
    if not file.is_file():
        write_file(file, json.dumps({"key": key}).encode())
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        found = None
    if found != {"key": key}:
        raise _not_ours(folder, "the work of another command, or of this one with other inputs")


def _not_ours(folder: Path, got: str) -> ConfigError:
    return ConfigError(
        str(folder),
        got=got,
        want="a new or empty folder, or this command's own unfinished work",
        fix="choose another folder, or remove it if it is not needed",
    )
