"""The ``omni-grpo`` command. Heavy libraries are imported inside the subcommands.

Exit codes are those of :mod:`omni_grpo_core.io.exits`. ``--json`` prints one object to stdout;
everything else goes to stderr.
"""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omni_grpo_core import cli
from omni_grpo_core._version import __version__
from omni_grpo_core.cli.bench import bench
from omni_grpo_core.cli.data import app as data_app
from omni_grpo_core.cli.doctor import doctor
from omni_grpo_core.cli.faults import faults, incident
from omni_grpo_core.cli.golden import checking, reviewing, starting
from omni_grpo_core.cli.parity import parity
from omni_grpo_core.cli.rewards import app as rewards_app
from omni_grpo_core.cli.tiny import app as tiny_app
from omni_grpo_core.cli.tiny import realvocab_app
from omni_grpo_core.cli.upgrade import upgrade
from omni_grpo_core.cli.versions import app as versions_app
from omni_grpo_core.errors import CheckpointError
from omni_grpo_core.io.atomic import write_file
from omni_grpo_core.io.console import (
    progress,
    quiet_libraries,
    quiet_transformers,
    require_device,
    require_outputs,
)
from omni_grpo_core.io.exits import print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omni_grpo_core.core.policy import Policy
    from omni_grpo_core.core.second_decoder import Opinion
    from omni_grpo_core.pipeline.settings import Settings
    from omni_grpo_core.recorder.record import Recorder
    from omni_grpo_core.types import Sample

app = typer.Typer(
    name="omni-grpo",
    help="A test-first GRPO core for Qwen-Omni models: check, train, and find what broke.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # loading rich would take longer than the rest of --help
)
golden_app = cli.group("Check, attribute, review and accept goldens.")
for golden_command in (
    starting.init,
    checking.check,
    checking.diff,
    checking.regen,
    reviewing.review,
    reviewing.accept,
    reviewing.reject,
    reviewing.verify,
    reviewing.prune,
    checking.calibrate,
    checking.bisect,
):
    golden_app.command()(golden_command)
golden_app.command(hidden=True)(checking.record)
golden_app.command(hidden=True)(checking.behaviour)
app.add_typer(tiny_app, name="tiny")
app.add_typer(golden_app, name="golden")
app.add_typer(rewards_app, name="rewards")
app.add_typer(data_app, name="data")
app.add_typer(realvocab_app, name="realvocab")
app.add_typer(versions_app, name="versions")
app.command()(bench)
app.command()(upgrade)
app.command()(parity)
app.command()(doctor)
app.command()(faults)
app.command()(incident)


class SecondDecoder(StrEnum):
    torchcodec = "torchcodec"
    opencv = "opencv"
    decord = "decord"


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"omni-grpo {__version__}")
        raise typer.Exit


