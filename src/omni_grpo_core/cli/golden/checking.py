"""``omni-grpo golden``: compare a fresh pass with the goldens, and say what moved it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omni_grpo_core import cli
from omni_grpo_core.cli.golden import Cases, DeviceOption, DtypeOption, Folder, goldens, load
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.atomic import write_file
from omni_grpo_core.io.console import (
    progress,
    quiet_libraries,
    require_device,
    require_outputs,
)

if TYPE_CHECKING:
    from omni_grpo_core.golden.results import GoldenReport

SidecarOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder, outside git, of values that goldens only fingerprint: exact replay."
    ),
]


def check(
    cases: Cases = None,
    golden: Folder = None,
    checkpoint: cli.Checkpoint = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
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
        cases, goldens(golden, shipped=True), checkpoint, device, dtype, sidecar, as_json
    )
    if junit is not None:
        from omni_grpo_core.report.junit import golden_junit

        write_file(junit, golden_junit(report))
    if markdown is not None:
        from omni_grpo_core.report.markdown import golden_markdown

        write_file(markdown, golden_markdown(report).encode())
    _show(report, as_json, html, every=False)


def diff(
    cases: Cases = None,
    golden: Folder = None,
    checkpoint: cli.Checkpoint = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    html: cli.Html = None,
    sidecar: SidecarOption = None,
    as_json: cli.Json = False,
) -> None:
    """Like check, but show every stage and every difference."""
    require_outputs(files=[html])
    report = _report(
        cases, goldens(golden, shipped=True), checkpoint, device, dtype, sidecar, as_json
    )
    _show(report, as_json, html, every=True)


def _report(
    cases: list[str] | None,
    golden: Path,
    checkpoint: Path | None,
    device: cli.Device | None,
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
        suite, policy, key = load(golden, checkpoint, device, dtype)
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


def regen(
    cases: Cases = None,
    golden: Folder = None,
    checkpoint: cli.Checkpoint = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    sidecar: SidecarOption = None,
    as_json: cli.Json = False,
) -> None:
    """Regenerate goldens that differ into golden/.pending.

    Accepted goldens stay untouched. Exit code 1: something is pending review.
    """
    folder = goldens(golden)
    with progress("golden regen", as_json) as on_case:
        on_case("policy")
        suite, policy, key = load(folder, checkpoint, device, dtype)
        from omni_grpo_core.golden.commands import regenerated_lines
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
    lines = regenerated_lines(done, folder)
    cli.answer(as_json, {"platform": key, "pending": pending, "cases": found}, *lines)
    raise typer.Exit(1 if pending else 0)


def record(
    out: Annotated[Path, typer.Argument(help="Output folder for the goldens.")],
    cases: Cases = None,
    golden: Folder = None,
    checkpoint: cli.Checkpoint = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: cli.Json = False,
) -> None:
    """Record this environment's goldens without review, for bisect, calibrate and upgrade."""
    with progress("golden record", as_json) as on_case:
        on_case("policy")
        suite, policy, key = load(goldens(golden), checkpoint, device, dtype)
        from omni_grpo_core.golden.pending import record as run_record

        files = run_record(policy, suite, out, key, names=cases or (), on_case=on_case)
    cli.answer(as_json, {"files": [str(path) for path in files]}, f"{len(files)} goldens in {out}")


def behaviour(
    cases: Cases = None,
    golden: Folder = None,
    checkpoint: cli.Checkpoint = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: cli.Json = False,
) -> None:
    """Accuracy, form and modality proof on the suite's rows, for upgrade."""
    with progress("golden behaviour", as_json) as on_case:
        on_case("policy")
        suite, policy, key = load(goldens(golden), checkpoint, device, dtype)
        from omni_grpo_core.golden.behaviour import behaviour as run_behaviour

        found = run_behaviour(policy, suite, cases or (), on_case).to_json()
    lines = (f"{name}: {value}" for name, value in found.items())
    cli.answer(as_json, {"platform": key, "behaviour": found}, *lines)


def calibrate(
    cases: Cases = None,
    runs: Annotated[int, typer.Option("-n", min=2, help="Runs, each in its own process.")] = 6,
    golden: Folder = None,
    checkpoint: cli.Checkpoint = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    write: Annotated[bool, typer.Option("--write", help="Save the tolerances.")] = False,
    as_json: cli.Json = False,
) -> None:
    """Measure how much the same pass varies on this platform.

    Threads and vector instructions are varied. Exit code 1: beyond the tolerance in force.
    """
    quiet_libraries()
    from omni_grpo_core.golden.calibrate import calibrate as run_calibrate
    from omni_grpo_core.golden.calibrate import record_tolerances
    from omni_grpo_core.golden.environment import platform_key
    from omni_grpo_core.golden.suite import load_suite

    folder = goldens(golden, shipped=not write)
    on, asked = load_suite(folder).placed(device, dtype)
    require_device(on)
    options = ["--device", on, "--dtype", asked, *(cases or ())]
    if checkpoint is not None:
        options += ["--checkpoint", str(checkpoint.absolute())]
    with tempfile.TemporaryDirectory() as work:
        found = run_calibrate(folder, Path(work), platform_key(on, asked), runs, options)
    file = record_tolerances(folder, found) if write else None
    cli.answer(
        as_json, {**found.to_json(), "file": None if file is None else str(file)}, *found.lines()
    )
    raise typer.Exit(0 if found.within else 1)


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
            goldens(golden, shipped=True),
            Path(work),
            cases=cases or (),
            checkpoint=None if checkpoint is None else checkpoint.absolute(),
            new_checkpoint=None if new_checkpoint is None else new_checkpoint.absolute(),
        )
    cli.answer(as_json, report.to_json(), *report.lines())
    raise typer.Exit(1 if report.differs else 0)
