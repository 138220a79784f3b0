"""``omni-grpo bench``: what a step costs."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from omni_grpo_core import cli
from omni_grpo_core.io.console import (
    quiet_libraries,
    quiet_transformers,
    require_device,
    require_outputs,
)

if TYPE_CHECKING:
    from omni_grpo_core.bench.run import Way


class SizeOption(StrEnum):
    tiny = "tiny"
    real = "7b"


class WayOption(StrEnum):
    usual = "usual"
    plain = "plain"
    fast = "fast"


class SweepOption(StrEnum):
    group = "group"
    groups = "groups"
    prompt = "prompt"


SWEEPS: dict[str, tuple[int, ...]] = {
    "group": (2, 4, 8, 16, 32),
    "groups": (1, 2, 4, 8),
    "prompt": (1024, 2048, 4096, 8192, 16384),
}


def bench(
    size: Annotated[
        SizeOption,
        typer.Option(help="The shipped tiny model, or random weights of the 7B's size."),
    ] = SizeOption.tiny,
    device: cli.DeviceOption = cli.Device.cpu,
    dtype: cli.DtypeOption = None,
    way: Annotated[
        list[WayOption] | None, typer.Option(help="Measure only these ways. Default: all.")
    ] = None,
    group: Annotated[
        int | None, typer.Option(min=1, max=256, help="Completions of each prompt.")
    ] = None,
    groups: Annotated[int | None, typer.Option(min=1, max=64, help="Prompts in the step.")] = None,
    prompt: Annotated[
        int | None, typer.Option(min=100, max=30_000, help="Tokens of a prompt, about.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, max=8192, help="Tokens of a completion.")
    ] = None,
    sweep: Annotated[
        list[SweepOption] | None,
        typer.Option(help="Then vary this, without the usual way, the rest as it is."),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option(help="Recompute activations in the backward pass.")
    ] = True,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Decode the fast step's tokens with torch.compile.")
    ] = False,
    repeats: Annotated[
        int, typer.Option(min=1, max=100, help="Runs of each part; the quickest counts.")
    ] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Also write the result to this JSON file, as it grows.")
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """Measure a GRPO step: the usual way, the plain step and the fast one, and the floor.

    All ways have the same weights, prompts and tokens in one run. An optimizer step is in none of
    them. With the 7B's size on one H200 all takes five minutes.
    """
    require_outputs(files=[out])
    quiet_libraries()
    from dataclasses import replace

    import torch

    from omni_grpo_core.bench.measure import speed
    from omni_grpo_core.bench.run import WAYS, measure
    from omni_grpo_core.bench.shapes import SETTINGS, make_policy
    from omni_grpo_core.fast.rollout import compiled_body
    from omni_grpo_core.io.atomic import write_file
    from omni_grpo_core.report.terminal.bench import table

    quiet_transformers()
    require_device(device)
    chosen = {"group": group, "groups": groups, "prompt": prompt, "tokens": tokens}
    changed: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    setting = replace(SETTINGS[size.value], **changed)
    kind = cli.dtype_on(device, dtype)
    policy = make_policy(size.value, device.value, kind)
    found = speed(policy.device, policy.model.dtype)
    body = compiled_body() if compiled else None
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device is cli.Device.cuda else "cpu",
        "dtype": kind,
        "compiled": compiled,
        "torch": torch.__version__,
        "bytes_per_second": found.bytes,
        "operations_per_second": found.operations,
        "points": [],
    }

    def add(point: Any, ways: list[Way], **options: Any) -> None:
        measured = measure(
            policy,
            point,
            found,
            ways=ways,
            checkpointing=checkpointing,
            repeats=repeats,
            body=body,
            say=lambda text: typer.echo(text, err=True),
            **options,
        ).to_json()
        result["points"].append(measured)
        if out is not None:
            write_file(out, f"{json.dumps(result, indent=1)}\n".encode())
        if not as_json:
            typer.echo(f"{table(measured)}\n")

    wanted = [w for w in WAYS if not way or w in {one.value for one in way}]
    add(setting, wanted)
    for name in sweep or ():
        for value in SWEEPS[name.value]:
            varied: dict[str, Any] = {name.value: value}
            add(replace(setting, **varied), [w for w in wanted if w != "usual"], agree=False)
    cli.answer(as_json, result)
