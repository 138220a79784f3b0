"""The questions of a review, and the commands that answer them without a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omni_grpo_core.golden.commands import command, new_ones, several
from omni_grpo_core.golden.pending import PendingCase
from omni_grpo_core.golden.review import accept, reject
from omni_grpo_core.golden.suite import Suite


def listed(changes: Mapping[str, PendingCase], folder: Path) -> list[dict[str, Any]]:
    """Pending changes for ``--json``."""
    return [
        {
            "case": case,
            "verdict": change.verdict,
            "stages": {stage: list(lines) for stage, lines in change.stages.items()},
            "accept": command("accept", folder, case),
            "reject": command("reject", folder, case),
        }
        for case, change in changes.items()
    ]


def pending_lines(changes: Mapping[str, PendingCase], folder: Path) -> list[str]:
    """Pending changes with their commands, for a person without a terminal. All cases that have no
    golden to be compared with share a line."""
    new = [case for case, change in changes.items() if change.new]
    lines = []
    if new:
        chosen = new_ones(only=len(new) == len(changes))
        goldens = sum(len(changes[case].stages) for case in new)
        lines.append(f"new: {several(new)}: {goldens} goldens")
        lines += [f"  {command(verb, folder, *chosen)}" for verb in ("accept", "reject")]
    for case, change in changes.items():
        if case not in new:
            lines += change.lines(case)
            lines += [f"  {command(verb, folder, case)}" for verb in ("accept", "reject")]
    return lines or ["nothing is pending"]


def ask(
    changes: Mapping[str, PendingCase],
    folder: Path,
    suite: Suite,
    *,
    prompt: Callable[[str], str],
    echo: Callable[[str], None],
    no_git: bool = False,
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
            accept(folder, [case], prompt("reason"), suite, no_git=no_git)
        elif choice == "r":
            reject(folder, [case], suite)
        left -= choice in ("a", "r")
        if choice == "q":
            break
    return left
