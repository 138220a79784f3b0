"""``omni-grpo golden init``: a suite of one's own rows and checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from omni_grpo_core import cli
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.console import (
    progress,
    quiet_libraries,
    quiet_transformers,
    require_device,
    require_outputs,
)


def init(
    folder: Annotated[Path, typer.Argument(help="Golden folder to create; new or empty.")],
    checkpoint: Annotated[Path, typer.Option(help="Your checkpoint folder.")],
    data: Annotated[Path, typer.Option(help="Rows: a file, a folder of `datasets`, hub:NAME.")],
    root: cli.Root = None,
    processor: cli.Processor = None,
    config: cli.Config = None,
    cases: Annotated[
        int, typer.Option(min=1, help="Most cases of one row; there is one per kind of row.")
    ] = 60,
    steps: Annotated[
        int,
        typer.Option(
            min=0,
            max=100,
            help="Also a case with N GRPO steps. It copies the model twice: mind its size.",
        ),
    ] = 0,
    device: cli.DeviceOption = cli.Device.cpu,
    dtype: cli.DtypeOption = None,
    html: cli.Html = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="Accept the goldens at once, for --reason.")
    ] = False,
    reason: Annotated[str, typer.Option(help="Why they are right; put on record.")] = "",
    no_git: Annotated[
        bool, typer.Option("--no-git", help="Accept outside git; put on record.")
    ] = False,
    by: Annotated[
        str | None,
        typer.Option(help="Who accepts. Default: the git user."),
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """Start a golden suite of your own: choose rows, write suite.yaml, make the first goldens.

    One row of every kind in the data (modalities, audio mode, problem type, length) and a padded
    batch. The checkpoint is checked first. Exit code 1: a check failed; nothing is written.
    """
    require_outputs(files=[html], folders=[folder])
    _require_accept(accept, {"--reason": reason, "--by": by, "--no-git": no_git})
    quiet_libraries()
    from omni_grpo_core.golden.new_suite import Sources
    from omni_grpo_core.golden.starting import Approval, plan_suite, start_suite
    from omni_grpo_core.report.terminal.check import print_check
    from omni_grpo_core.report.terminal.started import print_started

    quiet_transformers()
    require_device(device)
    approval = Approval(reason, by, no_git) if accept else None
    if approval is not None:
        approval.require(folder)
    # what is the default need not stand in suite.yaml
    on = None if device is cli.Device.cpu else device.value
    of = None if cli.dtype_on(device, None) == dtype else dtype
    sources = Sources(data, checkpoint, root, processor, config, on, of and of.value)
    with progress("golden init", as_json) as on_step:
        plan = plan_suite(sources, most=cases, steps=steps, on_step=on_step)
        if plan.check.verdict == "pass":
            started = start_suite(folder, plan, approval=approval, on_case=on_step)
    if plan.check.verdict == "fail":
        found = {**plan.to_json(), "written": False}
        cli.answer(as_json, found, shown=lambda console: print_check(console, plan.check))
        raise typer.Exit(1)
    if html is not None and started.written:
        from omni_grpo_core.report.html import write_page
        from omni_grpo_core.report.html.started_page import started_page

        write_page(html, started_page(plan, started))
    cli.answer(
        as_json,
        {**plan.to_json(), **started.to_json()},
        shown=lambda console: print_started(console, plan, started),
    )
    raise typer.Exit(0 if started.written else 1)


def _require_accept(accept: bool, given: Mapping[str, str | bool | None]) -> None:
    """Options that say how to accept need something to accept."""
    named = [name for name, value in given.items() if value]
    if named and not accept:
        raise ConfigError(
            named[0],
            got="no --accept",
            want="both, or neither",
            fix="add --accept, or review later",
        )
