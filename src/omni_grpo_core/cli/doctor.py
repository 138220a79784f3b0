"""``omni-grpo doctor``: from a recording to the broken stage."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omni_grpo_core import cli
from omni_grpo_core.errors import ConfigError, OmniGrpoError
from omni_grpo_core.io.console import (
    progress,
    quiet_libraries,
    quiet_transformers,
    require_outputs,
)

if TYPE_CHECKING:
    from rich.console import Console

    from omni_grpo_core.doctor.evidence import Reference
    from omni_grpo_core.doctor.experiments import Experiment
    from omni_grpo_core.types import Trace


def doctor(
    trace: Annotated[
        Path | None,
        typer.Argument(
            help="Folder written by record(), or one step of it; or the step at which a run of "
            "omni-grpo train was stopped."
        ),
    ] = None,
    dump: Annotated[
        tuple[str, Path] | None,
        typer.Option(
            metavar="FORMAT PATH",
            help="Diagnose what a trainer wrote by itself. "
            "FORMAT: verl, verl-omni, slime, miles, trl, swift or nemo-rl.",
        ),
    ] = None,
    checkpoint: cli.Checkpoint = None,
    html: cli.Html = None,
    causes: cli.Causes = True,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="Accept a cause, or evidence as stage/fact. Repeat for more; with reasons: "
            "[tool.omni-grpo.doctor] in pyproject.toml."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A recipe that differs is exit 1 too.")
    ] = False,
    experiments: Annotated[
        bool,
        typer.Option(
            "--experiments",
            help="Also generate again, with the cache and without, in eval mode and as recorded.",
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

    Exit codes: 0 nothing breaks the run, 1 something does, 2 nothing can be read or judged.
    """
    if modes:
        typer.echo("--modes is deprecated: use --experiments", err=True)
        experiments = True
    given = [x for x, y in (("TRACE", trace), ("--dump", dump), ("--import", pipeline)) if y]
    if len(given) != 1:
        raise ConfigError(
            "omni-grpo doctor",
            got=" and ".join(given) or "no recording",
            want="one of them" if given else "a recording, a dump or a pipeline",
            fix="run omni-grpo doctor TRACE, omni-grpo doctor --dump FORMAT PATH or "
            "omni-grpo doctor --import module:pipeline",
        )
    require_outputs(files=[html])
    quiet_libraries()
    from omni_grpo_core.doctor.allow import read_allowed, require_known
    from omni_grpo_core.doctor.checks.run import in_order
    from omni_grpo_core.doctor.diagnose import conclude, diagnose, require_judged, to_json
    from omni_grpo_core.doctor.evidence import is_checked
    from omni_grpo_core.doctor.experiments import run_experiments
    from omni_grpo_core.doctor.load import as_cases, read_traces
    from omni_grpo_core.doctor.verdict import Allow, without_causes
    from omni_grpo_core.report.terminal.doctor import print_diagnosis, print_experiments

    allowed = (*(Allow(name, "--allow") for name in allow or ()), *read_allowed(Path.cwd()))
    with progress("doctor", as_json) as on_stage:
        on_stage("reading")
        if dump is not None:
            from omni_grpo_core.doctor.dumps.formats import read_dump

            traces = read_dump(*dump)
        else:
            traces = _run(str(pipeline), checkpoint) if trace is None else read_traces(trace)
        as_cases(traces)
        on_stage("policy")
        folder = _checkpoint(checkpoint, [trace for _, trace in traces])
        replayed = not all(is_checked(trace) for _, trace in traces)
        reference, why = _reference(folder, checkpoint) if replayed else (None, "")
        cases = in_order(as_cases(traces, reference, why))
        diagnoses = []
        for (name, _), case in zip(traces, cases, strict=True):
            on_stage(Path(name).name)
            # a cause may be allowed even if none is shown
            diagnoses.append(diagnose(case, causes=causes or bool(allowed)))
        results: tuple[Experiment, ...] = ()
        if experiments:
            on_stage("experiments")
            results = run_experiments(cases)
    verdict = conclude(cases, diagnoses, allowed)
    require_known(verdict.unused, _known_causes())
    require_judged(verdict, str(trace or (dump and dump[1]) or pipeline))
    if not causes:
        verdict = without_causes(verdict)
    if html is not None:
        from omni_grpo_core.report.html import write_page
        from omni_grpo_core.report.html.doctor_page import doctor_page

        decode = None if reference is None else reference.policy.decode
        if not replayed and folder is not None:
            from omni_grpo_core.core.weightless import load_weightless

            quiet_transformers()
            decode = load_weightless(folder).decode
        write_page(html, doctor_page(cases, diagnoses, verdict, decode))
    found = {"steps": len(cases), **to_json(verdict, strict=strict)}
    if experiments:
        found["experiments"] = [asdict(result) for result in results]

    def shown(console: Console) -> None:
        print_diagnosis(console, verdict, len(cases))
        print_experiments(console, results)

    cli.answer(as_json, found, shown=shown)
    raise typer.Exit(verdict.exit_code(strict=strict))


def _known_causes() -> list[str]:
    from omni_grpo_core.doctor.registry import CAUSES
    from omni_grpo_core.faults.plan import BY_ID

    return [*CAUSES, *BY_ID]


def _checkpoint(given: Path | None, traces: list[Trace]) -> Path | None:
    """The given checkpoint, else the recorded one if it exists."""
    recorded = (Path(trace.header.get("checkpoint", "")) for trace in traces)
    return given or next((path for path in recorded if (path / "config.json").is_file()), None)


def _reference(folder: Path | None, checkpoint: Path | None) -> tuple[Reference | None, str]:
    """The reference pipeline of a checkpoint, else why there is none.

    Raises:
        CheckpointError: the given ``checkpoint`` is no model folder.
    """
    if folder is None:
        return None, "the recorded checkpoint is not here: pass --checkpoint"
    from omni_grpo_core.core.policy import load_policy
    from omni_grpo_core.doctor.evidence import Reference
    from omni_grpo_core.pipeline.settings import load_settings

    quiet_transformers()
    try:
        return Reference(load_policy(folder), load_settings(folder)), ""
    except OmniGrpoError as error:
        if checkpoint is not None and not (checkpoint / "config.json").is_file():
            raise
        return None, f"{error.item} has {error.got}; it needs {error.want}"


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
