"""A data file -> its rows: mappings with file and row number. Half of ``sample.py``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from omni_grpo_core.core.tables import HUB, table_rows
from omni_grpo_core.errors import DataError
from omni_grpo_core.io.bounded import Unreadable, json_value, read_text

_KEYS = {"problem", "q", "prompt", "messages", "conversations"}
"""One of them is in a row of every format."""


@dataclass(frozen=True, slots=True)
class DataRow:
    """One row of a data file. ``number``: row, or line in JSONL, from 1. ``folder``: where
    relative media paths begin."""

    file: Path
    number: int
    values: Mapping[str, Any]
    folder: Path

    @property
    def origin(self) -> str:
        return f"{self.file}:{self.number}"

    def fail(self, got: str, want: str, fix: str = "correct the row") -> NoReturn:
        """Refuse this row."""
        raise DataError(self.origin, got=got, want=want, fix=fix)

    def text(self, key: str) -> str:
        """The text under ``key``. Raises DataError if there is none."""
        value = self.values.get(key)
        if key not in self.values:
            self.fail(f"no {key!r}", f"a non-empty string under {key!r}")
        if not is_text(value):
            self.fail(f"{key} {short(value)}", f"a non-empty string under {key!r}")
        return cast(str, value)


def is_text(value: Any) -> bool:
    """A non-blank string without the lone surrogates that JSON allows."""
    if not isinstance(value, str) or not value.strip():
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def short(value: Any) -> str:
    """A value as shown in an error message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_file(path: Path) -> bool:
    """Whether it is a file; a name that none can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL in it
        return False


def read_rows(source: Path | str) -> Iterator[DataRow]:
    """The rows of a JSON list, JSONL, parquet or arrow file, of a folder of ``datasets``, or of
    ``hub:NAME``; ``:SPLIT`` after a folder or name chooses a split. Raises DataError for anything
    else."""
    name, split = _split_of(str(source))
    rows = table_rows(name, split)
    if rows is None:
        yield from _of_text(Path(source))
        return
    path = Path(name)
    folder = path if path.is_dir() else Path() if name.startswith(HUB) else path.parent
    for number, values in enumerate(rows, 1):
        yield DataRow(Path(name), number, values, folder)


def local_path(source: str) -> Path | None:
    """The file or folder of a data set; ``None`` for one on the Hub."""
    name, _ = _split_of(source)
    return None if name.startswith(HUB) else Path(name)


def _split_of(source: str) -> tuple[str, str | None]:
    """
    >>> _split_of("hub:org/name:test"), _split_of("hub:org/name"), _split_of("rows.json")
    (('hub:org/name', 'test'), ('hub:org/name', None), ('rows.json', None))
    """
    name, colon, split = source.rpartition(":")
    if colon and name and name != HUB.rstrip(":") and (name.startswith(HUB) or Path(name).is_dir()):
        return name, split
    return source, None


def _of_text(file: Path) -> Iterator[DataRow]:
    try:
        text = read_text(file)
    except Unreadable as error:
        raise DataError(
            error.place(file), got=error.got,
            want="a JSON, JSONL, parquet or arrow file; text in UTF-8",
            fix=f"check the path; a data set on the Hub is written {HUB}org/name",
        ) from None  # fmt: skip
    try:
        whole = json_value(text, finite=False, whole=False)
    except Unreadable as error:
        if text.lstrip().startswith("["):
            raise _not_json(file, error) from None
        yield from _lines(file, text)
        return
    if isinstance(whole, dict) and not _KEYS.isdisjoint(whole):
        whole = [whole]  # JSONL of one line
    if not isinstance(whole, list):
        raise DataError(
            str(file),
            got=f"JSON that is a {type(whole).__name__}",
            want="a list of rows, or JSONL",
            fix="save the rows themselves",
        )
    for number, values in enumerate(whole, 1):
        yield _row(file, number, values)


def _lines(file: Path, text: str) -> Iterator[DataRow]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json_value(line, finite=False, whole=False)
        except Unreadable as error:
            raise _not_json(file, Unreadable(error.got, number)) from None
        yield _row(file, number, values)


def _not_json(file: Path, error: Unreadable) -> DataError:
    return DataError(
        error.place(file),
        got=error.got,
        want="a JSON list in the file, or one JSON object per line",
        fix="correct the file",
    )


def _row(file: Path, number: int, values: Any) -> DataRow:
    if not isinstance(values, dict):
        raise DataError(
            f"{file}:{number}",
            got=f"{short(values)}",
            want="a JSON object",
            fix="correct the row",
        )
    return DataRow(file, number, values, file.parent)
