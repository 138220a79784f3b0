"""A data file -> its rows: JSON objects with file and row number. Half of ``sample.py``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from omni_grpo_core.errors import DataError
from omni_grpo_core.io.bounded import Unreadable, json_value, read_text


@dataclass(frozen=True, slots=True)
class DataRow:
    """One JSON object of a data file. ``number``: row, or line in JSONL, from 1."""

    file: Path
    number: int
    values: Mapping[str, Any]

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


def read_rows(file: Path) -> Iterator[DataRow]:
    """The rows of a JSON list or of JSONL. Raises DataError for anything else."""
    try:
        text = read_text(file)
    except Unreadable as error:
        raise DataError(
            error.place(file), got=error.got, want="a JSON or JSONL file in UTF-8",
            fix="check the path",
        ) from None  # fmt: skip
    try:
        whole = json_value(text, finite=False, whole=False)
    except Unreadable as error:
        if text.lstrip().startswith("["):
            raise _not_json(file, error) from None
        yield from _lines(file, text)
        return
    if isinstance(whole, dict) and ("problem" in whole or "q" in whole):
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
    return DataRow(file, number, values)
