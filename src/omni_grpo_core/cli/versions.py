"""``omni-grpo versions``: the matrix of transformers versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from omni_grpo_core import cli
from omni_grpo_core.io.console import progress, quiet_libraries, require_outputs

app = cli.group("Measure what each version of transformers changes.")


@app.command("compare")
def compare_versions(
    pythons: Annotated[
        list[str],
        typer.Argument(metavar="NAME=PYTHON...", help="Interpreters, one transformers each."),
    ],
    default: Annotated[
        str | None,
        typer.Option(help="NAME to compare the others with. Default: the first."),
    ] = None,
    family: cli.FamilyOption = cli.TinyFamily.qwen2_5,
    data: Annotated[
        Path | None,
        typer.Option(help="Also write the measurements, as JSON."),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(help="Also insert the table into this document, between its markers."),
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """Compare several versions of transformers on the shipped rows.

    Prints a Markdown table of ids, positions, logits, answers and common calls; takes a minute per
    interpreter. Announced removals are warned about on stderr. Exit code 1: ids, positions, answers
    or logits of a version differ from the default's.
    """
    require_outputs(files=[data, into])
    quiet_libraries()
    from omni_grpo_core.io.atomic import write_file
    from omni_grpo_core.report.terminal.versions import announced, holds, markdown, put_into
    from omni_grpo_core.versions import interpreters, measure

    found = interpreters(pythons)
    if into is not None:
        put_into(into, "", family.value)  # refuse a document without markers before the work
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
