"""``omni-grpo doctor``: from a recording to the broken stage."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omni_grpo_core import cli
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.console import (
    progress,
    quiet_libraries,
    quiet_transformers,
    require_outputs,
)

if TYPE_CHECKING:
    from rich.console import Console

    from omni_grpo_core.doctor.evidence import Reference
    from omni_grpo_core.doctor.experiment import Experiment
    from omni_grpo_core.types import Trace


def doctor(
    trace: Annotated[
        Path | None,
        typer.Argument(help="Folder written by record(), or one step of it."),
    ] = None,
    checkpoint: cli.Checkpoint = None,
    html: cli.Html = None,
    causes: cli.Causes = True,
    experiments: Annotated[
        bool,
        typer.Option(
            "--experiments",
            help="Also test causes by generating and scoring again, and without each medium.",
        ),
    ] = False,
    modes: Annotated[
        bool, typer.Option("--modes", hidden=True, help="Deprecated: use --experiments.")
    ] = False,
    pipeline: Annotated[
        str | None,
        typer.Option("--import", help="Run module:function on the shipped clips and diagnose it."),
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """Find what broke a recorded trainer, in which stage, and the fix.

    Exit codes: 0 nothing wrong, 1 something is broken, 2 the recording cannot be read or judged.
    """
    if modes:
        typer.echo("--modes is deprecated: use --experiments", err=True)
        experiments = True
    if (trace is None) == (pipeline is None):
        raise ConfigError(
            "omni-grpo doctor",
            got="no recording" if trace is None else "a recording and --import",
            want="one of them",
            fix="run omni-grpo doctor TRACE or omni-grpo doctor --import module:pipeline",
        )
    require_outputs(files=[html])
    quiet_libraries()
    from omni_grpo_core.doctor.checks.run import in_order
    from omni_grpo_core.doctor.diagnose import diagnose, merge, require_judged, to_json
    from omni_grpo_core.doctor.experiments import run_experiments
    from omni_grpo_core.doctor.load import as_cases, read_traces
    from omni_grpo_core.report.terminal.doctor import print_diagnosis, print_experiments

    with progress("doctor", as_json) as on_stage:
        on_stage("reading")
        traces = _run(str(pipeline), checkpoint) if trace is None else read_traces(trace)
        cases = as_cases(traces, None)
        on_stage("policy")
        reference = _reference(checkpoint, [trace for _, trace in traces])
        cases = in_order(as_cases(traces, reference))
        diagnoses = []
        for (name, _), case in zip(traces, cases, strict=True):
            on_stage(Path(name).name)
            diagnoses.append(diagnose(case, causes=causes))
        results: tuple[Experiment, ...] = ()
        if experiments:
            on_stage("experiments")
            results = run_experiments(cases)
    verdict = merge(diagnoses)
    require_judged(verdict, str(trace or pipeline))
    if html is not None:
        from omni_grpo_core.report.html import write_page
        from omni_grpo_core.report.html.doctor_page import doctor_page

        decode = None if reference is None else reference.policy.decode
        write_page(html, doctor_page(cases, diagnoses, decode))
    found = {"steps": len(cases), **to_json(verdict)}
    if experiments:
        found["experiments"] = [asdict(result) for result in results]

    def shown(console: Console) -> None:
        print_diagnosis(console, verdict, len(cases))
        print_experiments(console, results)

    cli.answer(as_json, found, shown=shown)
    raise typer.Exit(1 if verdict.findings else 0)


def _reference(checkpoint: Path | None, traces: list[Trace]) -> Reference | None:
    """The reference pipeline of the given checkpoint, else of the recorded one if it exists."""
    folder = checkpoint or next(
        (
            Path(trace.header["checkpoint"])
            for trace in traces
            if (Path(trace.header.get("checkpoint", "")) / "config.json").is_file()
        ),
        None,
    )
    if folder is None:
        return None
    from omni_grpo_core.core.policy import load_policy
    from omni_grpo_core.doctor.evidence import Reference
    from omni_grpo_core.pipeline.settings import load_settings

    quiet_transformers()
    settings = load_settings(folder)
    return Reference(load_policy(folder), settings)


def _run(pipeline: str, checkpoint: Path | None) -> list[tuple[str, Trace]]:
    """Record the pipeline on shipped clips with sound, two per batch, and report its errors."""
    sys.path.insert(0, "")  # the pipeline is in the working directory
    from omni_grpo_core import tiny
    from omni_grpo_core.core.policy import load_policy
    from omni_grpo_core.doctor.load import read_traces
    from omni_grpo_core.faults.fixtures import rows_of
    from omni_grpo_core.recorder.pipelines import load_pipeline, record_pipeline

    called = load_pipeline(pipeline)
    quiet_transformers()
    policy = load_policy(checkpoint or tiny.checkpoint_dir())
    clips = {
        row["path"]: row
        for row in (drawn.row for drawn in rows_of())
        if row["data_type"] == "video" and isinstance(row["path"], str)
    }
    rows = list(clips.values())[:4]
    with tempfile.TemporaryDirectory() as folder:
        raised = record_pipeline(
            called,
            Path(folder) / "trace",
            batches=(rows[:2], rows[2:]),
            model=policy.model,
            processor=policy.processor,
        )
        for error in raised:
            typer.echo(f"{pipeline} raised {error}", err=True)
        return read_traces(Path(folder) / "trace")
