"""``omni-grpo golden``: decide on pending goldens, and keep the stored ones in order."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from omni_grpo_core import cli
from omni_grpo_core.cli.golden import DeviceOption, DtypeOption, Folder, goldens
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.console import quiet_libraries, require_device

PendingCases = Annotated[
    list[str] | None,
    typer.Argument(metavar="CASE...", help="Pending cases; shell patterns, e.g. 'clip*'."),
]
Every = Annotated[bool, typer.Option("--all", help="Everything that is pending.")]
VerdictOption = Annotated[
    str | None,
    typer.Option(help="Only cases with these verdicts, e.g. new,within,benign-drift."),
]
PlatformOption = Annotated[
    str | None,
    typer.Option(help="Only goldens made on this platform, e.g. cuda-sm90-bf16."),
]

NoGitOption = Annotated[
    bool,
    typer.Option("--no-git", help="Accept whatever the state of the git tree; put on record."),
]


def review(golden: Folder = None, no_git: NoGitOption = False, as_json: cli.Json = False) -> None:
    """Review pending goldens and accept or reject them case by case.

    Without a terminal, the commands to run are printed. Exit code 1: something is pending.
    """
    quiet_libraries()
    from omni_grpo_core.golden import reviewing
    from omni_grpo_core.golden.pending import pending_changes
    from omni_grpo_core.golden.suite import load_suite

    folder = goldens(golden)
    suite = load_suite(folder)
    changes = pending_changes(folder, suite)
    left = len(changes)
    if as_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        listed = reviewing.listed(changes, folder)
        cli.answer(as_json, {"pending": listed}, *reviewing.pending_lines(changes, folder))
    else:
        left = reviewing.ask(
            changes, folder, suite, prompt=typer.prompt, echo=typer.echo, no_git=no_git
        )
    raise typer.Exit(1 if left else 0)


def accept(
    cases: PendingCases = None,
    every: Every = False,
    verdict: VerdictOption = None,
    reason: Annotated[str, typer.Option(help="Why the change is right; put on record.")] = "",
    golden: Folder = None,
    platform: PlatformOption = None,
    by: Annotated[
        str | None,
        typer.Option(help="Who accepts. Default: the git user."),
    ] = None,
    no_git: NoGitOption = False,
    as_json: cli.Json = False,
) -> None:
    """Replace goldens with pending ones; who, why and the old ones are recorded.

    Refused: a dirty tree, no reason, NaN, degenerate completions, another platform's run. Nothing
    is written then.
    """
    quiet_libraries()
    from omni_grpo_core.golden.git_tree import author
    from omni_grpo_core.golden.review import accept as run_accept
    from omni_grpo_core.golden.suite import load_suite
    from omni_grpo_core.report.terminal.golden import accepted_json, print_accepted

    folder = goldens(golden)
    verdicts = _chosen("accept", folder, cases, verdict, every=every)
    who = by or author(folder)
    done = run_accept(
        folder,
        cases or (),
        reason,
        load_suite(folder),
        verdicts=verdicts,
        platform=platform,
        by=who,
        no_git=no_git,
    )
    cli.answer(
        as_json,
        {**accepted_json(done), "by": who, "reason": reason.strip(), "no_git": no_git},
        shown=lambda console: print_accepted(console, done, who, reason.strip()),
    )


def reject(
    cases: PendingCases = None,
    every: Every = False,
    verdict: VerdictOption = None,
    golden: Folder = None,
    platform: PlatformOption = None,
    as_json: cli.Json = False,
) -> None:
    """Delete pending goldens; accepted ones stay untouched."""
    quiet_libraries()
    from omni_grpo_core.golden.review import reject as run_reject
    from omni_grpo_core.golden.suite import load_suite

    folder = goldens(golden)
    verdicts = _chosen("reject", folder, cases, verdict, every=every)
    done = run_reject(folder, cases or (), load_suite(folder), verdicts=verdicts, platform=platform)
    counts = Counter(path.parent.name for path in done)
    lines = [f"rejected {case}: {count} goldens" for case, count in counts.items()]
    cli.answer(as_json, {"rejected": [str(path) for path in done], "cases": counts}, *lines)


def _chosen(
    verb: str, folder: Path, cases: list[str] | None, verdict: str | None, *, every: bool
) -> tuple[str, ...]:
    """The verdicts of ``--verdict``. Everything is decided on only if it is asked for."""
    from omni_grpo_core.golden.commands import command
    from omni_grpo_core.golden.store import pending_cases

    if (cases and every) or not (cases or every or verdict):
        pending = ", ".join(pending_cases(folder)) or "nothing"
        raise ConfigError(
            f"omni-grpo golden {verb}",
            got="cases and --all" if cases else "neither cases, --all nor --verdict",
            want=f"what to {verb}; pending: {pending}",
            fix=f"for everything run {command(verb, folder, '--all')}",
        )
    return () if verdict is None else tuple(name.strip() for name in verdict.split(","))


def verify(golden: Folder = None, as_json: cli.Json = False) -> None:
    """Verify that stored goldens are intact and reviewed; no model is loaded.

    Exit code 1: a golden is truncated, edited by hand or never accepted, or something is pending.
    """
    quiet_libraries()
    from omni_grpo_core.golden.review import unsound

    found = unsound(goldens(golden))
    cli.answer(as_json, {"unsound": found}, *(found or ["every golden is complete and reviewed"]))
    raise typer.Exit(1 if found else 0)


def prune(
    golden: Folder = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    all_platforms: Annotated[
        bool, typer.Option("--all-platforms", help="Include other platforms.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would go.")] = False,
    as_json: cli.Json = False,
) -> None:
    """Remove this platform's goldens that no case uses any more."""
    quiet_libraries()
    from omni_grpo_core.golden.environment import platform_key
    from omni_grpo_core.golden.review import stale
    from omni_grpo_core.golden.suite import load_suite

    folder = goldens(golden)
    suite = load_suite(folder)
    on, asked = suite.placed(device, dtype)
    require_device(on)
    found = stale(folder, platform_key(on, asked), suite, every=all_platforms)
    for path in () if dry_run else found:
        path.unlink()
    names = [str(path) for path in found]
    verb = "would be removed" if dry_run else "removed"
    lines = [f"{verb}: {name}" for name in names] or ["nothing to remove"]
    cli.answer(as_json, {"removed": [] if dry_run else names, "stale": names}, *lines)
