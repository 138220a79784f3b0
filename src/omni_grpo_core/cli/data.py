"""``omni-grpo data``: read a data set as a run would, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omni_grpo_core import cli
from omni_grpo_core.io.console import progress, require_outputs

app = cli.group("Look through a data set before a run uses it.")


@app.command("check")
def check(
    data: Annotated[
        Path, typer.Argument(help="JSON, JSONL, parquet, arrow, a folder of `datasets`, hub:NAME.")
    ],
    root: cli.Root = None,
    row_format: cli.RowFormat = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Checkpoint to count tokens for. Default: Qwen2.5-Omni as published."),
    ] = None,
    config: cli.Config = None,
    html: cli.Html = None,
    as_json: cli.Json = False,
) -> None:
    """Read every row: what is in it, and which rows a run could not use.

    Counts by format, problem type and media; golds that no reward can read, missing files, repeated
    rows, prompts beyond the model's positions. Loads no model and no torch. Exit code 1: a finding.
    """
    require_outputs(files=[html])
    from omni_grpo_core.pipeline.settings import load_settings
    from omni_grpo_core.report.terminal.data import print_data
    from omni_grpo_core.training.data_check import check_data

    # the file's own settings, even where no checkpoint has any
    settings = load_settings(checkpoint or Path(), config)
    with progress("data check", as_json) as on_stage:
        report = check_data(
            data,
            root=root,
            format=row_format,
            checkpoint=checkpoint,
            settings=settings,
            on_rows=lambda count: on_stage(f"{count} rows"),
        )
    if html is not None:
        from omni_grpo_core.report.html import write_page
        from omni_grpo_core.report.html.data_page import data_page

        write_page(html, data_page(report))
    cli.answer(as_json, report.to_json(), shown=lambda console: print_data(console, report))
    raise typer.Exit(0 if report.ok else 1)
