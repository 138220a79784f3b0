"""``omni-grpo bench``: what a step costs."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from omni_grpo_core import cli
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.console import (
    quiet_libraries,
    quiet_transformers,
    require_device,
    require_outputs,
)
from omni_grpo_core.io.extras import require


class SizeOption(StrEnum):
    tiny = "tiny"
    real = "7b"


class WayOption(StrEnum):
    usual = "usual"
    plain = "plain"
    fast = "fast"


def bench(
    context: typer.Context,
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
        list[str] | None,
        typer.Option(
            metavar="NAME[=VALUES]",
            help="Then vary group, groups or prompt (group=2,8,32), the rest as it is; without "
            "the usual way.",
        ),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option(help="Recompute activations in the backward pass.")
    ] = True,
    micro_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Completions in a pass of the usual update. Default: all."),
    ] = None,
    offload_gradients: Annotated[
        bool,
        typer.Option(
            "--offload-gradients", help="The fast update's gradients go to the host's memory."
        ),
    ] = False,
    rounding: Annotated[
        bool,
        typer.Option("--rounding", help="Then compare with float32, in a smaller setting."),
    ] = False,
    repeats: Annotated[
        int, typer.Option(min=1, max=100, help="Runs of each part; the quickest counts.")
    ] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Also write the result to this JSON file, as it grows.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Also draw table and sweeps (needs the extra 'bench').")
    ] = None,
    earlier: Annotated[
        list[Path] | None,
        typer.Option("--from", help="Measure nothing: show this JSON file, with others' sweeps."),
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """Measure a GRPO step: the usual way, the plain step and the fast one, and the floor.

    All ways have the same weights, prompts and tokens in one run. An optimizer step is in none of
    them. With the 7B's size on one H200 all takes three minutes.
    """
    require_outputs(files=[out, png])
    if png is not None:
        require("bench", "matplotlib")
    if earlier and (measuring := _measuring(context)):
        raise ConfigError(
            "--from",
            got=", ".join(measuring),
            want="what was measured before, as it is",
            fix="leave one of them out",
        )
    kind = cli.dtype_on(device, dtype)
    if rounding and kind == "float32":
        raise ConfigError(
            "--rounding",
            got="float32",
            want="a dtype to compare with float32",
            fix="add --dtype bfloat16",
        )
    if offload_gradients and way and WayOption.fast not in way:
        raise ConfigError(
            "--offload-gradients",
            got=f"--way {', '.join(way)}",
            want="the fast way, in whose update it acts",
            fix="add --way fast",
        )
    from omni_grpo_core.io.atomic import write_file
    from omni_grpo_core.report.terminal.bench import report

    def show(result: dict[str, Any]) -> tuple[str, bytes]:
        if png is None:
            return report(result), b""
        from omni_grpo_core.report.bench_chart import picture

        return report(result), picture(result)

    def keep(result: dict[str, Any]) -> None:
        if out is not None:
            write_file(out, f"{json.dumps(result, indent=1)}\n".encode())

    if earlier:
        from omni_grpo_core.bench.session import read_results

        try:
            result = read_results(earlier)
            text, drawn = show(result)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(
                ", ".join(map(str, earlier)),
                got=f"something other than a benchmark's result ({type(error).__name__}: {error})",
                want="what omni-grpo bench wrote",
                fix="pass what --out wrote, as it is",
            ) from error
        keep(result)
    else:
        quiet_libraries()
        from dataclasses import replace

        from omni_grpo_core.bench.run import WAYS, Options
        from omni_grpo_core.bench.session import session, sweep_of
        from omni_grpo_core.bench.shapes import ROUNDED, SETTINGS, make_policy

        quiet_transformers()
        require_device(device)
        chosen = {"group": group, "groups": groups, "prompt": prompt, "tokens": tokens}
        changed: dict[str, Any] = {key: n for key, n in chosen.items() if n is not None}
        setting = replace(SETTINGS[size.value], **changed)
        sweeps = [sweep_of(text, size.value) for text in sweep or ()]
        result = session(
            make_policy(size.value, device.value, kind),
            setting,
            Options(
                ways=[one for one in WAYS if not way or one in {w.value for w in way}],
                checkpointing=checkpointing,
                micro_batch=micro_batch,
                offload_gradients=offload_gradients,
                repeats=repeats,
                say=lambda text: typer.echo(text, err=True),
            ),
            sweeps=sweeps,
            rounded=ROUNDED[size.value] if rounding else None,
            done=keep,
        )
        text, drawn = show(result)
    if png is not None:
        write_file(png, drawn)
    cli.answer(as_json, result, text)


def _measuring(context: typer.Context) -> list[str]:
    """The given options that change nothing where nothing is measured."""
    return [
        option.opts[0]
        for option in context.command.params
        if option.name and option.name not in ("earlier", "out", "png", "as_json")
        if (source := context.get_parameter_source(option.name)) and source.name != "DEFAULT"
    ]
