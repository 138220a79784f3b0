"""``omni-grpo golden``: check, review and accept the model's inputs, outputs and updates."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omni_grpo_core import cli
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.atomic import write_file
from omni_grpo_core.io.console import (
    progress,
    quiet_libraries,
    quiet_transformers,
    require_device,
    require_outputs,
)

if TYPE_CHECKING:
    from omni_grpo_core.core.policy import Policy
    from omni_grpo_core.golden.results import GoldenReport
    from omni_grpo_core.golden.suite import Suite

app = cli.group("Check, attribute, review and accept goldens.")

Cases = Annotated[
    list[str] | None,
    typer.Argument(metavar="CASE...", help="Cases of the suite. Default: all."),
]
Folder = Annotated[
    Path | None,
    typer.Option("--golden", help="Folder of goldens. Default: ./golden."),
]
SidecarOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder, outside git, of values that goldens only fingerprint: exact replay."
    ),
]
GOLDEN = Path("golden")


def _goldens(folder: Path | None, *, shipped: bool = False) -> Path:
    """The given folder, else ``./golden``; with ``shipped``, the shipped goldens if there is
    none."""
    if folder is not None or not shipped or os.path.lexists(GOLDEN):
        return folder or GOLDEN
    from omni_grpo_core.golden.suite import shipped_goldens

    return shipped_goldens()


def _load(
    folder: Path, checkpoint: Path | None, device: cli.Device, dtype: cli.Dtype | None
) -> tuple[Suite, Policy, str]:
    """Suite, policy and platform key."""
    quiet_libraries()
    from omni_grpo_core.core.policy import load_policy
    from omni_grpo_core.golden.environment import platform_key
    from omni_grpo_core.golden.suite import load_suite

    quiet_transformers()
    require_device(device)
    suite = load_suite(folder, checkpoint=checkpoint)
    asked = cli.dtype_on(device, dtype)
    policy = load_policy(
        suite.checkpoint_dir(), processor=suite.processor_dir(), device=device.value, dtype=asked
    )
    return suite, policy, platform_key(device.value, asked)


@app.command()
def check(
    cases: Cases = None,
    golden: Folder = None,
    checkpoint: cli.Checkpoint = None,
    device: cli.DeviceOption = cli.Device.cpu,
    dtype: cli.DtypeOption = None,
    html: cli.Html = None,
    junit: cli.Junit = None,
    markdown: Annotated[
        Path | None,
        typer.Option(help="Also write a Markdown summary, for a pull request."),
    ] = None,
    sidecar: SidecarOption = None,
    as_json: cli.Json = False,
) -> None:
    """Compare a fresh pass of every case with its goldens.

    No golden is written. Exit code 1: a case is not within tolerance. 2: a golden is unreadable.
    """
    require_outputs(files=[html, junit, markdown])
    report = _report(
        cases, _goldens(golden, shipped=True), checkpoint, device, dtype, sidecar, as_json
    )
    if junit is not None:
        from omni_grpo_core.report.junit import golden_junit

        write_file(junit, golden_junit(report))
    if markdown is not None:
        from omni_grpo_core.report.markdown import golden_markdown

        write_file(markdown, golden_markdown(report).encode())
    _show(report, as_json, html, every=False)


@app.command()
def diff(
    cases: Cases = None,
    golden: Folder = None,
    checkpoint: cli.Checkpoint = None,
    device: cli.DeviceOption = cli.Device.cpu,
    dtype: cli.DtypeOption = None,
    html: cli.Html = None,
    sidecar: SidecarOption = None,
    as_json: cli.Json = False,
) -> None:
    """Like check, but show every stage and every difference."""
    require_outputs(files=[html])
    report = _report(
        cases, _goldens(golden, shipped=True), checkpoint, device, dtype, sidecar, as_json
    )
    _show(report, as_json, html, every=True)


def _report(
    cases: list[str] | None,
    golden: Path,
    checkpoint: Path | None,
    device: cli.Device,
    dtype: cli.Dtype | None,
    sidecar: Path | None,
    as_json: bool,
) -> GoldenReport:
    if sidecar is not None and not sidecar.is_dir():
        raise ConfigError(
            f"--sidecar {sidecar}",
            got="no folder",
            want="one written by golden regen --sidecar",
            fix="check the path, or leave it out: replay then uses what the goldens hold",
        )
    with progress("golden check", as_json) as on_case:
        on_case("policy")
        suite, policy, key = _load(golden, checkpoint, device, dtype)
        from omni_grpo_core.golden.checking import check as run_check

        return run_check(
            policy, suite, golden, key, names=cases or (), sidecar=sidecar, on_case=on_case
        )


def _show(report: GoldenReport, as_json: bool, html: Path | None, *, every: bool) -> None:
    from omni_grpo_core.golden.results import FINE
    from omni_grpo_core.report.terminal.golden import print_report

    if html is not None:
        from omni_grpo_core.report.html import write_page
        from omni_grpo_core.report.html.golden_page import golden_page

        write_page(html, golden_page(report))
    cli.answer(
        as_json,
        report.to_json(),
        shown=lambda console: print_report(console, report, every=every),
    )
    raise typer.Exit(0 if report.verdict in FINE else 1)


@app.command()
def regen(
    cases: Cases = None,
    golden: Folder = None,
    checkpoint: cli.Checkpoint = None,
    device: cli.DeviceOption = cli.Device.cpu,
    dtype: cli.DtypeOption = None,
    sidecar: SidecarOption = None,
    as_json: cli.Json = False,
) -> None:
    """Regenerate goldens that differ into golden/.pending.

    Accepted goldens stay untouched. Exit code 1: something is pending review.
    """
    folder = _goldens(golden)
    with progress("golden regen", as_json) as on_case:
        on_case("policy")
        suite, policy, key = _load(folder, checkpoint, device, dtype)
        from omni_grpo_core.golden.pending import regen as run_regen

        done = run_regen(
            policy, suite, folder, key, names=cases or (), sidecar=sidecar, on_case=on_case
        )
    found = [
        {
            "case": one.result.case,
            "verdict": one.result.verdict,
            "reason": one.result.reason,
            "files": [str(path) for path in one.files],
        }
        for one in done
    ]
    pending = any(one.files for one in done)
    lines = [
        f"{one.result.case}: {one.result.verdict}: {len(one.files)} stages pending"
        for one in done
        if one.files
    ]
    if not pending:
        lines = ["nothing changed: no golden is pending"]
    cli.answer(as_json, {"platform": key, "pending": pending, "cases": found}, *lines)
    raise typer.Exit(1 if pending else 0)


@app.command(hidden=True)
def record(
    out: Annotated[Path, typer.Argument(help="Output folder for the goldens.")],
    cases: Cases = None,
    golden: Folder = None,
    checkpoint: cli.Checkpoint = None,
    device: cli.DeviceOption = cli.Device.cpu,
    dtype: cli.DtypeOption = None,
    as_json: cli.Json = False,
) -> None:
    """Record this environment's goldens without review, for bisect and calibrate."""
    suite, policy, key = _load(_goldens(golden), checkpoint, device, dtype)
    from omni_grpo_core.golden.pending import record as run_record

    files = run_record(policy, suite, out, key, names=cases or ())
    cli.answer(as_json, {"files": [str(path) for path in files]}, f"{len(files)} goldens in {out}")