@app.command()
def check(
    checkpoint: cli.Checkpoint = None,
    processor: cli.Processor = None,
    data: cli.Data = None,
    root: cli.Root = None,
    row_format: cli.RowFormat = None,
    config: cli.Config = None,
    audio_in_video: cli.AudioInVideo = None,
    limit: cli.Limit = None,
    second_decoder: Annotated[
        SecondDecoder | None,
        typer.Option(help="Compare the clips' frames with those of this library, if installed."),
    ] = None,
    device: cli.DeviceOption = cli.Device.cpu,
    dtype: cli.DtypeOption = None,
    html: cli.Html = None,
    junit: cli.Junit = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Also save the value of every stage to this new folder."),
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """Check every stage of the pipeline on real clips. Exit code 1: a check failed, or a second
    decoder gives other frames."""
    require_outputs(files=[html, junit], folders=[trace])
    if str(data).startswith("hub:"):
        os.environ.setdefault("HF_HUB_OFFLINE", "0")  # asked for by name
    quiet_libraries()
    from dataclasses import asdict, replace

    from omni_grpo_core import tiny
    from omni_grpo_core.core.sample import load_samples
    from omni_grpo_core.pipeline.settings import load_settings

    folder = checkpoint or tiny.checkpoint_dir()
    settings = load_settings(folder, config)
    if audio_in_video is not None:
        settings = replace(settings, audio_in_video=audio_in_video.value)
    samples = load_samples(data or tiny.data_file(), root=root, format=row_format)[:limit]
    _refuse_too_long(samples, settings, folder)
    # torch from here on
    from omni_grpo_core.core.policy import load_policy
    from omni_grpo_core.pipeline.check import check as run_check
    from omni_grpo_core.report.terminal.check import print_check

    quiet_transformers()
    require_device(device)
    with progress("check", as_json) as on_stage:
        opinions: tuple[Opinion, ...] = ()
        if second_decoder is not None:
            from omni_grpo_core.core.second_decoder import second_opinions

            on_stage(second_decoder.value)
            refs = [ref for sample in samples for ref in sample.media]
            opinions = second_opinions(refs, settings.media, second_decoder.value)
        on_stage("policy")
        policy = load_policy(
            folder, processor=processor, device=device.value, dtype=cli.dtype_on(device, dtype)
        )
        result = run_check(policy, samples, settings, on_stage=on_stage)
    if trace is not None:
        from omni_grpo_core.trace.store import save_trace

        save_trace(result.trace, trace)
    if html is not None:
        from omni_grpo_core.report.html import write_page
        from omni_grpo_core.report.html.check_page import check_page

        write_page(html, check_page(result, policy.decode))
    if junit is not None:
        from omni_grpo_core.report.junit import check_junit

        write_file(junit, check_junit(result))
    second = {"second_decoder": [asdict(one) for one in opinions]} if second_decoder else {}
    cli.answer(
        as_json,
        {**result.to_json(), **second},
        *(one.words for one in opinions),
        shown=lambda console: print_check(console, result),
    )
    raise typer.Exit(0 if result.verdict == "pass" and all(o.same for o in opinions) else 1)


def _refuse_too_long(samples: Sequence[Sample], settings: Settings, folder: Path) -> None:
    """Prompts beyond the model's positions, before anything heavy is loaded."""
    from omni_grpo_core.training.positions import check_positions, positions_of
    from omni_grpo_core.training.prompt_estimate import prompt_sizes, token_shape

    try:
        shape, positions = token_shape(folder), positions_of(folder)
    except CheckpointError:  # loading it says what is wrong with it
        return
    sizes = prompt_sizes(samples, settings, shape)
    check_positions(samples, sizes, settings.max_new_tokens, positions)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Training config, in YAML or JSON.")],
    trace: Annotated[int, typer.Option(min=0, help="Save traces of the first N steps.")] = 0,
    record: Annotated[
        int, typer.Option(min=0, help="Record N steps into OUT/recording, for omni-grpo doctor.")
    ] = 0,
    data_changed: Annotated[
        bool, typer.Option("--data-changed", help="Resume although the rows are other ones.")
    ] = False,
    as_json: cli.Json = False,
) -> None:
    """Train a checkpoint with GRPO, or resume an interrupted run.

    For several processes: accelerate launch -m omni_grpo_core train CONFIG. Exit code 1: the guard
    stopped the run; the reason, the path to that step's trace and the command that shows it are
    printed.
    """
    from omni_grpo_core.training.load_config import load_train_config

    # what a reward function prints must not mix with the object of --json
    facts: list[str] = []
    with redirect_stdout(sys.stderr):
        plan, warnings = load_train_config(config, facts.append)
    first = os.environ.get("RANK", "0") == "0"
    for warning in warnings if first else ():
        typer.echo(f"warning: {warning}", err=True)
    if first:
        # accelerate launch --cpu starts one process, regardless of --num_processes
        world = int(os.environ.get("WORLD_SIZE", "1"))
        noun = "process" if world == 1 else "processes"
        for line in (f"{plan.steps} steps on {world} {noun}", *facts):
            typer.echo(line, err=True)
    quiet_libraries()
    from rich.console import Console

    from omni_grpo_core.training.guard import doctor_command
    from omni_grpo_core.training.loop import train as run_training
    from omni_grpo_core.training.progress import display

    quiet_transformers()
    require_device(plan.device)

    def recorded(policy: Policy) -> Recorder:
        from omni_grpo_core.recorder.record import record as watched

        folder = Path(plan.out) / "recording"
        return watched(folder, model=policy.model, processor=policy.processor, steps=record)

    console = Console(stderr=True, quiet=not first)
    live = console.is_terminal and not as_json
    with redirect_stdout(sys.stderr), display(plan.steps, console, live=live) as on_step:
        result = run_training(
            plan,
            trace_steps=trace,
            data_changed=data_changed,
            on_step=on_step,
            warn=lambda text: typer.echo(f"warning: {text}", err=True),
            tell=lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
            watch=recorded if record else None,
        )
    for finding in result.findings if first else ():
        typer.echo(f"stopped at step {result.step}: {finding}", err=True)
    if result.bundle is not None and first:
        typer.echo(f"trace and report: {result.bundle}", err=True)
        typer.echo(f"what was seen, row by row: {doctor_command(result.bundle)}", err=True)
    if as_json and first:
        print_json(result.to_json())
    raise typer.Exit(0 if result.status == "finished" else 1)
