"""``omni-grpo tiny``: the tiny trained checkpoints; ``omni-grpo realvocab``: a true vocabulary."""

from __future__ import annotations

from typing import Annotated

import typer

from omni_grpo_core import cli
from omni_grpo_core.io.console import quiet_libraries, quiet_transformers, require_outputs

app = cli.group("The tiny trained checkpoint that ships with the package.")
realvocab_app = cli.group("Qwen2.5-Omni's true token ids, without its weights.")


@app.command()
def build(
    out: cli.NewFolder,
    family: cli.FamilyOption = cli.TinyFamily.qwen2_5,
    seed: Annotated[int, typer.Option(help="Same seed, same weights.")] = 0,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Training steps; the recipe's own number if left out."),
    ] = None,
    stop: Annotated[
        int | None,
        typer.Option(min=1, help="Break off after so many steps: an under-trained checkpoint."),
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """Train a tiny checkpoint from scratch: minutes on one core."""
    require_outputs(folders=[out])
    quiet_libraries()
    from omni_grpo_core.tiny.recipe import build as run_build

    quiet_transformers()
    metrics = run_build(out, family=family.value, seed=seed, steps=steps, stop=stop)
    told = {"checkpoint": str(out), "family": family.value, "seed": seed, "metrics": metrics}
    cli.answer(as_json, told, *(f"{name:32} {value:.3f}" for name, value in metrics.items()))


@app.command()
def path(family: cli.FamilyOption = cli.TinyFamily.qwen2_5) -> None:
    """Print where the shipped checkpoint lies."""
    from omni_grpo_core import tiny

    typer.echo(tiny.checkpoint_dir(family.value))


@realvocab_app.command("build")
def build_processor(out: cli.NewFolder, as_json: cli.Json = False) -> None:
    """Write Qwen2.5-Omni's tokenizer and processor, from the public ranks that dashscope carries.

    Needs the extra: pip install 'omni-grpo-core[qwen]'. The ids that come out are held against
    those that Qwen publishes; where they are others, nothing is written and the exit code is 2.
    """
    require_outputs(folders=[out])
    quiet_libraries()
    from omni_grpo_core.tiny.realvocab import KNOWN_IDS, write_processor

    write_processor(out)
    told = {"processor": str(out), "known_ids": {k: list(v) for k, v in KNOWN_IDS.items()}}
    line = f"{out}: Qwen2.5-Omni's processor, {len(KNOWN_IDS)} known ids as published"
    cli.answer(as_json, told, line)
