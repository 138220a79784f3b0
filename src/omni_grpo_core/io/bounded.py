"""Text that somebody hands over -> plain data, bounded before it is believed.

Whatever is parsed here may be hostile, cut or made by accident: nested until the stack ends,
numbers of thousands of digits, the same key twice, a pipe that never closes. :class:`Unreadable`
says what was found; each reader makes an error of its own stage of it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

MAX_BYTES = 1 << 30
"""A JSON file larger than this is refused unread: rows name their media, they do not hold them."""
MAX_DEPTH = 64
"""Brackets within brackets. Nothing that is read here needs ten."""
MAX_DIGITS = 40
"""Of a whole number: 64 bits have 20."""

_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
"""The last may have no end. Possessive: what is a string is looked at once."""
_NOT_BRACKETS = re.compile(r"[^][{}]+")
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_URL = re.compile(r"(?<![^/])(?:[A-Za-z][A-Za-z0-9+.-]+:/|data:)")

A_URL, A_FOLDER, A_PIPE = "a URL, which is not read", "a folder", "a pipe"
"""What is found in the place of a plain file."""
GZIP = b"\x1f\x8b"
"""How each of its files begins."""


class Unreadable(ValueError):
    """What was found in the place of usable text: ``got``, and the ``line`` where that is known."""

    def __init__(self, got: str, line: int | None = None) -> None:
        super().__init__(got, line)
        self.got = got
        self.line = line

    def place(self, name: str | Path) -> str:
        """``name``, with the line behind it.

        >>> Unreadable("the key 'a' twice", 3).place("run.yaml")
        'run.yaml:3'
        """
        return str(name) if self.line is None else f"{name}:{self.line}"


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """The bytes of a plain file.

    Raises:
        Unreadable: as :func:`plain_file`, or more than ``most`` bytes.
    """
    with plain_file(path) as (file, size):
        if size > most:
            raise Unreadable(f"{size} bytes")
        return file.read(min(size + 1, most))  # as much is set aside at once


def mapping_in(path: Path, load: Callable[[str], Any], most: int = MAX_BYTES) -> dict[str, Any]:
    """The mapping that ``load`` finds in the text of a plain file.

    Raises:
        Unreadable: as :func:`read_text` and ``load``, or for anything else than a mapping.
    """
    content = load(read_text(path, most))
    if not isinstance(content, dict):
        raise Unreadable(type(content).__name__)
    return content


@contextmanager
def plain_file(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A plain file, opened, and its bytes. Pipes, devices and folders are refused unread: a pipe
    can keep its reader waiting for ever.

    Raises:
        Unreadable: no such file, no plain file, no permission.
    """
    try:
        # without waiting for a writer; looked at once it is open, since a name can be replaced
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable(kind_of(status.st_mode))
            yield file, status.st_size
    except Unreadable:
        raise
    except FileNotFoundError:
        url = _URL.search(str(path))  # made absolute, perhaps
        raise Unreadable(A_URL if url else "no such file") from None
    except IsADirectoryError:
        raise Unreadable(A_FOLDER) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, OSError) and error.errno == errno.ENXIO:
            raise Unreadable("a socket") from None
        raise Unreadable(getattr(error, "strerror", None) or str(error)) from None


def is_url(text: str) -> bool:
    """
    >>> is_url("https://example.org/a.mp4"), is_url("data:,a"), is_url("a:b.mp4")
    (True, True, False)
    """
    return _URL.match(text) is not None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def read_text(path: Path, most: int = MAX_BYTES) -> str:
    """The text of a plain file in UTF-8, without a byte order mark.

    Raises:
        Unreadable: as :func:`read_bytes`, or other bytes.
    """
    raw = read_bytes(path, most)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if raw.startswith(GZIP):
            raise Unreadable("a gzip file, which is not unpacked") from None
        line = raw.count(b"\n", 0, error.start) + 1
        raise Unreadable(f"a byte {raw[error.start]:#04x} that is not UTF-8", line) from None


def json_value(text: str, *, finite: bool = True, whole: bool = True) -> Any:
    """What a JSON text says. ``finite=False`` lets NaN and Infinity through, ``whole=False`` halves
    of surrogate pairs, for a reader that says in which of many rows they stand.

    >>> json_value('{"rows": [1, 2.5]}')
    {'rows': [1, 2.5]}

    Raises:
        Unreadable: no JSON; brackets deeper than :data:`MAX_DEPTH`, whole numbers longer than
            :data:`MAX_DIGITS`, a key twice in one object, half a surrogate pair.
    """
    opened = text.count("[") + text.count("{")
    if opened > MAX_DEPTH and depth_of(text) > MAX_DEPTH:
        raise Unreadable(f"brackets more than {MAX_DEPTH} deep")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_without_repeats,
            parse_int=_short_int,
            parse_float=_finite_float if finite else float,
            parse_constant=_no_constant if finite else float,
        )
    except json.JSONDecodeError as error:
        raise Unreadable(f"no JSON ({error.msg} in column {error.colno})", error.lineno) from None
    if whole and _HALF.search(text):
        refuse_half_characters(value)
    return value


def depth_of(text: str) -> int:
    """How deep the brackets of a JSON text go; those inside its strings do not count.

    >>> depth_of('[{"a": "[[["}]')
    2
    """
    brackets = _NOT_BRACKETS.sub("", _STRINGS.sub("", text))
    return max(accumulate(_STEPS[bracket] for bracket in brackets), default=0)


def kind_of(mode: int) -> str:
    """What no plain file is, by the mode of its status."""
    return A_PIPE if stat.S_ISFIFO(mode) else "a device"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise Unreadable(f"the key {key!r} twice")
        found[key] = value
    return found


def _short_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise Unreadable(f"a number of {len(digits)} digits")
    return int(digits)


def _finite_float(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise Unreadable(f"the number {digits[:MAX_DIGITS]}, beyond what a float holds")
    return number


def _no_constant(name: str) -> float:
    raise Unreadable(f"{name} for a number")


def refuse_half_characters(value: Any) -> None:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str) and any("\ud800" <= one <= "\udfff" for one in item):
            raise Unreadable(f"half a surrogate pair in {item[:60]!a}")
        left += _inside(item)


def _inside(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return [*item.keys(), *item.values()]
    return list(item) if isinstance(item, (list, tuple, set)) else []
