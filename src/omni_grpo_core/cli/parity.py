"""``omni-grpo parity``: do two input paths give the model the same?"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated

import typer

from omni_grpo_core import cli
from omni_grpo_core.io.console import (
    quiet_libraries,
    quiet_transformers,
    require_outputs,
    step_progress,
)

if typing.TYPE_CHECKING:
    from omni_grpo_core.types import Trace


def parity(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="Input path: ours, transformers, trl, swift, vllm, vllm-engine, your own "
            "module:function(messages, processor), or a folder of --traces.",
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The path to compare it with, likewise.")],
    checkpoint: cli.Checkpoint = None,
    processor: cli.Processor = None,
    data: cli.Data = None,
    root: cli.Root = None,
    row_format: cli.RowFormat = None,
    config: cli.Config = None,
    audio_in_video: cli.AudioInVideo = None,
    limit: cli.Limit = None,
    python_a: Annotated[
        Path | None, typer.Option(help="Run A in this Python, of an environment with its library.")
    ] = None,
    python_b: Annotated[
        Path | None, typer.Option(help="Run B in this Python, of an environment with its library.")
    ] = None,
    traces: Annotated[
        Path | None,
        typer.Option(help="Also store both sides in this new folder, as a and b: either can stand "
                     "for A or B later, on another machine too."),
    ] = None,
    html: cli.Html = None,
    as_json: cli.Json = False,
) -> None:  # fmt: skip
    """Compare what two input paths give the model, row by row: text, media, ids, positions.

    Needs a checkpoint's processor, no weights. Names the first stage and token at which the paths
    differ, and the cause. Exit code 1: they differ.
    """
    require_outputs(files=[html], folders=[traces])
    quiet_libraries()
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    from omni_grpo_core import tiny
    from omni_grpo_core.parity.compare import compare_paths
    from omni_grpo_core.parity.given import row_reader
    from omni_grpo_core.parity.run import (
        Task,
        is_stored,
        load_traces,
        run_in,
        run_path,
        save_traces,
    )
    from omni_grpo_core.pipeline.settings import load_settings
    from omni_grpo_core.report.terminal.parity import print_parity

    quiet_transformers()
    folder = checkpoint or tiny.checkpoint_dir()
    settings = load_settings(folder, config)
    if audio_in_video is not None:
        settings = replace(settings, audio_in_video=audio_in_video.value)
    task = Task(folder, data or tiny.data_file(), settings, processor, root, row_format, limit)
    setup, samples = task.setup(), task.samples()
    with TemporaryDirectory() as scratch, step_progress(as_json) as watch:

        def side(name: str, python: Path | None, letter: str) -> tuple[Trace, ...]:
            watch(0, len(samples), name)
            if is_stored(name):
                return load_traces(Path(name))
            if python is not None:
                return run_in(python, name, task, Path(scratch) / letter)
            return run_path(name, setup, samples, lambda row: watch(row, len(samples), name))

        sides = side(a, python_a, "a"), side(b, python_b, "b")
        if traces is not None:
            for letter, made in zip("ab", sides, strict=True):
                save_traces(made, traces / letter)
        report = compare_paths(*sides, setup, row_reader(setup, samples))
    if html is not None:
        from omni_grpo_core.report.html import write_page
        from omni_grpo_core.report.html.parity_page import parity_page

        write_page(html, parity_page(report))
    cli.answer(as_json, report.to_json(), shown=lambda console: print_parity(console, report))
    raise typer.Exit(0 if report.equal else 1)
