"""``omni-grpo upgrade``: try libraries or a checkpoint before they are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omni_grpo_core import cli
from omni_grpo_core.cli.golden import Folder, goldens
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.console import quiet_libraries, require_outputs, step_progress


def upgrade(
    requirements: Annotated[
        list[str] | None,
        typer.Argument(metavar="PACKAGE==VERSION...", help="Libraries to try."),
    ] = None,
    golden: Folder = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="New checkpoint to try in place of the suite's, alone or with both."),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(metavar="CASE", help="Case of the suite; repeatable. Default: all."),
    ] = None,
    html: cli.Html = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Keep the new environment and all results here, e.g. for bisect."),
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """Try an upgrade before it is made: safe, drift or harmful, and why.

    The libraries are installed into an environment beside the present one, which stays as it is;
    the suite runs in both. An interrupted run is resumed by the same command. Exit code 1: drift
    or harmful.
    """
    from omni_grpo_core.golden.beside import parse_requests, satisfied
    from omni_grpo_core.io.resumable import begun, resumable

    require_outputs(files=[html], folders=[] if work is None or begun(work) else [work])

    requests = parse_requests(requirements or ())
    quiet_libraries()
    from omni_grpo_core.golden.suite import load_suite
    from omni_grpo_core.golden.upgrade import Task, nothing_to_try, try_upgrade, work_folder
    from omni_grpo_core.report.terminal.upgrade import print_upgrade

    folder = goldens(golden, shipped=True)
    suite = load_suite(folder)
    suite.chosen(case or ())
    if satisfied(requests):
        if checkpoint is None:
            raise nothing_to_try(requests)
        requests = ()
    task = Task(requests, _checkpoint(checkpoint), folder, suite, tuple(case or ()))
    key = task.key()
    with (
        step_progress(as_json) as watch,
        resumable(work or work_folder(key), key, keep=work is not None) as steps,
    ):
        report = try_upgrade(task, steps, watch)
        if html is not None:
            from omni_grpo_core.report.html import write_page
            from omni_grpo_core.report.html.upgrade_page import upgrade_page

            write_page(html, upgrade_page(report))
    if report.resumed:
        done = f"{len(report.resumed)} of {report.steps} steps were done"
        typer.echo(f"resumed: {done}", err=True)
    cli.answer(as_json, report.to_json(), shown=lambda console: print_upgrade(console, report))
    raise typer.Exit(0 if report.verdict == "safe" else 1)


def _checkpoint(folder: Path | None) -> Path | None:
    """The new checkpoint. What is no checkpoint at all is bad usage; one that does not load is a
    finding."""
    if folder is None or (folder / "config.json").is_file():
        return folder
    raise ConfigError(
        f"--checkpoint {folder}",
        got="no config.json" if folder.is_dir() else "no folder",
        want="a checkpoint folder",
        fix="check the path",
    )
