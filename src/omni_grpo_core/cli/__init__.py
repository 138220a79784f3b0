"""The commands of ``omni-grpo``, a file each. What several of them share: options and answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from omni_grpo_core.io.exits import print_json

if TYPE_CHECKING:
    from rich.console import Console


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class TinyFamily(StrEnum):
    qwen2_5 = "qwen2.5"
    qwen3 = "qwen3"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
FamilyOption = Annotated[TinyFamily, typer.Option(help="Qwen2.5-Omni's make or Qwen3-Omni's.")]
DeviceOption = Annotated[Device, typer.Option(help="Where the model runs.")]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="Default: float32 on cpu, bfloat16 on cuda.")
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Checkpoint; the suite's, the recording's or the shipped one if left out."),
]
Html = Annotated[Path | None, typer.Option(help="Also write a page to look at, one HTML file.")]
Junit = Annotated[
    Path | None, typer.Option(help="Also write the result as JUnit XML, for a CI's page of tests.")
]
Causes = Annotated[
    bool, typer.Option("--causes/--no-causes", help="Explain by the catalogue of known faults.")
]
NewFolder = Annotated[Path, typer.Argument(help="New folder for what is made.")]


def group(help: str) -> typer.Typer:
    """Commands under one name, also while there is but one of them."""
    app = typer.Typer(help=help, no_args_is_help=True)
    app.callback()(lambda: None)
    return app


def dtype_on(device: Device, dtype: Dtype | None) -> str:
    """The dtype that was asked for, else the device's own."""
    return (dtype or (Dtype.bfloat16 if device is Device.cuda else Dtype.float32)).value


def answer(
    as_json: bool,
    data: Mapping[str, Any],
    *lines: str,
    shown: Callable[[Console], None] | None = None,
) -> None:
    """With ``--json`` ``data``, else for a person: ``shown`` on a console, then ``lines``."""
    if as_json:
        print_json(data)
        return
    if shown is not None:
        from rich.console import Console

        shown(Console())
    for line in lines:
        typer.echo(line)


def write_html(path: Path | None, page: Callable[[], str]) -> None:
    """The page at ``path``, if one was asked for."""
    if path is not None:
        from omni_grpo_core.report.html import write_page

        write_page(path, page())
