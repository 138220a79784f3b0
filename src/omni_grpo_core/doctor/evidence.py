"""The nouns of a diagnosis: facts that were seen, causes that explain them, and the verdict.

Two layers, so that an unknown fault is blamed on the right stage even without a name: *looks* turn
a recorded step into :class:`Evidence`, with or without a reference to replay it on; *rules* explain
evidence by a cause of the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from omni_grpo_core.trace.calls import (
    AdvantageSeen,
    ForwardCall,
    GenerateCall,
    LossSeen,
    ProcessorCall,
    RewardCall,
    SamplesSeen,
    StepSeen,
    TemplateCall,
)
from omni_grpo_core.types import STAGES, Stage, Trace

if TYPE_CHECKING:
    from omni_grpo_core.core.policy import Policy
    from omni_grpo_core.pipeline.settings import Settings


Origin = Literal["added", "inherited", "unknown"]
"""``added``: the stage turned right input into wrong output. ``inherited``: it was handed the
error. ``unknown``: its input was not kept, so nobody can tell."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing that is not as it should be.

    ``fact``: a short name, the same for the same kind of thing (``"ids-differ"``), which rules go
    by. ``sentence``: what was found against what was wanted, with the values. ``row``: of the call.
    ``values``: the offending values, plain data, for rules and reports.
    """

    stage: Stage
    fact: str
    sentence: str
    origin: Origin = "added"
    row: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Explanation:
    """A cause that explains evidence. ``cause``: its id in the catalogue. ``seen``: the fact with
    its values. ``harm``: why it matters. ``fix``: what to change. ``confirm``: what would prove it.
    ``certainty``: 1 where nothing else gives these facts."""

    cause: str
    stage: Stage
    seen: str
    harm: str
    fix: str
    confirm: str = ""
    certainty: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """The good path to replay a step on."""

    policy: Policy
    settings: Settings


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One recorded step, its calls in order, and the reference, if there is one.

    ``memo`` keeps replays that several looks need (by a key of the look's own).
    """

    trace: Trace
    reference: Reference | None
    memo: dict[str, Any] = field(default_factory=dict)

    def _seen(self, kind: type) -> tuple[Any, ...]:
        return tuple(r.value for r in self.trace.stages if type(r.value) is kind)

    @property
    def samples(self) -> tuple[SamplesSeen, ...]:
        return self._seen(SamplesSeen)

    @property
    def templates(self) -> tuple[TemplateCall, ...]:
        return self._seen(TemplateCall)

    @property
    def processed(self) -> tuple[ProcessorCall, ...]:
        return self._seen(ProcessorCall)

    @property
    def generated(self) -> tuple[GenerateCall, ...]:
        return self._seen(GenerateCall)

    @property
    def forwards(self) -> tuple[ForwardCall, ...]:
        return self._seen(ForwardCall)

    @property
    def rewards(self) -> tuple[RewardCall, ...]:
        return self._seen(RewardCall)

    @property
    def advantages(self) -> tuple[AdvantageSeen, ...]:
        return self._seen(AdvantageSeen)

    @property
    def losses(self) -> tuple[LossSeen, ...]:
        return self._seen(LossSeen)

    @property
    def steps(self) -> tuple[StepSeen, ...]:
        return self._seen(StepSeen)


Look = Callable[[Case], Iterable[Evidence]]
Rule = Callable[[Case, Sequence[Evidence]], Iterable[Explanation]]
"""Sees all evidence of a step and explains what it can."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with one stage: all evidence that it added (or may have added), explained by
    causes, the likeliest first; none where the fault has no name."""

    stage: Stage
    evidence: tuple[Evidence, ...]
    causes: tuple[Explanation, ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The verdict on a recorded step or run. ``findings``: stages that broke something, in pipeline
    order. ``inherited``: stages that only passed an error on. ``seen``: stages that were looked at.
    ``missing``: what was not recorded, and what could not be judged for it. ``unjudged``: recorded
    stages at which a look failed, so that nobody can call them sound."""

    findings: tuple[Finding, ...]
    inherited: tuple[Stage, ...]
    seen: tuple[Stage, ...]
    missing: tuple[str, ...]
    unjudged: tuple[Stage, ...] = ()

    @property
    def first(self) -> Finding | None:
        """The first broken stage of the pipeline."""
        return min(self.findings, key=lambda f: STAGES.index(f.stage), default=None)


_KEY = "missing"


def say_missing(case: Case, sentence: str) -> None:
    """Note that something could not be judged on this step."""
    said: list[str] = case.memo.setdefault(_KEY, [])
    if sentence not in said:
        said.append(sentence)


def said_missing(case: Case) -> tuple[str, ...]:
    """All that was noted so far."""
    return tuple(case.memo.get(_KEY, ()))
