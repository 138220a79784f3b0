"""The types of a diagnosis: observed facts, causes that explain them, and the verdict.

Two layers, so that an unknown fault is still blamed on the right stage: *looks* turn a recorded
step into :class:`Evidence`, with or without a reference to replay it on; *rules* explain evidence
by a cause of the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, TypeVarTuple, cast

from omni_grpo_core.trace import calls
from omni_grpo_core.types import Stage, Trace

if TYPE_CHECKING:
    from omni_grpo_core.core.policy import Policy
    from omni_grpo_core.pipeline.settings import Settings

T = TypeVar("T")
Given = TypeVarTuple("Given")

Origin = Literal["added", "inherited", "unknown"]
"""``added``: the stage turned right input into wrong output. ``inherited``: its input was already
wrong. ``unknown``: its input was not recorded."""


Severity = Literal["breaks", "differs"]
"""``breaks``: the run learns something else than it should, or nothing. ``differs``: a recipe that
works, and is not the reference's."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing that is wrong.

    ``fact``: a short name of its kind (``"ids-differ"``), by which rules match. ``sentence``: what
    was found and what was wanted, with the values. ``row``: of the call. ``values``: the offending
    values, plain data, for rules and reports.
    """

    stage: Stage
    fact: str
    sentence: str
    origin: Origin = "added"
    row: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    severity: Severity = "breaks"


@dataclass(frozen=True, slots=True)
class Explanation:
    """A cause that explains evidence. ``cause``: its id. ``seen``: the fact with its values.
    ``harm``: why it matters. ``fix``: what to change. ``confirm``: what the user can do to see it.

    ``proof``: the sentence of what reproduced the recording, or of the observation that is itself
    the cause (a keyword, a flag, a learning rate of 0); ``""``: the cause only fits. ``against``:
    what speaks against it. ``explains``: the evidence that it accounts for; empty: that which
    ``seen`` quotes. ``links``: upstream issues. ``versions``: the releases that have it, a
    PEP 440 specifier with the package's name (``"transformers>=4.53,<5.24"``)."""

    cause: str
    stage: Stage
    seen: str
    harm: str
    fix: str
    confirm: str = ""
    proof: str = ""
    against: str = ""
    explains: tuple[Evidence, ...] = ()
    links: tuple[str, ...] = ()
    versions: str = ""

    @property
    def proved(self) -> bool:
        """Whether the recording was reproduced by this cause, or the cause itself was observed."""
        return bool(self.proof)


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """The reference pipeline to replay a step on."""

    policy: Policy
    settings: Settings


class Recorded(Protocol):
    """Anything with recorded values, in order."""

    @property
    def values(self) -> tuple[object, ...]: ...


class Calls(Generic[calls.CallT]):
    """An attribute: its owner's calls of one kind, in order."""

    def __init__(self, kind: type[calls.CallT]) -> None:
        self._kind = kind

    def __get__(self, held: Recorded, owner: type) -> tuple[calls.CallT, ...]:
        return tuple(value for value in held.values if isinstance(value, self._kind))


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One recorded step, its calls in order, and the reference, if there is one.

    ``before``: the last recorded step before it that had a rollout. ``no_reference``: why there is
    none. ``missing``: what could not be judged, with the stages concerned, in the order in which it
    was noted. ``judged``: stages of which some value was compared with what it should be.
    """

    trace: Trace
    reference: Reference | None
    before: Case | None = None
    no_reference: str = "pass --checkpoint"
    missing: dict[str, tuple[Stage, ...]] = field(default_factory=dict, init=False)
    judged: set[Stage] = field(default_factory=set, init=False)
    # of this trace and reference: a copy with others starts empty
    _computed: dict[tuple[object, Hashable], object] = field(default_factory=dict, init=False)

    def once(self, compute: Callable[[Case, *Given], T], *given: *Given, key: Hashable = None) -> T:
        """``compute(case, *given)``, computed once and cached, as several looks need it.

        The key is the function and ``key`` (by default ``given``), so that the type is what the
        function returns.
        """
        at = (compute, given if key is None else key)
        if at not in self._computed:
            self._computed[at] = compute(self, *given)
        return cast(T, self._computed[at])

    @property
    def values(self) -> tuple[object, ...]:
        return tuple(record.value for record in self.trace.stages)

    @property
    def checked(self) -> bool:
        """Whether it is a pass of our own pipeline, with checks, in place of a trainer's calls."""
        return is_checked(self.trace)

    @property
    def dumped(self) -> bool:
        """Whether it is what a trainer wrote by itself: rows, not calls that follow each other."""
        return "dump" in self.trace.header

    samples = Calls(calls.SamplesSeen)
    templates = Calls(calls.TemplateCall)
    processed = Calls(calls.ProcessorCall)
    generated = Calls(calls.GenerateCall)
    forwards = Calls(calls.ForwardCall)
    rewards = Calls(calls.RewardCall)
    advantages = Calls(calls.AdvantageSeen)
    losses = Calls(calls.LossSeen)
    gradients = Calls(calls.LossGradient)
    steps = Calls(calls.StepSeen)


