"""What to do next, as the exact commands."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from omni_grpo_core.golden.pending import Regenerated
from omni_grpo_core.golden.results import FINE, CaseResult, GoldenReport, StageResult

FOLDER = Path("golden")
_NAMED = 3
"""Cases named in one line; of the others there is only the number."""


def command(verb: str, folder: Path, *chosen: str) -> str:
    """The exact command for the ``chosen`` cases, or with those options; ``WHY`` must be replaced,
    and is refused as it is.

    >>> command("accept", Path("golden"), "clip")
    'omni-grpo golden accept clip --reason WHY'
    """
    where = [] if folder == FOLDER else ["--golden", str(folder)]
    why = ["--reason", "WHY"] if verb == "accept" else []
    return shlex.join(["omni-grpo", "golden", verb, *chosen, *why, *where])


def several(names: Sequence[str]) -> str:
    """
    >>> several("abcde"), several("abcd")
    ('a, b, c and 2 more', 'a, b, c, d')
    """
    if len(names) <= _NAMED + 1:
        return ", ".join(names)
    return f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED} more"


def new_cases(report: GoldenReport, quoted: Callable[[str], str] = str) -> str:
    """One sentence for all cases that only lack goldens, with the commands that make them; empty
    if there are none. ``quoted`` marks up names and commands."""
    if not report.new:
        return ""
    folder = Path(report.folder)
    # what differs for another reason needs a decision of its own
    only = all(case.verdict in (*FINE, "new") for case in report.cases)
    regen = command("regen", folder, *report.options)
    accept = command("accept", folder, *new_ones(only=only))
    return (
        f"{several([quoted(name) for name in report.new])} "
        f"{'has' if len(report.new) == 1 else 'have'} no golden for {quoted(report.platform)} yet: "
        f"{quoted(regen)}, then {quoted(accept)}"
    )


def advice(case: CaseResult, folder: Path, options: Sequence[str] = ()) -> str:
    """What to do about a case that differs from its golden, with the commands in backticks;
    ``options`` as in :class:`~omni_grpo_core.golden.results.GoldenReport`."""
    diff, regen = (f"`{command(verb, folder, case.case, *options)}`" for verb in ("diff", "regen"))
    accept = f"`{command('accept', folder, case.case)}`"
    if case.verdict == "new":
        return f"run {regen}, then {accept}"
    if case.verdict == "degenerate":
        return f"find the cause with {diff}: degenerate completions cannot be accepted"
    return (
        f"compare both sides with {diff}; undo the change or, if it is wanted, run "
        f"{regen} and {accept}"
    )


def regenerated_lines(done: Sequence[Regenerated], folder: Path) -> list[str]:
    """What a regeneration left pending, for a person."""
    found = [one for one in done if one.files]
    new = [one for one in found if one.result.verdict == "new"]
    lines = [
        f"{one.result.case}: {one.result.verdict}: {len(one.files)} stages pending"
        + "".join(f"; {stage.stage}: {stage.reason}" for stage in _failed(one.result)[:1])
        for one in found
        if one not in new
    ]
    if new:
        accept = command("accept", folder, *new_ones(only=len(new) == len(found)))
        lines.append(
            f"new: {several([one.result.case for one in new])}: "
            f"{sum(len(one.files) for one in new)} goldens pending: "
            f"{command('review', folder)}, then {accept}"
        )
    return lines or ["nothing changed: no golden is pending"]


def _failed(case: CaseResult) -> list[StageResult]:
    """Stages that have neither a golden nor a fresh value."""
    return [stage for stage in case.stages if stage.verdict == "schema" and not stage.golden]


def new_ones(*, only: bool) -> tuple[str, ...]:
    """What selects the new cases; ``only``: everything that is pending."""
    return ("--all",) if only else ("--verdict", "new")
