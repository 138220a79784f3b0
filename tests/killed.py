"""A process that dies at a chosen change to the disk, so that no test depends on timing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

_CHANGES = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"})
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def die_before_change(number: int | None) -> Callable[[], int]:
    """``kill -9`` this process when Python is about to create, open for writing, move or remove its
    ``number``-th file or folder from now on (the first is 0). A kill between two changes leaves the
    same state as one at the next change. ``None``: only count.

    Returns a function that returns the number of changes so far. Cannot be undone: for a process
    of its own.
    """
    seen = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
        if writes or event in _CHANGES:
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(watch)
    return lambda: seen
