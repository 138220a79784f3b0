"""Untrusted text -> plain data, with bounds checked first.

Input may be hostile, truncated or made by accident: nested until the stack overflows, numbers of
thousands of digits, duplicate keys, a pipe that never closes. :class:`Unreadable` says what was
found; each reader turns it into an error of its own stage.
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
"""A larger JSON file is refused unread: rows reference media, they do not contain them."""
MAX_DEPTH = 64
"""Nested brackets. No legitimate input needs ten."""
MAX_DIGITS = 40
"""Digits of an integer; 64 bits need 20."""

_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
"""The last one may be unterminated. Possessive, so every string is scanned once."""
_NOT_BRACKETS = re.compile(r"[^][{}]+")
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_URL = re.compile(r"(?<![^/])(?:[A-Za-z][A-Za-z0-9+.-]+:/|data:)")

A_URL, A_FOLDER, A_PIPE = "a URL, which is not read", "a folder", "a pipe"
"""Found instead of a regular file."""
GZIP = b"\x1f\x8b"
"""The first bytes of every gzip file."""


class Unreadable(ValueError):
    """What was found instead of usable text: ``got``, and its ``line`` if known."""

    def __init__(self, got: str, line: int | None = None) -> None:
        super().__init__(got, line)
        self.got = got
        self.line = line

    def place(self, name: str | Path) -> str:
        """``name``, followed by the line.

        >>> Unreadable("duplicate key 'a'", 3).place("run.yaml")
        'run.yaml:3'
        """
        return str(name) if self.line is None else f"{name}:{self.line}"


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file.

    Raises:
        Unreadable: as :func:`plain_file`, or more than ``most`` bytes.
    """
    with plain_file(path) as (file, size):
        if size > most:
            raise Unreadable(f"{size} bytes")
        return file.read(min(size + 1, most))  # this much is allocated at once


def mapping_in(path: Path, load: Callable[[str], Any], most: int = MAX_BYTES) -> dict[str, Any]:
    """The mapping that ``load`` makes of the text of a regular file.

    Raises:
        Unreadable: as :func:`read_text` and ``load``, or anything but a mapping.
    """
    content = load(read_text(path, most))
    if not isinstance(content, dict):
        raise Unreadable(type(content).__name__)
    return content


@contextmanager
def plain_file(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, opened, and its size in bytes. Pipes, devices and folders are refused unread:
    a pipe can block its reader for ever.

    Raises:
        Unreadable: no such file, not a regular file, no permission.
    """
    try:
        # without waiting for a writer; checked once open, since the name can be replaced
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable(kind_of(status.st_mode))
            yield file, status.st_size
    except Unreadable:
        raise
    except FileNotFoundError:
        url = _URL.search(str(path))  # perhaps made absolute
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
    """The text of a regular UTF-8 file, without a byte order mark.

    Raises:
        Unreadable: as :func:`read_bytes`, or not UTF-8.
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
    """Parse a JSON text. ``finite=False`` lets NaN and Infinity through, ``whole=False`` lone
    surrogates, for a reader that reports which of many rows contains them.

    >>> json_value('{"rows": [1, 2.5]}')
    {'rows': [1, 2.5]}

    Raises:
        Unreadable: not JSON; brackets deeper than :data:`MAX_DEPTH`, integers longer than
            :data:`MAX_DIGITS`, a duplicate key in an object, a lone surrogate.
    """
    opened = text.count("[") + text.count("{")
    if opened > MAX_DEPTH and depth_of(text) > MAX_DEPTH:
        raise Unreadable(f"brackets nested more than {MAX_DEPTH} deep")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_without_repeats,
            parse_int=_short_int,
            parse_float=_finite_float if finite else float,
            parse_constant=_no_constant if finite else float,
        )
    except json.JSONDecodeError as error:
        raise Unreadable(f"not JSON ({error.msg} in column {error.colno})", error.lineno) from None
    if whole and _HALF.search(text):
        refuse_lone_surrogates(value)
    return value


def depth_of(text: str) -> int:
    """How deep the brackets of a JSON text nest, not counting those inside strings.

    >>> depth_of('[{"a": "[[["}]')
    2
    """
    brackets = _NOT_BRACKETS.sub("", _STRINGS.sub("", text))
    return max(accumulate(_STEPS[bracket] for bracket in brackets), default=0)


def kind_of(mode: int) -> str:
    """What something other than a regular file is, by its mode."""
    if stat.S_ISDIR(mode):
        return A_FOLDER
    return A_PIPE if stat.S_ISFIFO(mode) else "a device"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise Unreadable(f"duplicate key {key!r}")
        found[key] = value
    return found


def _short_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise Unreadable(f"a number of {len(digits)} digits")
    return int(digits)


def _finite_float(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise Unreadable(f"the number {digits[:MAX_DIGITS]}, beyond the range of a float")
    return number


def _no_constant(name: str) -> float:
    raise Unreadable(f"{name} for a number")


def refuse_lone_surrogates(value: Any) -> None:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str) and any("\ud800" <= one <= "\udfff" for one in item):
            raise Unreadable(f"a lone surrogate in {item[:60]!a}")
        left += _inside(item)


def _inside(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return [*item.keys(), *item.values()]
    return list(item) if isinstance(item, (list, tuple, set)) else []
