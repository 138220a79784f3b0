"""Every option of every command, given unusable values. The cases are generated from the commands,
so none is forgotten."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path

import pytest
from command_line import COMMANDS, Command, Option
from runner import Case, check_case, words

from omni_grpo_core import tiny

FILES = {
    ("bench", "--out"),
    ("bench", "--png"),
    ("check", "--html"),
    ("check", "--junit"),
    ("doctor", "--html"),
    ("golden check", "--html"),
    ("golden check", "--junit"),
    ("golden check", "--markdown"),
    ("golden diff", "--html"),
    ("golden init", "--html"),
    ("upgrade", "--html"),
    ("versions compare", "--data"),
    ("versions compare", "--into"),
}
FOLDERS = {
    ("check", "--trace"),
    ("golden init", "folder"),
    ("realvocab build", "out"),
    ("tiny build", "out"),
    ("upgrade", "--work"),
}
"""These are written. Every other path is read."""

# the least work that reads an option
LEAST = {
    "bench": ("--way", "fast", "--tokens", "1"),
    "check": ("--limit", "1"),
    "golden check": ("--device", "cpu"),
    "upgrade": ("--checkpoint", str(tiny.checkpoint_dir())),
}


def _folder(at: Path) -> None:
    at.mkdir()
    (at / "something").write_text("a note")


def _empty(at: Path) -> None:
    at.touch()


def _garbage(at: Path) -> None:
    at.write_bytes(bytes(range(256)) * 40)


def _pipe(at: Path) -> None:
    os.mkfifo(at)


def _socket(at: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(at.parent)  # the name of a socket is at most 107 bytes
        made.bind(at.name)
        os.chdir(here)


def _loop(at: Path) -> None:
    at.symlink_to(at.name)


def _nothing(at: Path) -> None:
    return


READ = {
    "missing": _nothing,
    "folder": _folder,
    "empty": _empty,
    "garbage": _garbage,
    "pipe": _pipe,
    "loop": _loop,
}
"""What a path to read may lead to."""
WRITTEN = {"pipe": _pipe, "socket": _socket, "loop": _loop, "folder": _folder}
NAMES = {
    "device": "/dev/null",
    "stdout": "/dev/stdout",
    "no folder": "gone/out",
    "through a file": "/etc/passwd/out",
    "not writable": "/proc/out",
    "too long": "x" * 300,
    "NUL": "a\0b",
    "empty name": "",
}


def _used(option: Option, value: object) -> list[object]:
    return [value] if option.flag is None else [option.flag, value]


def _case(
    command: Command, option: Option, what: str, make: Callable[[Path], object], value: str = "it"
) -> Case:
    def arguments(folder: Path) -> Sequence[object]:
        make(folder / "it")
        least = LEAST.get(command.name, ())
        return [*command.given(without=option), *least, *_used(option, value)]

    return Case(f"{command.name} {option.flag or option.name}: {what}", arguments)


def _typed() -> Iterator[Case]:
    for command in COMMANDS:
        for flags in (["--nonsense"], ["--nonsense", "--json"]):
            yield _of(command, flags, "--nonsense", command.given())
        if any(option.required for option in command.options):
            yield _of(command, [], "Missing argument", command.words)
        for option in command.options:
            for wrong in _wrong(option):
                word = option.flag or option.name
                yield _of(command, wrong, word, command.given(without=option))


def _of(command: Command, flags: Sequence[str], word: str, given: Sequence[str]) -> Case:
    name = " ".join((command.name, *(flag or "''" for flag in flags)))
    return Case(f"{name} is typed", words(*given, *flags), words=(word,))


def _wrong(option: Option) -> Iterator[list[str]]:
    if option.flag is None:
        return
    if option.kind is bool:
        yield [f"{option.flag}=x"]
        return
    yield [option.flag]  # and no value
    if option.kind in (int, float) or issubclass(option.kind, Enum):
        yield [option.flag, "x"]
        yield [option.flag, ""]
    if option.kind is int and option.name != "seed":
        yield [option.flag, "-1"]


def _paths() -> Iterator[Case]:
    for command in COMMANDS:
        for option in command.options:
            if option.kind is not Path:
                continue
            place = (command.name, option.flag or option.name)
            if place in FILES | FOLDERS:
                for what, make in WRITTEN.items():
                    yield _case(command, option, what, make)
                for what, value in NAMES.items():
                    yield _case(command, option, what, _nothing, value)
                if place in FOLDERS:
                    yield _case(command, option, "file", _garbage)
            else:
                for what, make in READ.items():
                    # a folder without goldens or exact values is yet to be filled
                    if (option.flag, what) not in (("--golden", "folder"), ("--sidecar", "folder")):
                        yield _case(command, option, what, make)


CASES = (*_typed(), *_paths())


@pytest.mark.parametrize(
    "case",
    [
        # its child processes load the libraries before they check
        pytest.param(case, marks=pytest.mark.slow)
        if case.name.startswith("golden calibrate --checkpoint:")
        else case
        for case in CASES
    ],
    ids=str,
)
def test_ends_as_it_should(
    case: Case, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check_case(case, tmp_path, record_property)
