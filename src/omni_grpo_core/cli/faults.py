"""``omni-grpo faults``: is every known fault found, and nothing in clean runs?
``omni-grpo incident``: a replay of the run that started the project."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from omni_grpo_core import cli
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.console import progress, quiet_libraries, quiet_transformers

if TYPE_CHECKING:
    from rich.console import Console

    from omni_grpo_core.faults.campaign import Row
    from omni_grpo_core.faults.fault import Fault
    from omni_grpo_core.faults.plan import Task


def faults(
    only: Annotated[
        list[str] | None,
        typer.Option(help="Fault id, or prefix of ids, or a pair A+B of ids; may be repeated."),
    ] = None,
    loop: Annotated[
        list[str] | None,
        typer.Option(help="Loop to plant the faults in; may be repeated. By default all."),
    ] = None,
    pairs: Annotated[int, typer.Option(min=0, help="Pairs of faults in different stages.")] = 200,
    clean: Annotated[int, typer.Option(min=0, help="Runs of sound loops.")] = 440,
    sample: Annotated[
        int, typer.Option(min=1, help="Trials to draw from all of these; every fault is in.")
    ] = 400,
    whole: Annotated[bool, typer.Option("--all", help="Run all trials, drawing none.")] = False,
    causes: cli.Causes = True,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    names: Annotated[bool, typer.Option("--list", help="List the catalogue and exit.")] = False,
    as_json: cli.Json = False,
) -> None:
    """Plant every known fault in sound loops of several makes; does the doctor find it?

    By default a sample of all trials: every fault in one of its loops, some pairs of faults and
    some sound runs. ``--all`` plants each fault in every loop. A trial takes about a second of one
    core, that of a pair two: with two jobs on two free cores the sample some 3 minutes, all of them
    some 6.

    Faults between trainer and rollout engine (``engine.``) are planted in a run on an engine, which
    the proof of agreement should stop and the doctor explain (``--loop engine``), and, where the
    engine reads other inputs, in front of ``omni-grpo parity`` (``--loop parity``).

    Faults that need another version of transformers, and loops that need a package that is not
    installed, are reported as skipped.

    A fault of a pair has no effect where the same run without it, with equal settings and seeds,
    leaves the same to the last bit: every recorded value, text, loss and gradient, and the weights
    after its last step. Beside garbage whose rewards are all 0 the sign of the advantages changes
    nothing, for example. This is decided from the runs, never from a diagnosis. Such a pair is
    named, not counted, and replaced by the next one drawn.

    Exit codes: 0 all targets met, 1 a target was missed, 2 bad usage.
    """
    quiet_libraries()
    from omni_grpo_core.faults import plan
    from omni_grpo_core.faults.campaign import run
    from omni_grpo_core.report.terminal.faults import print_result

    quiet_transformers()
    chosen = _chosen(only)
    if names:
        _list(chosen, as_json)
        raise typer.Exit
    skipped = {fault.id: fault.absent for fault in chosen if fault.absent}
    here = [fault for fault in chosen if not fault.absent]
    drawn = plan.pair_tasks(here, pairs, seed)
    planned = [
        *plan.fault_tasks(here),
        *_named_pairs(only),
        *drawn,
        *plan.clean_tasks(clean, seed),
    ]
    spares = plan.spare_pairs(here, drawn, seed)
    if loop:
        planned, spares = _in(planned, loop), _in(spares, loop)
    if not planned:
        _refuse_nothing(skipped)
    tasks = planned if whole else plan.sample(planned, sample, seed)
    with _bar(len(tasks), as_json) as on_row:
        result = run(
            tasks, causes=causes, jobs=jobs, on_row=on_row, skipped=skipped, planned=len(planned),
            spares=spares,
        )  # fmt: skip
    if not result.rows:
        _refuse_nothing(result.skipped)
    cli.answer(as_json, result.to_json(), shown=lambda console: print_result(console, result))
    raise typer.Exit(1 if result.missed else 0)


def incident(as_json: cli.Json = False) -> None:
    """Replay the incident on the tiny checkpoint, and diagnose it.

    Transformers 4.53 to 5.23 produce its garbage and stuck reward; under other versions the same
    script is harmless, which is reported.

    Exit codes: 0 every symptom is explained, 1 one is not.
    """
    quiet_libraries()
    from omni_grpo_core.faults.incident import replay
    from omni_grpo_core.faults.incident_rows import findings
    from omni_grpo_core.report.terminal.doctor import print_diagnosis
    from omni_grpo_core.report.terminal.faults import print_incident, to_json

    quiet_transformers()
    with progress("incident", as_json) as on_stage:
        on_stage("training like the script")
        replayed = replay()
        on_stage("the doctor")
        rows = findings(replayed)

    def shown(console: Console) -> None:
        print_diagnosis(console, replayed.verdict, len(replayed.cases))
        print_incident(console, replayed, rows)

    cli.answer(as_json, to_json(replayed, rows), shown=shown)
    raise typer.Exit(1 if any(row.answer == "missed" for row in rows) else 0)


def _chosen(only: list[str] | None) -> tuple[Fault, ...]:
    from omni_grpo_core.faults.plan import FAULTS

    asked = [prefix for prefix in only or ("",) if "+" not in prefix]
    for prefix in asked:
        if not any(fault.id.startswith(prefix) for fault in FAULTS):
            _refuse_unknown(prefix, "a fault id of the catalogue, or a prefix of one")
    return tuple(f for f in FAULTS if any(f.id.startswith(prefix) for prefix in asked))


def _named_pairs(only: list[str] | None) -> list[Task]:
    from omni_grpo_core.faults import plan

    found: list[Task] = []
    for name in only or ():
        ids = name.split("+")
        if len(ids) == 1:
            continue
        if len(ids) > 2 or not {*ids} <= {*plan.BY_ID}:
            _refuse_unknown(name, "two whole fault ids, joined by +")
        one, other = (plan.BY_ID[id] for id in ids)
        found += plan.named_pairs(one, other)
    return found


def _refuse_unknown(name: str, want: str) -> NoReturn:
    raise ConfigError(
        f"--only {name}",
        got="no matching fault",
        want=want,
        fix="run omni-grpo faults --list to see them",
    )


def _in(planned: list[Task], loops: list[str]) -> list[Task]:
    from omni_grpo_core.faults.boundary import PLACES
    from omni_grpo_core.faults.makes import MAKES

    for name in loops:
        if name not in {*MAKES, *PLACES}:
            raise ConfigError(
                f"--loop {name}",
                got="no such loop",
                want=f"one of {', '.join((*MAKES, *PLACES))}",
                fix="choose one of them, or leave --loop out for all",
            )
    return [task for task in planned if task.loop in loops]


def _refuse_nothing(skipped: Mapping[str, str]) -> NoReturn:
    raise ConfigError(
        "omni-grpo faults",
        got="; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "nothing to run",
        want="a fault to inject, or a clean loop",
        fix="choose other faults, or run under a transformers version that has these",
    )


def _list(chosen: tuple[Fault, ...], as_json: bool) -> None:
    keys = ("id", "stage", "story", "source", "severity", "stops", "versions", "absent")
    listed = [{key: getattr(fault, key) for key in keys} for fault in chosen]
    cli.answer(as_json, {"faults": listed}, *(f"{fault.id:28} {fault.story}" for fault in chosen))


@contextmanager
def _bar(total: int, as_json: bool) -> Iterator[Callable[[Row], None]]:
    """A progress bar on stderr, if it is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if as_json or not console.is_terminal:
        yield lambda row: None
        return
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("faults", total=total)
        yield lambda row: bar.update(
            task, advance=1, description=" + ".join(row.ids)[:32] or "clean"
        )
