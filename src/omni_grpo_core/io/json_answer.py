"""What ``--json`` puts on stdout: one object, and nothing beside it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

_stdout: TextIO | None = None


@contextmanager
def json_alone() -> Iterator[None]:
    """Meanwhile whatever else is printed, by a library or somebody's reward, goes to stderr."""
    global _stdout
    _stdout = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout = None


def print_json(data: Any) -> None:
    """One JSON object on stdout, in whatever encoding it has; numbers that JSON lacks are null."""
    stdout = _stdout or sys.stdout
    plain = (getattr(stdout, "encoding", None) or "utf-8").lower().replace("-", "") != "utf8"
    try:
        text = json.dumps(data, ensure_ascii=plain, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(data), ensure_ascii=plain)
    print(text, file=stdout)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
