"""``omni-grpo faults``: is every known fault found, and nothing found where there is none?
``omni-grpo incident``: the run that started it all, replayed."""

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


def faults(
    only: Annotated[
        list[str] | None,
        typer.Option(help="Id of a fault, or the beginning of ids; may be given several times."),
    ] = None,
    pairs: Annotated[int, typer.Option(min=0, help="Pairs of faults of different stages.")] = 200,
    clean: Annotated[int, typer.Option(min=0, help="Clean configurations.")] = 200,
    causes: cli.Causes = True,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
    seed: Annotated[int, typer.Option(help="Draws pairs and clean configurations.")] = 0,
    names: Annotated[bool, typer.Option("--list", help="Only tell the catalogue.")] = False,
    as_json: cli.Json = False,
) -> None:
    """Put every fault of the catalogue into a clean trainer, and see whether the doctor names it.

    A fault that only other versions of transformers have is skipped, and said to be.

    Exit codes: 0 all targets met, 1 one was missed, 2 bad usage.
    """
    quiet_libraries()
    from omni_grpo_core.faults.campaign import run
    from omni_grpo_core.faults.plan import clean_tasks, fault_tasks, pair_tasks
    from omni_grpo_core.report.terminal.faults import print_result

    quiet_transformers()
    chosen = _chosen(only)
    if names:
        _tell(chosen, as_json)
        raise typer.Exit
    skipped = {fault.id: fault.absent for fault in chosen if fault.absent}
    here = [fault for fault in chosen if not fault.absent]
    tasks = [
        *fault_tasks(here),
        *pair_tasks(here, pairs, seed),
        *clean_tasks(clean, seed),
    ]
    if not tasks:
        _refuse_nothing(skipped)
    with _bar(len(tasks), as_json) as on_row:
        result = run(tasks, causes=causes, jobs=jobs, on_row=on_row, skipped=skipped)
    cli.answer(as_json, result.to_json(), shown=lambda console: print_result(console, result))
    raise typer.Exit(1 if result.missed else 0)


def incident(as_json: cli.Json = False) -> None:
    """Replay the incident on the tiny checkpoint: the garbage, the stuck reward, and what of it
    the doctor names.

    Transformers 4.53 to 5.23 give the garbage; under another the same script does no harm, and
    that is said.

    Exit codes: 0 every part has its answer, 1 one has none.
    """
    quiet_libraries()
    from omni_grpo_core.faults.incident import replay
    from omni_grpo_core.faults.incident_rows import findings
    from omni_grpo_core.report.terminal.doctor import print_diagnosis
    from omni_grpo_core.report.terminal.faults import print_incident, to_json

    quiet_transformers()
    with progress("incident", as_json) as on_stage:
        on_stage("training as the script did")
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

    chosen = tuple(f for f in FAULTS if not only or any(f.id.startswith(told) for told in only))
    for told in only or ():
        if not any(fault.id.startswith(told) for fault in chosen):
            raise ConfigError(
                f"--only {told}",
                got="no fault of that name",
                want="an id of the catalogue, or the beginning of one",
                fix="see omni-grpo faults --list",
            )
    return chosen


def _refuse_nothing(skipped: Mapping[str, str]) -> NoReturn:
    raise ConfigError(
        "omni-grpo faults",
        got="; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "nothing to run",
        want="a fault to put in, or a clean loop",
        fix="choose other faults, or run it under a transformers that has these",
    )


def _tell(chosen: tuple[Fault, ...], as_json: bool) -> None:
    keys = ("id", "stage", "story", "source", "stops", "versions", "absent")
    told = [{key: getattr(fault, key) for key in keys} for fault in chosen]
    cli.answer(as_json, {"faults": told}, *(f"{fault.id:28} {fault.story}" for fault in chosen))


@contextmanager
def _bar(total: int, as_json: bool) -> Iterator[Callable[[Row], None]]:
    """How far it is, on stderr, where a person watches."""
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
