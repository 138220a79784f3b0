"""One trial: faults injected into a clean loop, a few steps recorded, the recording diagnosed."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from omni_grpo_core import tiny
from omni_grpo_core.core.policy import load_policy
from omni_grpo_core.doctor.checks.run import in_order
from omni_grpo_core.doctor.diagnose import diagnose_run
from omni_grpo_core.doctor.evidence import Finding, Reference, Severity
from omni_grpo_core.doctor.load import as_cases, read_traces
from omni_grpo_core.doctor.verdict import Diagnosis
from omni_grpo_core.faults.config import LoopConfig
from omni_grpo_core.faults.fault import Fault
from omni_grpo_core.faults.makes import MAKES, Make
from omni_grpo_core.faults.seams import Loop
from omni_grpo_core.pipeline.settings import load_settings
from omni_grpo_core.recorder.record import Recorder, record
from omni_grpo_core.types import STAGES, Stage, Trace


@dataclass(frozen=True, slots=True)
class Blame:
    """One finding in short. ``cause``: the likeliest, ``""`` where none explains it; ``proved``:
    all that were reproduced or observed; ``said``: its first sentence."""

    stage: Stage
    severity: Severity
    cause: str
    proved: tuple[str, ...]
    said: str


@dataclass(frozen=True, slots=True)
class Summary:
    """A diagnosis in short. ``findings``: the headline first, then in pipeline order. ``raised``:
    what ended the loop, if anything did. ``unexplained``: the symptoms of a run that learns nothing
    or something wrong that no finding explains."""

    findings: tuple[Blame, ...]
    missing: tuple[str, ...]
    raised: str | None
    unexplained: tuple[str, ...] = ()

    @property
    def blamed(self) -> tuple[Stage, ...]:
        return tuple(one.stage for one in self.findings)

    @property
    def causes(self) -> tuple[str, ...]:
        """The likeliest cause of each stage blamed."""
        return tuple(one.cause for one in self.findings)

    @property
    def sentences(self) -> tuple[str, ...]:
        return tuple(one.said for one in self.findings)

    @property
    def first(self) -> Stage | None:
        return self.blamed[0] if self.findings else None

    @property
    def cause(self) -> str:
        return self.causes[0] if self.findings else ""


@cache
def reference(dtype: str) -> Reference:
    """The shipped checkpoint in a precision, loaded once per process."""
    folder = tiny.checkpoint_dir()
    return Reference(load_policy(folder, dtype=dtype), load_settings(folder))


@contextmanager
def recording(
    loop: Loop, faults: Iterable[Fault], folder: Path, steps: int, **more: Any
) -> Iterator[Recorder]:
    """A recorder on a loop with ``faults`` injected; ``more``: further arguments of ``record``."""
    with ExitStack() as stack:
        for fault in faults:
            stack.enter_context(fault.inject(loop))
        if "settings" in more:
            more["settings"] = {**loop.settings(), **more["settings"]}
        yield stack.enter_context(
            record(
                folder,
                model=loop.model,
                processor=loop.processor,
                reward_funcs=loop.reward_funcs,
                steps=steps,
                **more,
            )
        )


def play(
    faults: Sequence[Fault], config: LoopConfig, folder: Path, make: Make, steps: int
) -> tuple[Loop, str | None]:
    """Run ``steps`` steps of a loop with ``faults`` injected, recorded in ``folder``: the loop as
    it is afterwards, and what it raised.

    An exception in the loop is a finding, not an error: half of the faults in the wild end a run.
    """
    loop = make.build(reference(config.dtype).policy, config)
    # every update on a rollout is an optimizer step, and one recorded step
    seen = steps * config.iterations
    try:
        with (
            recording(
                loop, faults, folder, seen, **({"settings": {}} if make.noted else {})
            ) as recorder,
            # the recorder captures them; on a terminal they would be noise
            warnings.catch_warnings(action="ignore"),
        ):
            for _ in range(steps):
                loop.step(recorder if make.noted else None)
    except Exception as error:
        return loop, f"{type(error).__name__}: {error}"
    return loop, None


def steps_of(faults: Sequence[Fault]) -> int:
    """Optimizer steps until all of them show."""
    return max((fault.steps for fault in faults), default=1)


def recorded(
    faults: Sequence[Fault], config: LoopConfig, folder: Path, make: Make = MAKES["reference"]
) -> tuple[list[tuple[str, Trace]], str | None]:
    """The steps of a loop with ``faults`` injected, and what it raised."""
    _, raised = play(faults, config, folder, make, steps_of(faults))
    return read_traces(folder), raised


def trial(
    faults: Sequence[Fault],
    config: LoopConfig,
    make: Make = MAKES["reference"],
    *,
    causes: bool = True,
) -> Summary:
    """Record and diagnose a loop with ``faults`` injected; with none, a clean loop."""
    with tempfile.TemporaryDirectory() as folder:
        traces, raised = recorded(faults, config, Path(folder) / "trace", make)
        return diagnosed(traces, raised, config, causes)


def diagnosed(
    traces: Sequence[tuple[str, Trace]], raised: str | None, config: LoopConfig, causes: bool
) -> Summary:
    """The diagnosis of a loop's steps, in short."""
    cases = in_order(as_cases(traces, reference(config.dtype)))
    return summarise(diagnose_run(cases, causes=causes), raised)


def summarise(verdict: Diagnosis, raised: str | None = None) -> Summary:
    """A diagnosis in short."""
    head = verdict.headline
    first = head if isinstance(head, Finding) else verdict.first
    ordered = sorted(verdict.findings, key=lambda one: (one is not first, STAGES.index(one.stage)))
    unexplained = tuple(symptom.name for symptom in verdict.unexplained)
    return Summary(tuple(map(_blame, ordered)), verdict.missing, raised, unexplained)


def _blame(finding: Finding) -> Blame:
    return Blame(
        stage=finding.stage,
        severity=finding.severity,
        cause=finding.causes[0].cause if finding.causes else "",
        proved=tuple(cause.cause for cause in finding.causes if cause.proved),
        said=finding.evidence[0].sentence if finding.evidence else "",
    )


def config_for(faults: Sequence[Fault], base: LoopConfig | None = None) -> LoopConfig | None:
    """A loop in which all of ``faults`` take effect; ``None`` where their needs conflict."""
    needs: dict[str, Any] = {}
    for fault in faults:
        if _contradict(needs, fault.needs):
            return None
        needs |= fault.needs
    return replace(base or LoopConfig(), **needs)


def _contradict(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return any(name in one and one[name] != value for name, value in other.items())
