"""``omni-grpo versions``: the matrix of transformers versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from omni_grpo_core import cli
from omni_grpo_core.io.console import progress, quiet_libraries, require_outputs

app = cli.group("What each version of transformers changes.")


@app.command("compare")
def compare_versions(
    pythons: Annotated[
        list[str],
        typer.Argument(metavar="NAME=PYTHON...", help="Interpreters, one transformers each."),
    ],
    default: Annotated[
        str | None,
        typer.Option(help="The name that the others are compared with; the first if left out."),
    ] = None,
    family: cli.FamilyOption = cli.TinyFamily.qwen2_5,
    data: Annotated[
        Path | None,
        typer.Option(help="Also keep what was measured, as JSON."),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(help="Also put the table into this document, between the marks."),
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """The shipped rows under each transformers: ids, positions, logits, answers, and what calls
    that people write come to. Prints a Markdown table; a minute for each interpreter. Of what a
    version says it will drop a warning goes to stderr.

    Exit code 1: a version gives other ids, positions, answers or logits than the default.
    """
    require_outputs(files=[data, into])
    quiet_libraries()
    from omni_grpo_core.io.atomic import write_file
    from omni_grpo_core.report.terminal.versions import announced, holds, markdown, put_into
    from omni_grpo_core.versions import interpreters, measure

    found = interpreters(pythons)
    if into is not None:
        put_into(into, "", family.value)  # a document without marks is known before the work
    with progress("versions", as_json) as on_version:
        matrix = measure(found, default or next(iter(found)), family.value, on_version)
    table = markdown(matrix)
    if data is not None:
        text = json.dumps(matrix, indent=1, ensure_ascii=False)
        write_file(data, f"{text}\n".encode())
    if into is not None:
        write_file(into, put_into(into, table, family.value))
    for line in announced(matrix):
        typer.echo(f"warning: {line}", err=True)
    good = holds(matrix)
    cli.answer(as_json, {"holds": good, **matrix}, table)
    raise typer.Exit(0 if good else 1)
