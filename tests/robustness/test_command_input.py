"""Broken terminals, folders, environments and machines. Mistyped commands are in
test_every_option.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from runner import GONE, Case, check_case, words

GB = 1 << 30
# commands that print within half a second
QUICK: dict[str, tuple[str, ...]] = {
    "version": ("--version",),
    "help": ("--help",),
    "a list": ("faults", "--list"),
    "a list as JSON": ("faults", "--list", "--json"),
    "a table": ("rewards", "test", "format"),
    "a table as JSON": ("rewards", "test", "format", "--json"),
}
ENCODINGS: dict[str, dict[str, str]] = {
    **{name: {"PYTHONIOENCODING": name} for name in ("ascii", "latin-1", "cp1252", "utf-16")},
    "of the C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
ENVIRONMENTS: dict[str, dict[str, str]] = {
    **{f"COLUMNS={width}": {"COLUMNS": width} for width in ("0", "1", "x", "-5", "99999999999")},
    "TERMINAL_WIDTH=x": {"TERMINAL_WIDTH": "x"},
    "a dumb terminal": {"TERM": "dumb", "NO_COLOR": "1"},
    "an unknown terminal": {"TERM": "xyz", "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"},
    "no home": {"HOME": "/nowhere", "XDG_CACHE_HOME": "/proc", "HF_HOME": "/proc"},
    "an empty home": {"HOME": ""},
    "no temporary folder": {"TMPDIR": "/nowhere"},
}


def _terminals() -> Iterator[Case]:
    for name, command in QUICK.items():
        given = words(*command)
        yield Case(f"{name}, stdout is full", given, fresh=True, stdout="/dev/full")
        yield Case(f"{name}, nobody reads", given, fresh=True, stdout=GONE, silent=True)
        for closed in (">&-", ">&- 2>&- <&-", "1</dev/null 2>&-"):
            yield Case(
                f"{name}, {closed}",
                given,
                code=2 if "null" in closed else 0,
                fresh=True,
                stdout="/dev/null",
                shell=f'"$@" {closed}',
                silent=True,
            )
    for name, environment in ENCODINGS.items():
        for quick in ("help", "a table"):
            yield Case(
                f"{quick}, the encoding {name}",
                words(*QUICK[quick]),
                code=0,
                fresh=True,
                environment=environment,
            )
    for name, environment in ENVIRONMENTS.items():
        yield Case(
            name, words(*QUICK["a table as JSON"]), code=0, fresh=True, environment=environment
        )


def _variables() -> Iterator[Case]:
    """Bad variables of Python and libraries: not reported as broken packages."""
    check = words("check", "--limit", "1", "--json")
    for name, value, word in (
        ("PYTHONOPTIMIZE", "2", "PYTHONOPTIMIZE"),
        ("TORCH_LOGS", "banana", "environment variable TORCH_LOGS"),
    ):
        yield Case(f"{name}={value}", check, words=(word,), environment={name: value}, fresh=True)


def _broken(package: str, error: str) -> Callable[[Path], Sequence[object]]:
    """``check`` beside a package that raises while it is imported."""

    def arguments(folder: Path) -> Sequence[object]:
        (folder / f"{package}.py").write_text(f"raise {error}\n")
        return ["check", "--limit", "1", "--json"]

    return arguments


def _packages(*names: str) -> Iterator[Case]:
    for name in names:
        for error in ("ImportError('half installed')", "RuntimeError('no driver')", "broken("):
            yield Case(
                f"{name} raises {error}",
                _broken(name, error),
                words=(f"package {name}",),
                fresh=True,
                environment={"PYTHONPATH": _first_here()},
            )


def _first_here() -> str:
    return os.pathsep.join(["", *filter(None, sys.path)])


def _of_a_module(text: str) -> Callable[[Path], Sequence[object]]:
    def arguments(folder: Path) -> Sequence[object]:
        (folder / "mine.py").write_text(text)
        return ["rewards", "test", "mine:reward", "--json"]

    return arguments


def _same_place(folder: Path) -> Sequence[object]:
    return ["check", "--html", "out", "--trace", folder / "out"]


def _into_its_own_output(folder: Path) -> Sequence[object]:
    (folder / "out").touch()
    return ["check", "--html", "out"]


CASES = (
    Case("no command", words(), words=("no command",)),
    Case("limit 0 as JSON", words("check", "--limit", "0", "--json"), words=("limit",)),
    Case("one place for two outputs", _same_place, words=("another output",)),
    Case(
        "the page is stdout's file",
        _into_its_own_output,
        words=("own standard input or output",),
        fresh=True,
        shell='"$@" >>out',
    ),
    *_terminals(),
    *_variables(),
    *_packages("typer", "torch"),
    *(
        Case(f"a reward's module: {text}", _of_a_module(text))
        for text in ("import sys; sys.exit(0)", "raise KeyError", "1 +", "import mine2", "\0")
    ),
    *(
        Case(f"{size} GB", words("check", "--limit", "1"), fresh=True, memory=int(size * GB))
        for size in (0.3, 0.5, 1.0)
    ),
    Case(
        "no room for threads",
        words("check"),
        fresh=True,
        memory=GB,
        environment={"OMP_NUM_THREADS": "1000"},
        words=("processes",),
    ),
    Case("few open files", words("--version"), code=0, fresh=True, shell='ulimit -n 10; "$@"'),
)

SLOW = (
    *_packages("yaml", "rich", "transformers", "av", "numpy", "jinja2"),
    *(
        Case(
            f"{size} GB",
            words("check", "--limit", "2"),
            code=(0, 1, 2),
            fresh=True,
            memory=int(size * GB),
        )
        for size in (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
    ),
    *(
        Case(
            f"{command} in {name}",
            words(*command.split()),
            code=0,
            fresh=True,
            environment=environment,
        )
        for command in ("check", "incident")
        for name, environment in ENCODINGS.items()
    ),
    *(
        Case(
            f"OMP_NUM_THREADS={threads}",
            words("check"),
            code=0,
            fresh=True,
            environment={"OMP_NUM_THREADS": threads},
        )
        for threads in ("0", "-3", "abc", "100000", "9" * 40, "")
    ),
    Case(
        "16 open files",
        words("check"),
        code=(0, 2),
        fresh=True,
        shell='ulimit -n 16; "$@"',
    ),
)


@pytest.mark.parametrize(
    "case",
    [
        # the list of faults loads the libraries first
        *(one for one in CASES if not one.name.startswith("a list")),
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in (*SLOW, *(one for one in CASES if one.name.startswith("a list")))
        ),
    ],
    ids=str,
)
def test_ends_as_it_should(
    case: Case, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check_case(case, tmp_path, record_property)


def test_a_removed_working_directory(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    case = Case("gone", words(), fresh=True, shell='rmdir "$PWD"; "$@"')
    from runner import run

    outcome = run(case, ["check", "--json"], gone)
    assert outcome.code == 2
    assert "working directory" in outcome.stderr
