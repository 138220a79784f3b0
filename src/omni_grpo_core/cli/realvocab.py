"""``omni-grpo realvocab``: Qwen2.5-Omni's true vocabulary as a processor folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omni_grpo_core.io.console import Json, quiet_libraries, require_outputs
from omni_grpo_core.io.exits import print_json

app = typer.Typer(help="Qwen2.5-Omni's true token ids, without its weights.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """A callback keeps ``build`` a subcommand while it is the only one."""


@app.command()
def build(
    out: Annotated[Path, typer.Argument(help="New folder for the processor.")],
    as_json: Json = False,
) -> None:
    """Write Qwen2.5-Omni's tokenizer and processor, from the public ranks that dashscope carries.

    Needs the extra: pip install 'omni-grpo-core[qwen]'. The ids that come out are held against
    those that Qwen publishes; where they are others, nothing is written and the exit code is 2.
    """
    require_outputs(folders=[out])
    quiet_libraries()
    from omni_grpo_core.tiny.realvocab.processor import KNOWN_IDS, write_processor

    write_processor(out)
    if as_json:
        told = {"processor": str(out), "known_ids": {k: list(v) for k, v in KNOWN_IDS.items()}}
        print_json(told)
    else:
        typer.echo(f"{out}: Qwen2.5-Omni's processor, {len(KNOWN_IDS)} known ids as published")
