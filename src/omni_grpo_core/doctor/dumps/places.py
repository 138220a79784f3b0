"""Files of a dump, lines of a file, and what is said where they are not what a trainer writes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_grpo_core.errors import TraceError
from omni_grpo_core.io.bounded import Unreadable, json_value, read_text


@dataclass(frozen=True, slots=True)
class Place:
    """Where something of a dump is, for error messages. ``name``: a file, or a file and line.
    ``wanted``: what such a place holds, in words; ``fix``: what to do where it does not."""

    name: str
    wanted: str
    fix: str

    def error(self, got: str, want: str = "") -> TraceError:
        return TraceError(self.name, got=got, want=want or self.wanted, fix=self.fix)

    def inside(self, what: str) -> Place:
        return Place(f"{self.name}: {what}", self.wanted, self.fix)


def files_of(path: Path, suffix: str, place: Place, *folders: str) -> list[Path]:
    """The file that was given, or those with this suffix in the given folder (or in the first of
    its ``folders`` that exists), numbers in their names in order.

    Raises:
        TraceError: there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        got = "no such file or folder" if not path.exists() else "neither file nor folder"
        raise place.error(got)
    inside = next((path / name for name in folders if (path / name).is_dir()), path)
    found = sorted((p for p in inside.iterdir() if p.name.endswith(suffix)), key=_order)
    if not found:
        raise place.error(f"a folder without any {suffix} file")
    return found


def _order(path: Path) -> tuple[list[int], str]:
    digits = "".join(c if c.isdigit() else " " for c in path.stem).split()
    return [int(number[:18]) for number in digits], path.name


def json_lines(path: Path, place: Place) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with its place.

    Raises:
        TraceError: it cannot be read, or a line is not an object.
    """
    try:
        text = read_text(path)
    except Unreadable as error:
        raise Place(error.place(path), place.wanted, place.fix).error(error.got) from None
    lines = text.split("\n")  # other line ends may be inside strings
    if not any(map(str.strip, lines)):
        raise Place(str(path), place.wanted, place.fix).error("an empty file")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        at = Place(f"{path}:{number}", place.wanted, place.fix)
        try:
            # reward functions that could not score leave NaN
            value = json_value(line, finite=False)
        except Unreadable as error:
            raise at.error(error.got) from None
        if not isinstance(value, dict):
            raise at.error(f"a {type(value).__name__}")
        yield at, value


def required(held: Mapping[str, Any], names: Sequence[str], place: Place) -> None:
    """Raises:
    TraceError: one of the keys is missing.
    """
    missing = [name for name in names if name not in held]
    if missing:
        keys = ", ".join(map(str, list(held)[:12])) or "none"
        raise place.error(f"no {' or '.join(missing)} (its keys: {keys})")


def text_of(value: Any, place: Place) -> str:
    """A text, or the texts of a conversation, one message after the other.

    Raises:
        TraceError: it is neither.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        return "\n".join(filter(None, (_content(one.get("content")) for one in value)))
    raise place.error(f"a {type(value).__name__}", "a text or a list of messages")


def _content(content: Any) -> str:
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, dict))
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def number_of(value: Any, place: Place) -> float | None:
    """A number; ``None`` for null and NaN.

    Raises:
        TraceError: it is neither.
    """
    if value is None:
        return None
    if not isinstance(value, int | float):
        raise place.error(f"{value!r}"[:80], "a number")
    return None if math.isnan(value) else float(value)
