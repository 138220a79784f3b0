"""JSON formatted for reading: an array of plain items or a tensor reference stays on one line, the
rest is indented."""

from __future__ import annotations

import json
from typing import Any

from omni_grpo_core.errors import TraceError
from omni_grpo_core.io.bounded import Unreadable, json_value

_ONE_LINE = 96


def dumps(data: Any, indent: int = 0) -> str:
    """
    >>> print(dumps({"ids": (1, 2, 3), "spans": [{"modality": "video", "start": 4}]}))
    {
     "ids": [1, 2, 3],
     "spans": [{"modality": "video", "start": 4}]
    }
    """
    if not isinstance(data, dict | list | tuple) or not data:
        return _flat(data)
    if isinstance(data, dict):
        plain = "$tensor" in data
    else:
        plain = not any(isinstance(item, dict | list | tuple) for item in data)
    if plain:
        return _flat(data)
    inner = indent + 1
    if isinstance(data, dict):
        parts = [f"{_flat(key)}: {dumps(item, inner)}" for key, item in data.items()]
        opening, closing = "{", "}"
    else:
        parts = [dumps(item, inner) for item in data]
        opening, closing = "[", "]"
    # a part of several lines is itself too long for one
    flat = f"{opening}{', '.join(parts)}{closing}"
    if indent and len(flat) + indent <= _ONE_LINE and "\n" not in flat:
        return flat
    gap = "\n" + " " * inner
    return f"{opening}{gap}{f',{gap}'.join(parts)}\n{' ' * indent}{closing}"


_flat = json.JSONEncoder(ensure_ascii=False).encode


def loads(raw: bytes, name: str) -> Any:
    """Parse the file ``name``. Raises :class:`~omni_grpo_core.errors.TraceError` with its line."""
    try:
        # surrogatepass: Python represents file names that are not UTF-8 with lone surrogates
        return json_value(raw.decode("utf-8", "surrogatepass"))
    except Unreadable as error:
        item, got = error.place(name), error.got
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        item, got = f"{name}:{line}", f"a byte {raw[error.start]:#04x} that is not UTF-8"
    raise TraceError(
        item,
        got=got,
        want="the JSON as it was written",
        fix="record it again: it was cut or altered",
    )
