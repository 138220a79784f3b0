"""Files and folders that appear whole or not at all, whatever kills the writer.

Everything is written under a hidden name beside its target, flushed to disk, and only then renamed;
readers see a change only at the rename. A killed writer leaves at most a hidden ``.name.*.partial``
behind.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from omni_grpo_core.errors import TraceError

_PARTIAL = re.compile(r"\..*\.[0-9a-f]{12}\.partial", re.DOTALL)
_MOST_OF_NAME = 50
"""Characters, of up to four bytes each; a file name may have 255 bytes."""


def write_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, replacing what was there; missing parent folders are created.

    Raises :class:`~omni_grpo_core.errors.TraceError` if the disk or its permissions forbid it.
    """
    # a link is kept and its target written; "." has no name of its own
    path = Path(os.path.realpath(path))
    with _appearing(path) as partial:
        if path.exists() and not path.is_file():
            raise FileExistsError(errno.EEXIST, "not a regular file", str(path))
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def new_folder(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A hidden folder to write into, which becomes ``path`` if the block succeeds. ``durable``:
    wait until the disk has it. Without, it survives the end of its process, however that comes,
    but not a failure of the machine in the seconds after.

    Raises :class:`~omni_grpo_core.errors.TraceError` if ``path`` exists and is not an empty
    folder: stored data is never overwritten.
    """
    path = Path(os.path.realpath(path))
    with _appearing(path, durable) as partial:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise FileExistsError(errno.EEXIST, "not empty", str(path))
        partial.mkdir()
        yield partial
        for file in (*partial.iterdir(), partial) if durable else ():
            sync(file)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for other processes that have locked ``folder``, and lock it for the block. A lock ends
    with its process, however that ends. Where there is no folder or the file system has no locks,
    nothing is locked.
    """
    handle = None
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def sweep(path: Path) -> None:
    """Remove what killed writers of ``path`` left beside it; no other may be writing it now."""
    path = Path(os.path.realpath(path))
    for partial in path.parent.glob(f".{glob.escape(path.name[:_MOST_OF_NAME])}.*.partial"):
        partial.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Whether a writer works at ``path`` or in it, or left it when it was killed.

    >>> is_partial(Path(".golden.0a1b2c3d4e5f.partial/suite.yaml")), is_partial(Path("a.partial"))
    (True, False)
    """
    return any(_PARTIAL.fullmatch(part) for part in path.parts)


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _appearing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A hidden name beside ``path``. What the block writes there moves to ``path`` on success, and
    is removed on failure."""
    # cut: a name of maximal length leaves no room for more
    partial = path.with_name(f".{path.name[:_MOST_OF_NAME]}.{secrets.token_hex(6)}.partial")
    try:
        with _parents(path):
            try:
                yield partial
                # fails on a folder that another writer filled in the meantime
                partial.replace(path)
            except BaseException:
                if partial.is_dir():
                    shutil.rmtree(partial, ignore_errors=True)
                else:
                    partial.unlink(missing_ok=True)
                raise
        if durable:
            sync(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Create the parent folders of ``path``; those created are removed if the block fails."""
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # used by another writer by now, or never made
                parent.rmdir()
        raise


def _unwritable(path: Path, error: OSError) -> TraceError:
    # os.path does not raise for a name that is too long
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR) and os.path.isdir(path):  # noqa: PTH112
        return TraceError(
            str(path),
            got="a folder that is not empty",
            want="a new or empty folder",
            fix="choose another name, or remove it if it is not needed",
        )
    return TraceError(
        str(path),
        got=f"{type(error).__name__}: {error.strerror or error}",
        want="a writable path",
        fix="check the path, its permissions and the free space",
    )
