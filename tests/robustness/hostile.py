"""Bad content for any file that is parsed, by what is wrong with it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

Spoil = Callable[[Path], object]


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _link_to(target: str) -> Spoil:
    def link(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return link


def _cut(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: len(text) // 2], encoding="utf-8")


def _first_key_twice(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    key = next(iter(json.loads(text)))
    path.write_text(text.replace("{", "{" + f"{json.dumps(key)}: 1, ", 1), encoding="utf-8")


def _with(value: str) -> Spoil:
    """``value`` under a new key of the file's first object."""

    def spoil(path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("{", '{"more": ' + value + ", ", 1), encoding="utf-8")

    return spoil


def _whole(content: bytes) -> Spoil:
    return lambda path: path.write_bytes(content)


NO_FILES: Mapping[str, tuple[Spoil, str]] = {
    "a pipe": (_pipe, "a pipe"),
    "a folder": (_folder, "a folder"),
    "a device": (_link_to("/dev/zero"), "a device"),
    "a circle of links": (_link_to("itself"), ""),
}
"""Instead of a file: how to make it, and what the message says."""

NO_TEXT: Mapping[str, tuple[Spoil, str]] = {
    "empty": (_whole(b""), "not JSON"),
    "one bracket": (_whole(b"{"), "not JSON"),
    "cut": (_cut, "not JSON"),
    "no JSON": (_whole(b"hello: [there"), "not JSON"),
    "zeros": (_whole(b"\0" * 4096), "not JSON"),
    "UTF-16": (_whole('{"a": 1}'.encode("utf-16")), "not UTF-8"),
    "Latin-1": (_whole('{"a": "\xe9t\xe9"}'.encode("latin-1")), "not UTF-8"),
    "a list": (_whole(b"[]"), "list"),
    "a number": (_whole(b"7"), "int"),
    "nothing": (_whole(b"null"), "NoneType"),
}

NO_VALUES: Mapping[str, tuple[Spoil, str]] = {
    "3,000 deep": (_with("[" * 3_000 + "]" * 3_000), "deep"),
    "200,000 deep": (_with("[" * 200_000 + "]" * 200_000), "deep"),
    "200,000 objects deep": (_with('{"a":' * 200_000 + "1" + "}" * 200_000), "deep"),
    "5,000 digits": (_with("9" * 5_000), "digits"),
    "NaN": (_with("NaN"), "NaN"),
    "minus infinity": (_with("-Infinity"), "Infinity"),
    "1e999": (_with("1e999"), "1e999"),
    "a lone surrogate": (_with('"\\ud83d"'), "a lone surrogate"),
    "a key twice": (_first_key_twice, "duplicate"),
}

JSON: Mapping[str, tuple[Spoil, str]] = {**NO_FILES, **NO_TEXT, **NO_VALUES}
