"""The results of a golden check: per stage, per case and overall.

``was`` is always the golden's side, ``now`` that of the fresh pass.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omni_grpo_core.trace.divergence import Difference, Drifts
from omni_grpo_core.types import MADE_STAGES, Span

Verdict = Literal["exact", "within", "new", "benign-drift", "harmful", "degenerate", "schema"]
"""``exact``: equal in value and type. ``within``: floats differ, within the platform's tolerance.
``new``: no golden for this platform yet. ``benign-drift``: floats beyond tolerance, but the
completions and the model's certainty are unchanged. ``harmful``: ids, masks, positions, spans, text
or completions changed, or training values moved. ``degenerate``: completions are degenerate, or
values non-finite. ``schema``: a different shape, dtype or kind of value, or a stage that
has no golden and failed."""
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
_AT = MADE_STAGES.index("completion")
ORDER: tuple[str, ...] = (*MADE_STAGES[:_AT], "scoring", *MADE_STAGES[_AT:])
"""Stages of a case, in order: the golden's completions are scored before new ones are generated."""
FINE: tuple[Verdict, ...] = ("exact", "within")

Origin = Literal["none", "added", "inherited", "inherited or unknown"]
"""Where a stage's divergence comes from. ``none``: it does not diverge. ``added``: it diverges even
on the golden's own input. ``inherited``: on that input it does not. ``inherited or unknown``: the
golden stores too little of the input to decide."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids (n), the text of each by itself (n), and the spans that media fill."""

    ids: tuple[int, ...]
    words: tuple[str, ...]
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """One row's prompt on both sides; ``None`` if that side lacks the row."""

    sample_id: str
    was: Tokens | None
    now: Tokens | None


@dataclass(frozen=True, slots=True)
class Generation:
    """One completion on both sides.

    ``first``: index of the first differing token, ``None`` if none differs; it may be one past the
    end of the shorter side. ``was_rank``, ``now_rank``: rank (0 is likeliest) of the golden's token
    in the fresh distribution there, and of the fresh token in the golden's; ``None`` outside the
    stored top tokens, or if no token differs. ``margin``: nats by which the golden preferred its
    token to the fresh one. ``drift``: largest |Δ logprob| of the golden's tokens, scored
    teacher-forced. ``garbage``: why the fresh completion is degenerate, else empty.
    """

    sample_id: str
    index: int
    verdict: Verdict
    sentence: str
    was: Tokens
    now: Tokens
    was_finish: str
    now_finish: str
    first: int | None = None
    was_rank: int | None = None
    now_rank: int | None = None
    margin: float | None = None
    drift: float | None = None
    garbage: str = ""


@dataclass(frozen=True, slots=True)
class StageResult(Drifts):
    """One stage. ``stage`` is the golden's name, in a training case with the step's number
    (``loss.2``). ``golden``: the golden's file, relative to the golden folder."""

    stage: str
    verdict: Verdict
    reason: str
    origin: Origin
    differences: tuple[Difference, ...]
    golden: str

    def to_json(self) -> dict[str, Any]:
        found = {"max_abs": self.max_abs, "mean_abs": self.mean_abs}
        return {**_plain(self), **_plain(found)}


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case. ``first``: the first stage that added a divergence, ``None`` if none did.
    ``versions``: header entries that changed since the golden was made, by key, (was, now)."""

    case: str
    verdict: Verdict
    reason: str
    first: str | None
    stages: tuple[StageResult, ...]
    prompts: tuple[PromptTokens, ...] = ()
    generations: tuple[Generation, ...] = ()
    versions: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**_plain(self), "stages": [stage.to_json() for stage in self.stages]}


@dataclass(frozen=True, slots=True)
class GoldenReport:
    """Every case that was checked. ``folder``: of the goldens. ``platform``: the key of this run,
    for example ``cpu-fp32``. ``options``: of a command that runs on it, if the suite's own platform
    is another."""

    folder: str
    platform: str
    cases: tuple[CaseResult, ...]
    seconds: float
    options: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        return worst(case.verdict for case in self.cases)

    @property
    def first(self) -> str | None:
        """The earliest of the cases' first divergent stages, in the order of the pipeline."""
        found = [case.first for case in self.cases if case.first]
        return min(found, key=stage_order, default=None)

    @property
    def new(self) -> tuple[str, ...]:
        """Names of the cases that only lack goldens."""
        return tuple(case.case for case in self.cases if case.verdict == "new")

    def to_json(self) -> dict[str, Any]:
        """The one object that ``--json`` prints."""
        return {
            "verdict": self.verdict,
            "first": self.first,
            "new": list(self.new),
            "folder": self.folder,
            "platform": self.platform,
            "seconds": round(self.seconds, 3),
            "cases": [case.to_json() for case in self.cases],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GoldenReport:
        """From what :meth:`to_json` gave, in another process perhaps."""
        report: GoldenReport = _built(cls, data)
        return report


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """
    >>> worst(["exact", "harmful", "within"]), worst([])
    ('harmful', 'exact')
    """
    return max(verdicts, key=VERDICTS.index, default="exact")


def stage_order(stage: str) -> tuple[int, int]:
    """GRPO steps follow the pass, in order."""
    name, _, step = stage.partition(".")
    return int(step or 0), ORDER.index(name) if name in ORDER else len(ORDER)


def _plain(value: Any) -> Any:
    """As plain JSON: a dataclass as its fields; a non-finite float, which JSON lacks, as text."""
    if is_dataclass(value):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _built(hint: Any, value: Any) -> Any:
    """What :func:`_plain` was given, from its result and its declared type."""
    members = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        known = next(member for member in members if member is not type(None))
        return None if value is None else _built(known, value)
    if get_origin(hint) is tuple:
        each = members[:1] * len(value) if members[-1] is Ellipsis else members
        return tuple(_built(one, inner) for one, inner in zip(each, value, strict=True))
    if get_origin(hint) is Mapping:
        return {key: _built(members[1], inner) for key, inner in value.items()}
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        given = [one.name for one in fields(hint) if one.name in value]
        make: Any = hint
        return make(**{name: _built(hints[name], value[name]) for name in given})
    return float(value) if hint is float else value