@app.command()
def review(golden: Folder = None, as_json: cli.Json = False) -> None:
    """Review pending goldens and accept or reject them case by case.

    Without a terminal, the commands to run are printed. Exit code 1: something is pending.
    """
    quiet_libraries()
    from omni_grpo_core.golden import reviewing
    from omni_grpo_core.golden.pending import pending_changes
    from omni_grpo_core.golden.suite import load_suite

    folder = _goldens(golden)
    suite = load_suite(folder)
    changes = pending_changes(folder, suite)
    left = len(changes)
    if as_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        listed = reviewing.listed(changes, folder)
        cli.answer(as_json, {"pending": listed}, *reviewing.pending_lines(changes, folder))
    else:
        left = reviewing.ask(changes, folder, suite, prompt=typer.prompt, echo=typer.echo)
    raise typer.Exit(1 if left else 0)


@app.command()
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

    folder = _goldens(golden)
    done = run_accept(folder, cases, reason, load_suite(folder), platform=platform, by=by)
    accepted = [{"file": str(one.file), "supersedes": one.supersedes} for one in done]
    lines = [f"accepted {one['file']}, supersedes {one['supersedes']}" for one in accepted]
    cli.answer(as_json, {"accepted": accepted}, *lines)


@app.command()
def reject(
    cases: Annotated[list[str], typer.Argument(metavar="CASE...", help="Pending cases.")],
    golden: Folder = None,
    as_json: cli.Json = False,
) -> None:
    """Delete pending goldens; accepted ones stay untouched."""
    quiet_libraries()
    from omni_grpo_core.golden.review import reject as run_reject
    from omni_grpo_core.golden.suite import load_suite

    folder = _goldens(golden)
    done = [str(path) for path in run_reject(folder, cases, load_suite(folder))]
    cli.answer(as_json, {"rejected": done}, *(f"rejected {path}" for path in done))


