"""Runs all trials of a plan in a few processes and adds up the results."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import resource_tracker
from typing import Any

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.faults.plan import Task
from omni_grpo_core.io.extras import require
from omni_grpo_core.rewards.accuracy import PACKAGES
from omni_grpo_core.types import Stage


@dataclass(frozen=True, slots=True)
class Row:
    """One trial. ``stages``: those that must be blamed; ``blamed`` and ``causes``: the diagnosis.
    ``said``: the first sentence for each stage blamed. ``raised``: what ended the loop."""

    kind: str
    ids: tuple[str, ...]
    stages: tuple[Stage, ...]
    blamed: tuple[Stage, ...]
    causes: tuple[str, ...]
    said: tuple[str, ...]
    raised: str | None
    config: str
    seconds: float

    @property
    def detected(self) -> bool:
        return bool(self.blamed)

    @property
    def stage_right(self) -> bool:
        """For a fault: the first stage blamed is its own. For a pair: both stages are blamed."""
        if self.kind == "pair":
            return set(self.stages) <= set(self.blamed)
        return self.blamed[:1] == self.stages

    @property
    def cause_right(self) -> bool:
        """The likeliest cause of the first stage blamed is the fault itself."""
        return self.stage_right and self.causes[:1] == self.ids

    def to_json(self) -> dict[str, Any]:
        judged = ("detected", "stage_right", "cause_right")
        return {**asdict(self), **{name: getattr(self, name) for name in judged}}


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a campaign. Targets: every fault detected, its stage blamed in 98%, its cause
    named in 90%, both stages of a pair in 90%, no false alarm; without causes, stages in 95%.
    ``skipped``: requested faults that were not injected, and why; they are not counted."""

    rows: tuple[Row, ...]
    causes: bool
    seconds: float
    skipped: Mapping[str, str] = field(default_factory=dict)

    def of(self, kind: str) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.kind == kind)

    @property
    def false_alarms(self) -> tuple[Row, ...]:
        return tuple(row for row in self.of("clean") if row.detected or row.raised)

    def shares(self) -> dict[str, float]:
        """Of the trials that ran; 1.0 where none did."""
        alone, pairs = self.of("fault"), self.of("pair")
        return {
            "detected": _share([row.detected for row in alone]),
            "stage_right": _share([row.stage_right for row in alone]),
            "cause_right": _share([row.cause_right for row in alone]) if self.causes else 1.0,
            "pairs": _share([row.stage_right for row in pairs]),
        }

    @property
    def missed(self) -> tuple[str, ...]:
        """Missed targets, in words."""
        wanted = {
            "detected": 1.0,
            "stage_right": 0.98 if self.causes else 0.95,
            "cause_right": 0.90,
            "pairs": 0.90,
        }
        found = self.shares()
        missed = [
            f"{name} {found[name]:.1%}, wanted {want:.0%}"
            for name, want in wanted.items()
            if found[name] < want
        ]
        alarms = len(self.false_alarms)
        return (*missed, *([f"{alarms} false alarms, wanted none"] if alarms else []))

    def to_json(self) -> dict[str, Any]:
        """Counts, shares and every row. ``cause_right`` is ``None`` without causes."""
        alone, pairs = self.of("fault"), self.of("pair")
        return {
            "ok": not self.missed,
            "injected": len(alone),
            "skipped": dict(self.skipped),
            "detected": sum(row.detected for row in alone),
            "stage_right": sum(row.stage_right for row in alone),
            "cause_right": sum(row.cause_right for row in alone) if self.causes else None,
            "pairs": len(pairs),
            "pairs_right": sum(row.stage_right for row in pairs),
            "clean_runs": len(self.of("clean")),
            "false_alarms": len(self.false_alarms),
            "shares": self.shares(),
            "missed": list(self.missed),
            "seconds": round(self.seconds, 1),
            "rows": [row.to_json() for row in self.rows],
        }


def run(
    tasks: Sequence[Task],
    *,
    causes: bool = True,
    jobs: int = 2,
    on_row: Callable[[Row], None] = lambda row: None,
    skipped: Mapping[str, str] | None = None,
) -> Result:
    """Run every task, in processes of one thread each; ``on_row`` receives each row as it ends.

    Raises :class:`~omni_grpo_core.errors.MissingExtra` without the packages that the loops need:
    what a loop raises is a finding.
    """
    require("train", "peft")
    require("rewards", *PACKAGES)
    begin = time.perf_counter()
    rows: dict[Task, Row] = {}
    with closing(_rows(tasks, causes, jobs)) as ended:
        for task, row in ended:
            rows[task] = row
            on_row(row)
    seconds = time.perf_counter() - begin
    return Result(tuple(rows[task] for task in tasks), causes, seconds, skipped or {})


def _rows(tasks: Sequence[Task], causes: bool, jobs: int) -> Generator[tuple[Task, Row]]:
    if jobs == 1:
        for task in tasks:
            yield task, perform(task, causes)
        return
    # a fork of a process that has run torch's threads can hang
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
        try:
            with _interrupts_held_back():
                waiting = {pool.submit(perform, task, causes): task for task in tasks}
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BrokenProcessPool:
            raise ConfigError(
                "a worker process", got="one killed from outside", want="one that runs to the end",
                fix="check whether memory ran out, and use fewer --jobs",
            ) from None  # fmt: skip
        except BaseException:
            # leaving the block waits for every trial
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Workers started in this block ignore Ctrl-C, which a terminal sends to all of them: their
    parent receives it and ends them."""
    # starting the tracker unblocks interrupts again
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    from omni_grpo_core.io.console import quiet_libraries, quiet_transformers

    quiet_libraries(worker=True)
    import torch

    torch.set_num_threads(1)
    from omni_grpo_core.faults import trial

    trial.reference("float32")
    quiet_transformers()
    # what is loaded by now stays: spare the collector scanning it after every trial
    gc.freeze()


def perform(task: Task, causes: bool) -> Row:
    """One trial, in this process."""
    from omni_grpo_core.faults.plan import BY_ID
    from omni_grpo_core.faults.trial import trial

    begin = time.perf_counter()
    faults = [BY_ID[id] for id in task.ids]
    found = trial(faults, task.config, causes=causes)
    # a loop and its hooks reference each other, and keep a model alive
    gc.collect()
    return Row(
        kind=task.kind,
        ids=task.ids,
        stages=tuple(fault.stage for fault in faults),
        blamed=found.blamed,
        causes=found.causes,
        said=found.sentences,
        raised=found.raised,
        config=repr(task.config),
        seconds=round(time.perf_counter() - begin, 2),
    )


def _share(held: Sequence[bool]) -> float:
    return sum(held) / len(held) if held else 1.0
