"""``omni-grpo tiny``: the tiny trained checkpoints; ``omni-grpo realvocab``: a real vocabulary."""

from __future__ import annotations

from typing import Annotated

import typer

from omni_grpo_core import cli
from omni_grpo_core.io.console import quiet_libraries, quiet_transformers, require_outputs

app = cli.group("Locate or rebuild the tiny trained checkpoints of this package.")
realvocab_app = cli.group("Build Qwen2.5-Omni's processor, with its real token ids.")


@app.command()
def build(
    out: cli.NewFolder,
    family: cli.FamilyOption = cli.TinyFamily.qwen2_5,
    seed: Annotated[int, typer.Option(help="Random seed: same seed, same weights.")] = 0,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Training steps. Default: as many as the recipe sets."),
    ] = None,
    stop: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this many steps, for an under-trained checkpoint."),
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """Train a tiny checkpoint from scratch; takes minutes on one core."""
    require_outputs(folders=[out])
    quiet_libraries()
    from omni_grpo_core.tiny.recipe import build as run_build

    quiet_transformers()
    metrics = run_build(out, family=family.value, seed=seed, steps=steps, stop=stop)
    result = {"checkpoint": str(out), "family": family.value, "seed": seed, "metrics": metrics}
    cli.answer(as_json, result, *(f"{name:32} {value:.3f}" for name, value in metrics.items()))


@app.command()
def path(family: cli.FamilyOption = cli.TinyFamily.qwen2_5) -> None:
    """Print the path of the shipped checkpoint."""
    from omni_grpo_core import tiny

    typer.echo(tiny.checkpoint_dir(family.value))


@realvocab_app.command("build")
def build_processor(out: cli.NewFolder, as_json: cli.Json = False) -> None:
    """Build Qwen2.5-Omni's tokenizer and processor.

    From the public ranks in dashscope, an extra: pip install 'omni-grpo-core[qwen]'. If the ids
    differ from those that Qwen publishes, nothing is written and the exit code is 2.
    """
    require_outputs(folders=[out])
    quiet_libraries()
    from omni_grpo_core.tiny.realvocab import KNOWN_IDS, write_processor

    write_processor(out)
    result = {"processor": str(out), "known_ids": {k: list(v) for k, v in KNOWN_IDS.items()}}
    line = f"{out}: Qwen2.5-Omni's processor, {len(KNOWN_IDS)} known ids as published"
    cli.answer(as_json, result, line)