@app.command()
def verify(golden: Folder = None, as_json: cli.Json = False) -> None:
    """Verify that stored goldens are intact and reviewed; no model is loaded.

    Exit code 1: a golden is truncated, edited by hand or never accepted, or something is pending.
    """
    quiet_libraries()
    from omni_grpo_core.golden.review import unsound

    found = unsound(_goldens(golden))
    cli.answer(as_json, {"unsound": found}, *(found or ["every golden is complete and reviewed"]))
    raise typer.Exit(1 if found else 0)


@app.command()
def prune(
    golden: Folder = None,
    device: cli.DeviceOption = cli.Device.cpu,
    dtype: cli.DtypeOption = None,
    all_platforms: Annotated[
        bool, typer.Option("--all-platforms", help="Include other platforms.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would go.")] = False,
    as_json: cli.Json = False,
) -> None:
    """Remove this platform's goldens that no case uses any more."""
    quiet_libraries()
    require_device(device)
    from omni_grpo_core.golden.environment import platform_key
    from omni_grpo_core.golden.review import stale
    from omni_grpo_core.golden.suite import load_suite

    key = platform_key(device.value, cli.dtype_on(device, dtype))
    folder = _goldens(golden)
    found = stale(folder, key, load_suite(folder), every=all_platforms)
    for path in () if dry_run else found:
        path.unlink()
    names = [str(path) for path in found]
    verb = "would be removed" if dry_run else "removed"
    lines = [f"{verb}: {name}" for name in names] or ["nothing to remove"]
    cli.answer(as_json, {"removed": [] if dry_run else names, "stale": names}, *lines)


@app.command()
def calibrate(
    cases: Cases = None,
    runs: Annotated[int, typer.Option("-n", min=2, help="Runs, each in its own process.")] = 6,
    golden: Folder = None,
    checkpoint: cli.Checkpoint = None,
    device: cli.DeviceOption = cli.Device.cpu,
    dtype: cli.DtypeOption = None,
    write: Annotated[bool, typer.Option("--write", help="Save the tolerances.")] = False,
    as_json: cli.Json = False,
) -> None:
    """Measure how much the same pass varies on this platform.

    Threads and vector instructions are varied. Exit code 1: beyond the tolerance in force.
    """
    with tempfile.TemporaryDirectory() as work:
        quiet_libraries()
        require_device(device)
        from omni_grpo_core.golden.calibrate import calibrate as run_calibrate
        from omni_grpo_core.golden.calibrate import record_tolerances
        from omni_grpo_core.golden.environment import platform_key

        asked = cli.dtype_on(device, dtype)
        options = ["--device", device.value, "--dtype", asked, *(cases or ())]
        if checkpoint is not None:
            options += ["--checkpoint", str(checkpoint.absolute())]
        key = platform_key(device.value, asked)
        folder = _goldens(golden, shipped=not write)
        found = run_calibrate(folder, Path(work), key, runs, options)
        file = record_tolerances(folder, found) if write else None
    cli.answer(
        as_json, {**found.to_json(), "file": None if file is None else str(file)}, *found.lines()
    )
    raise typer.Exit(0 if found.within else 1)


@app.command()
def bisect(
    old: Annotated[str, typer.Argument(help="tox env, virtual environment, Python, constraints.")],
    new: Annotated[str, typer.Argument(help="The same, after the upgrade.")],
    cases: Cases = None,
    golden: Folder = None,
    checkpoint: cli.Checkpoint = None,
    new_checkpoint: Annotated[
        Path | None,
        typer.Option(help="New checkpoint; old and new are crossed with both environments."),
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """Find which change, library or checkpoint, moved which stage. Exit code 1: one moved."""
    with tempfile.TemporaryDirectory() as work:
        from omni_grpo_core.golden.bisect import bisect as run_bisect

        report = run_bisect(
            old,
            new,
            _goldens(golden, shipped=True),
            Path(work),
            cases=cases or (),
            checkpoint=None if checkpoint is None else checkpoint.absolute(),
            new_checkpoint=None if new_checkpoint is None else new_checkpoint.absolute(),
        )
    cli.answer(as_json, report.to_json(), *report.lines())
    raise typer.Exit(1 if report.differs else 0)
