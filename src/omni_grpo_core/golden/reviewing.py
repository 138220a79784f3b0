"""The questions of a review, and the commands that answer them without a terminal."""

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
    """The exact command of a decision; ``WHY`` must be replaced, and is refused as it is.

    >>> command("accept", "clip", Path("golden"))
    'omni-grpo golden accept clip --reason WHY'
    """
    where = [] if folder == FOLDER else ["--golden", str(folder)]
    why = ["--reason", "WHY"] if verb == "accept" else []
    return shlex.join(["omni-grpo", "golden", verb, case, *why, *where])


def advice(case: CaseResult, folder: Path) -> str:
    """What to do about a case that differs from its golden, with the commands in backticks."""
    commands = (command(verb, case.case, folder) for verb in ("diff", "regen", "accept"))
    diff, regen, accept = (f"`{text}`" for text in commands)
    if case.verdict == "degenerate":
        return f"find the cause with {diff}: degenerate completions cannot be accepted"
    return (
        f"compare both sides with {diff}; undo the change or, if it is wanted, run "
        f"{regen} and {accept}"
    )


def listed(changes: Mapping[str, PendingCase], folder: Path) -> list[dict[str, Any]]:
    """Pending changes for ``--json``."""
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


def pending_lines(changes: Mapping[str, PendingCase], folder: Path) -> list[str]:
    """Pending changes with their commands, for a person without a terminal."""
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
    """Case by case: accept, reject, skip or quit. Returns how many remain pending.

    Raises as :func:`~omni_grpo_core.golden.review.accept`; earlier decisions are kept.
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