def is_checked(trace: Trace) -> bool:
    """Whether a trace is a pass of our own pipeline, with checks, in place of a trainer's calls: as
    a run leaves that was stopped."""
    recorded = any(isinstance(record.value, calls.Call) for record in trace.stages)
    return not recorded and any(record.checks for record in trace.stages)


Look = Callable[[Case], Iterable[Evidence]]
Rule = Callable[[Case, Sequence[Evidence]], Iterable[Explanation]]
"""Sees all evidence of a step and explains what it can."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with one stage: all evidence that it added (or may have added), and the causes
    that explain it, the likeliest first; none where it cannot be explained."""

    stage: Stage
    evidence: tuple[Evidence, ...]
    causes: tuple[Explanation, ...]

    @property
    def severity(self) -> Severity:
        """That of its worst evidence."""
        breaks = any(item.severity == "breaks" for item in self.evidence)
        return "breaks" if breaks else "differs"


@dataclass(frozen=True, slots=True)
class Raised:
    """What ended a run: an exception with its message, raised by a call of ``stage`` (``inside``),
    or after one had returned. ``""``: nothing had been called."""

    error: str
    stage: Stage | Literal[""]
    inside: bool

    @property
    def sentence(self) -> str:
        if not self.stage:
            return f"the run raised {self.error}, before anything was called"
        return f"the run raised {self.error}, {'in' if self.inside else 'after'} stage {self.stage}"


_NO_ERROR = ("KeyboardInterrupt:", "SystemExit: 0", "SystemExit: None")
"""A user's Ctrl-C, and a script that ends inside ``with record(…)``."""


def raised_by(case: Case) -> Raised | None:
    """What ended the run in this step, if an exception did."""
    error = case.trace.header.get("raised", "")
    if not error or error == "SystemExit: " or error.startswith(_NO_ERROR):
        return None
    inside = [v for v in case.values if getattr(v, "error", None) == error]
    last = inside[-1] if inside else (case.values or (None,))[-1]
    return Raised(error, getattr(last, "stage", ""), bool(inside))


def note_judged(case: Case, *stages: Stage) -> None:
    """Note that a value of these stages was compared, whatever came out."""
    case.judged.update(stages)


def note_missing(case: Case, sentence: str, *stages: Stage) -> None:
    """Note that something could not be judged on this step, and why. ``stages``: those that it is
    the reason for, where nothing else of them was judged."""
    case.missing[sentence] = (*case.missing.get(sentence, ()), *stages)


def noted_missing(case: Case) -> tuple[str, ...]:
    """Everything noted so far."""
    return tuple(case.missing)


def quoted(text: str) -> str:
    """``text`` as a sentence shows it: in quotes, its first 57 characters if it is longer than 60.

    >>> quoted("yes")
    "'yes'"
    """
    return repr(text if len(text) <= 60 else text[:57] + "…")
