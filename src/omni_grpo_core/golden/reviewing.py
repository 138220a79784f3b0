"""What a person is asked in a review, and the commands that answer it elsewhere."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omni_grpo_core.golden.pending import PendingCase
from omni_grpo_core.golden.results import CaseResult
from omni_grpo_core.golden.review import accept, reject
from omni_grpo_core.golden.suite import Suite

FOLDER = Path("golden")


def command(verb: str, case: str, folder: Path) -> str:
    """The exact command of a verdict; ``WHY`` is to be replaced, and is refused as it is.

    >>> command("accept", "clip", Path("golden"))
    'omni-grpo golden accept clip --reason WHY'
    """
    where = [] if folder == FOLDER else ["--golden", str(folder)]
    why = ["--reason", "WHY"] if verb == "accept" else []
    return shlex.join(["omni-grpo", "golden", verb, case, *why, *where])


def advice(case: CaseResult, folder: Path) -> str:
    """What to do about a case that is not as its golden has it, with the commands in backquotes."""
    commands = (command(verb, case.case, folder) for verb in ("diff", "regen", "accept"))
    diff, regen, accept = (f"`{text}`" for text in commands)
    if case.verdict == "degenerate":
        return f"find what broke it with {diff}: degenerate completions cannot be accepted"
    return (
        f"see both sides with {diff}; undo what changed it or, if the change is wanted, run "
        f"{regen} and {accept}"
    )


def listed(changes: Mapping[str, PendingCase], folder: Path) -> list[dict[str, Any]]:
    """What is pending, for ``--json``."""
    return [
        {
            "case": case,
            "verdict": change.verdict,
            "stages": {stage: list(lines) for stage, lines in change.stages.items()},
            "accept": command("accept", case, folder),
            "reject": command("reject", case, folder),
        }
        for case, change in changes.items()
    ]


def told(changes: Mapping[str, PendingCase], folder: Path) -> list[str]:
    """What is pending, with the commands, for a person without a terminal."""
    lines = []
    for case, change in changes.items():
        lines += change.lines(case)
        lines += [f"  {command(verb, case, folder)}" for verb in ("accept", "reject")]
    return lines or ["nothing is pending"]


def ask(
    changes: Mapping[str, PendingCase],
    folder: Path,
    suite: Suite,
    *,
    prompt: Callable[[str], str],
    echo: Callable[[str], None],
) -> int:
    """Case by case: accept, reject, skip or quit. Returns how many are left pending.

    Raises what :func:`~omni_grpo_core.golden.review.accept` raises; what was decided before stays.
    """
    left = len(changes)
    for case, change in changes.items():
        for line in change.lines(case):
            echo(line)
        choice = prompt("[a]ccept, [r]eject, [s]kip, [q]uit")[:1].lower()
        if choice == "a":
            accept(folder, [case], prompt("reason"), suite)
        elif choice == "r":
            reject(folder, [case], suite)
        left -= choice in ("a", "r")
        if choice == "q":
            break
    return left
