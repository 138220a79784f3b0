"""The verdict on a recorded step or run: what is wrong, what was judged, and what was not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from omni_grpo_core.doctor.evidence import Evidence, Explanation, Finding, Raised
from omni_grpo_core.doctor.symptoms import Symptom
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.types import STAGES, Stage

State = Literal[
    "unseen", "unjudged", "sound", "failed", "inherited", "allowed", "differs", "broken"
]
"""What is known of a stage, from least to most: ``unseen``: nothing of it was recorded.
``unjudged``: recorded, but nothing to compare it with. ``sound``: a value of it was compared, and
was right. ``failed``: a look that may blame it failed, so it cannot be called sound.
``inherited``: it only passed an error on. ``allowed``, ``differs``, ``broken``: it has a finding,
by its severity."""
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True, slots=True)
class Coverage:
    """What is known of one stage, and why not more: empty for a stage that was judged."""

    stage: Stage
    state: State
    why: str = ""


@dataclass(frozen=True, slots=True)
class Allow:
    """What a user accepts. ``cause``: its id, or ``stage/fact``. ``why``: the reason given."""

    cause: str
    why: str

    def __post_init__(self) -> None:
        if not self.why.strip():
            raise ConfigError(
                self.cause, got="no reason", want='why = "…"', fix="say why it is allowed"
            )


@dataclass(frozen=True, slots=True)
class Allowed:
    """A part of a finding that ``by`` accepts: it does not count."""

    by: Allow
    stage: Stage
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True, slots=True)
class Felt:
    """A symptom, and the stage whose finding explains it, if one does. ``allowed``: that finding
    was allowed."""

    symptom: Symptom
    stage: Stage | None
    allowed: bool = False


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The verdict on a recorded step or run.

    ``findings``: stages that added an error or differ from the recipe, in pipeline order.
    ``coverage``: each stage of the pipeline. ``missing``: what could not be judged, and why.
    ``raised``, ``symptoms`` (the worst first), ``allowed`` and ``unused`` (what was allowed and not
    found), and ``trainer``, what ``attach`` recognised, are those of a run: a step alone has none.
    """

    findings: tuple[Finding, ...]
    coverage: tuple[Coverage, ...]
    missing: tuple[str, ...]
    raised: Raised | None = None
    symptoms: tuple[Felt, ...] = ()
    allowed: tuple[Allowed, ...] = ()
    unused: tuple[Allow, ...] = ()
    trainer: str = ""

    @property
    def breaking(self) -> tuple[Finding, ...]:
        """The findings that break the run."""
        return tuple(f for f in self.findings if f.severity == "breaks")

    @property
    def first(self) -> Finding | None:
        """The first broken stage of the pipeline; where none is, the first that differs."""
        return min(self.findings, key=_by_severity, default=None)

    @property
    def headline(self) -> Finding | Symptom | None:
        """What to read first: the finding that explains the worst symptom, or that symptom where
        nothing explains it; without symptoms the first broken stage. ``None`` for a healthy run:
        how its recipe differs is no news."""
        if self.healthy:
            return None
        for felt in self.symptoms:
            if felt.stage is not None and not felt.allowed:
                return self.finding(felt.stage)
            if felt.symptom in self.unexplained:
                return felt.symptom
        return self.first if self.broken else self.idle

    @property
    def judged(self) -> tuple[Stage, ...]:
        """Stages of which some value was compared with what it should be."""
        known: tuple[State, ...] = ("sound", "inherited", "allowed", "differs", "broken")
        return tuple(c.stage for c in self.coverage if c.state in known)

    @property
    def unexplained(self) -> tuple[Symptom, ...]:
        """Symptoms of a run that learns nothing or something wrong, that no finding explains."""
        return tuple(
            felt.symptom
            for felt in self.symptoms
            if felt.stage is None and not felt.allowed and felt.symptom.severity == "breaks"
        )

    @property
    def idle(self) -> Symptom | None:
        """The symptom of a run that taught nothing, though nothing is known to be wrong with it."""
        idle = (felt for felt in self.symptoms if felt.symptom.idle and not felt.allowed)
        return None if self.broken else next((felt.symptom for felt in idle), None)

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong, and something could be learned."""
        return not self.broken and self.idle is None

    @property
    def broken(self) -> bool:
        """Whether something is wrong with the run."""
        return bool(self.raised or self.breaking or self.unexplained)

    def finding(self, stage: Stage) -> Finding | None:
        return next((f for f in self.findings if f.stage == stage), None)

    def state(self, stage: Stage) -> State:
        return next((c.state for c in self.coverage if c.stage == stage), "unseen")

    def exit_code(self, *, strict: bool = False) -> int:
        """0: nothing is wrong. 1: something is; with ``strict`` a recipe that differs is too, and a
        run that taught nothing."""
        return int(self.broken or (strict and bool(self.findings or self.idle)))


def without_causes(diagnosis: Diagnosis) -> Diagnosis:
    """``diagnosis`` as without a catalogue: every stage is still named."""
    return replace(diagnosis, findings=tuple(replace(f, causes=()) for f in diagnosis.findings))


def causes_of(finding: Finding) -> tuple[Explanation, ...]:
    """The causes to show: all that are proved, and of those that only fit the ones that explain
    what no proved one does. What may follow from an error is not explained beside a proved one."""
    proved = [cause for cause in finding.causes if cause.proved]

    def adds(cause: Explanation) -> bool:
        certain = any(item.origin == "added" for item in cause.explains)
        return certain and not any(same_evidence(cause, other) for other in proved)

    return tuple(c for c in finding.causes if not proved or c.proved or adds(c))


def same_evidence(one: Explanation, other: Explanation) -> bool:
    """Whether two causes explain something in common, so that either may be the reason."""
    if one.explains and other.explains:
        return any(item in other.explains for item in one.explains)
    return one.seen == other.seen


def _by_severity(finding: Finding) -> tuple[bool, int]:
    return finding.severity != "breaks", STAGES.index(finding.stage)
