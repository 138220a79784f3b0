"""The commands of ``omni-grpo``, one module each. Here: options and output that they share."""

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


class AudioPreference(StrEnum):
    auto = "auto"
    interleaved = "interleaved"
    separate = "separate"
    off = "off"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
FamilyOption = Annotated[TinyFamily, typer.Option(help="Model family: Qwen2.5-Omni or Qwen3-Omni.")]
DeviceOption = Annotated[Device, typer.Option(help="Device to run the model on.")]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="Model dtype. Default: float32 on cpu, bfloat16 on cuda.")
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Checkpoint. Default: the suite's, the recording's or the shipped one."),
]
Processor = Annotated[
    Path | None, typer.Option(help="Processor folder, if it is not the checkpoint folder.")
]
Config = Annotated[
    Path | None,
    typer.Option(help="Settings in JSON or YAML; override the checkpoint's omni_grpo.json."),
]
Data = Annotated[
    Path | None,
    typer.Option(help="Rows: a file, a folder of `datasets`, hub:NAME. Default: the shipped."),
]
AudioInVideo = Annotated[
    AudioPreference | None,
    typer.Option(help="How to pass a video's soundtrack; auto: as each row specifies."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first N rows of the data.")]
Root = Annotated[
    Path | None, typer.Option(help="Folder that media paths in --data are relative to.")
]
RowFormat = Annotated[
    str | None,
    typer.Option("--format", help="Row format: humanomni, social-iq, trl, verl, swift, openai, "
                 "llava. Default: as each row's keys show."),
]  # fmt: skip
Html = Annotated[Path | None, typer.Option(help="Also write the report as one HTML file.")]
Junit = Annotated[
    Path | None, typer.Option(help="Also write the result as JUnit XML, for CI test reports.")
]
Causes = Annotated[
    bool, typer.Option("--causes/--no-causes", help="Explain findings by known faults.")
]
NewFolder = Annotated[Path, typer.Argument(help="Output folder; must be new or empty.")]


def group(help: str) -> typer.Typer:
    """A command group; it stays one even with a single command."""
    app = typer.Typer(help=help, no_args_is_help=True)
    app.callback()(lambda: None)
    return app


def dtype_on(device: Device, dtype: Dtype | None) -> str:
    """The requested dtype, else the device's default."""
    return (dtype or (Dtype.bfloat16 if device is Device.cuda else Dtype.float32)).value


def answer(
    as_json: bool,
    data: Mapping[str, Any],
    *lines: str,
    shown: Callable[[Console], None] | None = None,
) -> None:
    """Print ``data`` with ``--json``; otherwise ``shown`` on a console, then ``lines``."""
    if as_json:
        print_json(data)
        return
    if shown is not None:
        from rich.console import Console

        shown(Console())
    for line in lines:
        typer.echo(line)
