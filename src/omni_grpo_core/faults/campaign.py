"""Runs all trials of a plan in a few processes and adds up the results."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing import resource_tracker
from typing import Any

from omni_grpo_core.doctor.evidence import Severity
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.faults.plan import Kind, Task
from omni_grpo_core.faults.trial import Blame
from omni_grpo_core.io.extras import require
from omni_grpo_core.rewards.accuracy import PACKAGES
from omni_grpo_core.types import Stage

WANTED = {
    "detected": 0.98,
    "stage_right": 0.98,
    "cause_right": 0.90,
    "pairs": 0.95,
}
"""The share of trials in which it must be so. No cause may be named that is not true, and no sound
run called broken."""


@dataclass(frozen=True, slots=True)
class Row:
    """One trial. ``expected``: for each of its faults, the stages that may be blamed, its own
    first; ``true``: the causes that are true of them; ``severity``: that of its faults; ``recipe``:
    causes that are true of the loop without them. ``findings``: the diagnosis, headline first;
    ``unexplained``: symptoms that none of them explains. ``raised``: what ended the loop.
    ``absent``: the package without which a healthy loop could not run here, ``""`` if it could.
    ``without_effect``: those of a pair's faults without which the run leaves the same to the last
    bit (:mod:`~omni_grpo_core.faults.effect`), so that nobody could find them."""

    kind: Kind
    ids: tuple[str, ...]
    loop: str
    expected: tuple[tuple[Stage, ...], ...]
    true: tuple[str, ...]
    severity: Severity
    findings: tuple[Blame, ...]
    raised: str | None
    config: str
    seconds: float
    unexplained: tuple[str, ...] = ()
    recipe: tuple[str, ...] = ()
    absent: str = ""
    without_effect: tuple[str, ...] = ()

    @property
    def blamed(self) -> tuple[Stage, ...]:
        return tuple(one.stage for one in self.findings)

    @property
    def detected(self) -> bool:
        """Something is found, of the fault's severity: a recipe that only differs is not broken."""
        felt = self.severity == "breaks" and bool(self.unexplained)
        return felt or any(
            one.severity == self.severity and not self._is_of_the_loop(one) for one in self.findings
        )

    @property
    def broken(self) -> bool:
        """Something is said to break the run."""
        return bool(self.unexplained) or any(one.severity == "breaks" for one in self.findings)

    @property
    def stage_right(self) -> bool:
        """For a fault: its own stage is the headline, or one that it accepts there with its own
        blamed as well. For a pair: a stage of each is blamed."""
        if self.kind == "pair":
            return all(set(stages) & set(self.blamed) for stages in self.expected)
        return any(stage in stages for stages in self.expected for stage in self.blamed[:1])

    @property
    def proved(self) -> tuple[str, ...]:
        """All causes named as proved."""
        return tuple(cause for one in self.findings for cause in one.proved)

    @property
    def cause_right(self) -> bool:
        """A cause that is true is proved at a stage of the fault."""
        stages = {stage for stages in self.expected for stage in stages}
        return any(
            cause in self.true
            for one in self.findings
            if one.stage in stages
            for cause in one.proved
        )

    @property
    def wrong(self) -> tuple[str, ...]:
        """Causes named as proved that are true neither of its faults nor of its loop."""
        return tuple(cause for cause in self.proved if cause not in {*self.true, *self.recipe})

    def _is_of_the_loop(self, one: Blame) -> bool:
        """Whether all that a finding proves would be true without the faults."""
        return bool(one.proved) and set(one.proved) <= {*self.recipe} - {*self.true}

    def to_json(self) -> dict[str, Any]:
        judged = ("detected", "stage_right", "cause_right", "wrong", "blamed")
        return {**asdict(self), **{name: getattr(self, name) for name in judged}}


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a campaign. ``planned``: trials from which ``rows`` were drawn. ``skipped``:
    requested faults that were not injected and loops that could not run, and why; they are not
    counted, and neither are pairs of which one fault has no effect."""

    rows: tuple[Row, ...]
    causes: bool
    seconds: float
    skipped: Mapping[str, str] = field(default_factory=dict)
    planned: int = 0

    def of(self, *kinds: Kind) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.kind in kinds)

    @property
    def pairs(self) -> tuple[Row, ...]:
        """Those whose faults both have an effect."""
        return tuple(row for row in self.of("pair") if not row.without_effect)

    @property
    def without_effect(self) -> tuple[Row, ...]:
        """Pairs of which one fault has none."""
        return tuple(row for row in self.rows if row.without_effect)

    @property
    def sound(self) -> tuple[Row, ...]:
        """Runs without a fault."""
        return self.of("clean", "healthy")

    @property
    def false_alarms(self) -> tuple[Row, ...]:
        return tuple(row for row in self.sound if row.broken or row.raised)

    @property
    def wrong(self) -> tuple[Row, ...]:
        """Trials in which a cause is named that is not true."""
        return tuple(row for row in self.rows if row.wrong)

    def shares(self) -> dict[str, float]:
        """Of the trials that ran; 1.0 where none did."""
        alone, pairs = self.of("fault"), self.pairs
        return {
            "detected": _share([row.detected for row in alone]),
            "stage_right": _share([row.stage_right for row in alone]),
            "cause_right": _share([row.cause_right for row in alone]) if self.causes else 1.0,
            "pairs": _share([row.stage_right for row in pairs]),
        }

    @property
    def missed(self) -> tuple[str, ...]:
        """Missed targets, in words."""
        found = self.shares()
        missed = [
            f"{name} {found[name]:.1%}, wanted {want:.0%}"
            for name, want in WANTED.items()
            if found[name] < want
        ]
        if self.wrong:
            missed.append(f"{len(self.wrong)} trials with a wrong cause, wanted none")
        if self.false_alarms:
            missed.append(f"{len(self.false_alarms)} false alarms, wanted none")
        return tuple(missed)

    def to_json(self) -> dict[str, Any]:
        """Counts, shares and every row. ``cause_right`` is ``None`` without causes."""
        alone, pairs = self.of("fault"), self.pairs
        return {
            "ok": not self.missed,
            "planned": max(self.planned, len(self.rows)),
            "run": len(self.rows),
            "faults": len({row.ids for row in alone}),
            "injected": len(alone),
            "loops": dict(Counter(row.loop for row in alone)),
            "skipped": dict(self.skipped),
            "detected": sum(row.detected for row in alone),
            "stage_right": sum(row.stage_right for row in alone),
            "cause_right": sum(row.cause_right for row in alone) if self.causes else None,
            "wrong_causes": len(self.wrong),
            "pairs": len(pairs),
            "pairs_right": sum(row.stage_right for row in pairs),
            "pairs_without_effect": len(self.without_effect),
            "clean_runs": len(self.sound),
            "healthy_loops": len({row.loop for row in self.of("healthy")}),
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
    planned: int = 0,
    spares: Sequence[Task] = (),
) -> Result:
    """Run every task, in processes of one thread each; ``on_row`` receives each row as it ends.
    ``spares``: pairs, the next of which is run for every one of which a fault has no effect.

    Raises :class:`~omni_grpo_core.errors.MissingExtra` without the packages that our own loops
    need: what a loop raises is a finding. A healthy loop of others whose package is not installed
    is skipped.
    """
    require("train", "peft")
    require("rewards", *PACKAGES)
    begin = time.perf_counter()
    rows: dict[Task, Row] = {}
    with closing(_rows(tasks, spares, causes, jobs)) as ended:
        for task, row in ended:
            rows[task] = row
            on_row(row)
    seconds = time.perf_counter() - begin
    ended_rows = [rows[task] for task in (*tasks, *spares) if task in rows]
    left_out = {row.loop: row.absent for row in ended_rows if row.absent}
    ran = tuple(row for row in ended_rows if not row.absent)
    return Result(ran, causes, seconds, {**(skipped or {}), **left_out}, planned)


def _rows(
    tasks: Sequence[Task], spares: Sequence[Task], causes: bool, jobs: int
) -> Generator[tuple[Task, Row]]:
    others = iter(spares)
    if jobs == 1:
        left = deque(tasks)
        while left:
            task = left.popleft()
            row = perform(task, causes)
            left.extend(islice(others, bool(row.without_effect)))
            yield task, row
        return
    # a fork of a process that has run torch's threads can hang
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
        try:
            with _interrupts_held_back():
                waiting = {pool.submit(perform, task, causes): task for task in tasks}
            while waiting:
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    row = done.result()
                    with _interrupts_held_back():
                        for task in islice(others, bool(row.without_effect)):
                            waiting[pool.submit(perform, task, causes)] = task
                    yield waiting.pop(done), row
        except BrokenProcessPool:
            raise ConfigError(
                "a worker process", got="one killed from outside", want="one that runs to the end",
                fix="check whether memory ran out, and use fewer --jobs",
            ) from None  # fmt: skip
        except BaseException:
            # leaving the block waits for every trial
            for worker in set(multiprocessing.active_children()) - before:
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
    from omni_grpo_core.faults.boundary_trial import TRIALS
    from omni_grpo_core.faults.effect import trial_of_pair
    from omni_grpo_core.faults.healthy import BY_NAME, run_healthy
    from omni_grpo_core.faults.healthy.world import Setting
    from omni_grpo_core.faults.makes import MAKES
    from omni_grpo_core.faults.plan import BY_ID
    from omni_grpo_core.faults.trial import Summary, summarise, trial

    begin = time.perf_counter()
    faults = [BY_ID[id] for id in task.ids]
    absent = ""
    recipe: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    if isinstance(task.config, Setting):
        recipe = BY_NAME[task.loop].recipe
        try:
            found = summarise(run_healthy(task.loop, task.config, causes=causes))
        except Exception as error:  # a finding of ours: such a loop is sound
            absent = _absent_package(error)
            found = Summary((), (), f"{type(error).__name__}: {error}")
    elif task.loop in TRIALS:
        found = TRIALS[task.loop](faults, task.config, causes=causes)
    else:
        make = MAKES[task.loop]
        recipe = make.recipe
        if task.kind == "pair":
            found, without = trial_of_pair(faults, task.config, make, causes=causes)
        else:
            found = trial(faults, task.config, make, causes=causes)
    # a loop and its hooks reference each other, and keep a model alive
    gc.collect()
    noted = task.loop in MAKES and MAKES[task.loop].noted
    differs = bool(faults) and all(one.severity_in(noted) == "differs" for one in faults)
    return Row(
        kind=task.kind,
        ids=task.ids,
        loop=task.loop,
        expected=tuple((fault.stage, *fault.accepted) for fault in faults),
        true=tuple(cause for fault in faults for cause in (fault.id, *fault.also)),
        severity="differs" if differs else "breaks",
        findings=found.findings,
        raised=found.raised,
        config=str(task.config),
        seconds=round(time.perf_counter() - begin, 2),
        unexplained=found.unexplained,
        recipe=recipe,
        absent=absent,
        without_effect=without,
    )


def _absent_package(error: Exception) -> str:
    """Why a loop cannot run on this machine; ``""`` for an error of another kind."""
    missing = isinstance(error, ModuleNotFoundError) and (error.name or "")
    if not missing or missing.partition(".")[0] == "omni_grpo_core":
        return ""
    return f"not runnable: no package {missing}"


def _share(held: Sequence[bool]) -> float:
    return sum(held) / len(held) if held else 1.0
