"""``omni-grpo golden``: decide on pending goldens, and keep the stored ones in order."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from omni_grpo_core import cli
from omni_grpo_core.cli.golden import DeviceOption, DtypeOption, Folder, goldens
from omni_grpo_core.io.console import quiet_libraries, require_device


def review(golden: Folder = None, as_json: cli.Json = False) -> None:
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
        left = reviewing.ask(changes, folder, suite, prompt=typer.prompt, echo=typer.echo)
    raise typer.Exit(1 if left else 0)


def accept(
    cases: Annotated[list[str], typer.Argument(metavar="CASE...", help="Pending cases.")],
    reason: Annotated[str, typer.Option(help="Why the change is right; put on record.")] = "",
    golden: Folder = None,
    platform: Annotated[
        str | None,
        typer.Option(help="Accept only goldens made on this platform, e.g. cuda-sm90-bf16."),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="Who accepts. Default: the git user."),
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """Replace goldens with pending ones; who, why and the old ones are recorded.

    Refused: a dirty tree, no reason, NaN, degenerate completions, another platform's run.
    """
    quiet_libraries()
    from omni_grpo_core.golden.review import accept as run_accept
    from omni_grpo_core.golden.suite import load_suite

    folder = goldens(golden)
    done = run_accept(folder, cases, reason, load_suite(folder), platform=platform, by=by)
    accepted = [{"file": str(one.file), "supersedes": one.supersedes} for one in done]
    lines = [f"accepted {one['file']}, supersedes {one['supersedes']}" for one in accepted]
    cli.answer(as_json, {"accepted": accepted}, *lines)


def reject(
    cases: Annotated[list[str], typer.Argument(metavar="CASE...", help="Pending cases.")],
    golden: Folder = None,
    as_json: cli.Json = False,
) -> None:
    """Delete pending goldens; accepted ones stay untouched."""
    quiet_libraries()
    from omni_grpo_core.golden.review import reject as run_reject
    from omni_grpo_core.golden.suite import load_suite

    folder = goldens(golden)
    done = [str(path) for path in run_reject(folder, cases, load_suite(folder))]
    cli.answer(as_json, {"rejected": done}, *(f"rejected {path}" for path in done))


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
