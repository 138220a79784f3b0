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
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, BinaryIO

import yaml

MAX_BYTES = 1 << 30
"""A JSON file larger than this is refused unread: rows name their media, they do not hold them."""
MAX_YAML_BYTES = 1 << 20
"""PyYAML reads about 100 kB a second; settings are a few of them."""
MAX_DEPTH = 64
"""Brackets within brackets. Nothing that is read here needs ten."""
MAX_DIGITS = 40
"""Of a whole number: 64 bits have 20."""
MAX_NODES = 100_000
"""Values of a YAML file, references counted each time: ten lines can stand for a billion."""

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
        _refuse_half_characters(value)
    return value


def yaml_value(text: str) -> Any:
    """What a YAML text, or a JSON one, says; nothing but plain data.

    >>> yaml_value("settings: {group_size: 8}")
    {'settings': {'group_size': 8}}

    Raises:
        Unreadable: no YAML; a key twice in one mapping, values more than :data:`MAX_DEPTH` deep or
            more than :data:`MAX_NODES`, half a surrogate pair.
    """
    loader = None
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        _refuse_sprawl(node)
        value = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        got = " ".join(str(error.problem or error.context).split())
        raise Unreadable(f"no YAML ({got})", None if mark is None else mark.line + 1) from None
    except RecursionError:
        raise Unreadable(f"values more than {MAX_DEPTH} deep") from None
    except yaml.YAMLError as error:
        raise Unreadable(f"no YAML ({' '.join(str(error).split())[:200]})") from None
    finally:
        if loader is not None:
            loader.dispose()
    _refuse_half_characters(value)
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


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's own takes the last of two equal keys without a word, as it takes ``010`` for 8 and
    ``1:04`` for 64; of a scalar whose tag does not fit, it raises whatever comes of that."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        line = node.start_mark.line + 1
        try:
            value = super().construct_object(node, deep=deep)
        except (Unreadable, yaml.YAMLError, RecursionError):
            raise
        except Exception:
            kind = node.tag.rpartition(":")[2]
            raise Unreadable(f"{str(node.value)[:60]!r} as {kind}", line) from None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            digits = node.value.lstrip("+-")
            if ":" in digits:
                raise Unreadable(f"{node.value[:60]!r}, which is {value} or a time", line)
            if isinstance(value, int) and re.fullmatch("0[0-7_]+", digits):
                raise Unreadable(f"{node.value[:60]!r}, which is {value} or {int(digits)}", line)
            if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
                raise Unreadable(f"a number of more than {MAX_DIGITS} digits", line)
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below
            if key in seen:
                raise Unreadable(f"the key {key!r} twice", key_node.start_mark.line + 1)
            seen.add(key)
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return found


def _refuse_sprawl(root: Any) -> None:
    """Before anything is made of a YAML text: what is referred to is counted once, and then known;
    merged or not, it may be copied each time."""
    known: dict[int, tuple[int, int]] = {}

    def measured(node: Any, depth: int) -> tuple[int, int]:
        """Values, and how deep they go."""
        if depth > MAX_DEPTH:  # a list within itself too
            raise Unreadable(f"values more than {MAX_DEPTH} deep")
        if id(node) not in known:
            inside = node.value if isinstance(node, yaml.CollectionNode) else ()
            if isinstance(node, yaml.MappingNode):
                inside = chain.from_iterable(inside)
            sizes = [measured(inner, depth + 1) for inner in inside]
            known[id(node)] = (
                1 + sum(size for size, _ in sizes),
                1 + max((deep for _, deep in sizes), default=0),
            )
        size, deep = known[id(node)]
        if depth - 1 + deep > MAX_DEPTH:
            raise Unreadable(f"values more than {MAX_DEPTH} deep")
        if size > MAX_NODES:
            raise Unreadable(f"more than {MAX_NODES} values, each reference counted")
        return size, deep

    if root is not None:
        measured(root, 1)


def _refuse_half_characters(value: Any) -> None:
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
