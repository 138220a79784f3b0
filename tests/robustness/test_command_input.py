"""Commands typed wrong, and terminals, folders and machines that are not as they should be."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from runner import Case, check_case, words

COMMANDS = ("check", "train", "doctor", "faults", "incident", "golden check", "golden accept")
USAGE = tuple(
    Case(f"{command} {flag}", words(*command.split(), *flag.split()), words=("omni-grpo",))
    for command in COMMANDS
    for flag in ("--nonsense", "--nonsense --json")
)


def _page_onto_a_pipe(folder: Path) -> Sequence[object]:
    os.mkfifo(folder / "page.html")
    return ["check", "--html", folder / "page.html"]


CASES = (
    *USAGE,
    Case("no command", words(), words=("no command",)),
    Case("limit 0 as JSON", words("check", "--limit", "0", "--json"), words=("limit",)),
    Case("page onto a pipe", _page_onto_a_pipe, words=("a pipe",)),
    Case("page onto a device", words("check", "--html", "/dev/null"), words=("device",)),
    Case("stdout is full", words("--version"), fresh=True, stdout="/dev/full", words=("space",)),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ends_as_it_should(
    case: Case, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check_case(case, tmp_path, record_property)
