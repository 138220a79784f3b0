"""Recorded steps -> verdict: all looks, then rules on their evidence, stage by stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from omni_grpo_core.doctor.evidence import (
    Case,
    Diagnosis,
    Evidence,
    Explanation,
    Finding,
    Look,
    Rule,
    noted_missing,
)
from omni_grpo_core.doctor.registry import BLAMES, LOOKS, RULES
from omni_grpo_core.errors import TraceError
from omni_grpo_core.types import STAGES, Stage

_SHOWS: Mapping[str, tuple[Stage, ...]] = {
    "SamplesSeen": ("sample",),
    "TemplateCall": ("conversation", "text"),
    "ProcessorCall": ("media", "batch"),
    "GenerateCall": ("embeddings", "positions", "completion"),
    "ForwardCall": ("embeddings", "positions", "logits"),
    "RewardCall": ("parsed", "reward"),
    "AdvantageSeen": ("advantage",),
    "LossSeen": ("loss",),
    "StepSeen": ("gradient",),
}
"""The stages that each recorded call makes visible."""


def diagnose(
    case: Case,
    *,
    causes: bool = True,
    looks: Sequence[Look] = LOOKS,
    rules: Sequence[Rule] = RULES,
) -> Diagnosis:
    """The verdict on one recorded step.

    ``causes=False`` leaves out the catalogue's causes: stages are still named. A look that fails on
    an unusual recording does not stop the others; it is listed under ``missing``, and the stages
    that it may have blamed are ``unjudged``.
    """
    evidence: list[Evidence] = []
    broken: list[str] = []
    unjudged: set[Stage] = set()
    for look in looks:
        try:
            evidence.extend(look(case))
        except Exception as error:  # a foreign recording may contain anything
            broken.append(_failed(look, error))
            unjudged.update(BLAMES.get(look, STAGES))
    explanations: list[Explanation] = []
    for rule in rules if causes else ():
        try:
            explanations.extend(rule(case, evidence))
        except Exception as error:
            broken.append(_failed(rule, error))
    kinds = {type(record.value).__name__ for record in case.trace.stages}
    shown = {stage for kind in kinds for stage in _SHOWS.get(kind, ())}
    unseen = tuple(_unseen(kind) for kind in _SHOWS if kind not in kinds)
    findings, inherited = _sorted_out(evidence, explanations)
    return Diagnosis(
        findings=findings,
        inherited=inherited,
        seen=tuple(stage for stage in STAGES if stage in shown - unjudged),
        missing=(*unseen, *noted_missing(case), *broken),
        unjudged=tuple(stage for stage in STAGES if stage in shown & unjudged),
    )


def merge(diagnoses: Sequence[Diagnosis]) -> Diagnosis:
    """The verdict on a run: everything found in any of its steps, once.

    A stage that added an error in one step is not listed as inherited because of another.
    """
    evidence = _once(e for d in diagnoses for f in d.findings for e in f.evidence)
    causes: dict[str, Explanation] = {}
    for diagnosis in diagnoses:
        for finding in diagnosis.findings:
            for cause in finding.causes:
                held = causes.get(cause.cause)
                if held is None or cause.proved > held.proved:
                    causes[cause.cause] = cause
    stages = {finding.stage for diagnosis in diagnoses for finding in diagnosis.findings}
    unjudged = {stage for diagnosis in diagnoses for stage in diagnosis.unjudged}
    return Diagnosis(
        findings=tuple(_finding(s, evidence, causes.values()) for s in STAGES if s in stages),
        inherited=tuple(
            s for s in STAGES if s not in stages and any(s in d.inherited for d in diagnoses)
        ),
        seen=tuple(s for s in STAGES if s not in unjudged and any(s in d.seen for d in diagnoses)),
        missing=tuple(
            note
            for note in dict.fromkeys(note for d in diagnoses for note in d.missing)
            # a second update on one rollout has no rollout of its own
            if note not in map(_unseen, _SHOWS) or all(note in d.missing for d in diagnoses)
        ),
        unjudged=tuple(stage for stage in STAGES if stage in unjudged),
    )


def require_judged(diagnosis: Diagnosis, name: str) -> None:
    """Raises:
    TraceError: nothing in the recording could be judged, which does not mean that it is healthy.
    """
    if diagnosis.findings or diagnosis.seen:
        return
    failed = [note for note in diagnosis.missing if note not in map(_unseen, _SHOWS)]
    why = f": {'; '.join(failed)}" if failed else ": it has no trainer calls"
    raise TraceError(
        name,
        got=f"a recording in which nothing could be judged{why}",
        want="trainer calls recorded by record()",
        fix="record the trainer again, or run omni-grpo check on a checkpoint alone",
    )


def to_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Plain data, with ``healthy`` and ``first`` (the stage to fix first) on top.

    >>> to_json(Diagnosis((), (), ("text",), ()))["healthy"]
    True
    """
    first = diagnosis.first
    return {
        "healthy": not diagnosis.findings,
        "first": None if first is None else first.stage,
        **asdict(diagnosis),
    }


def _unseen(kind: str) -> str:
    return f"no {kind} was recorded: {' and '.join(_SHOWS[kind])} cannot be judged by it"


def _sorted_out(
    evidence: Sequence[Evidence], explanations: Iterable[Explanation]
) -> tuple[tuple[Finding, ...], tuple[Stage, ...]]:
    """Stages that added an error, and those that only passed one on.

    Where the origin is ``unknown``, a stage is blamed unless an earlier one certainly added an
    error, which then explains it.
    """
    explanations = tuple(explanations)
    findings: list[Finding] = []
    inherited: list[Stage] = []
    certain = False
    for stage in STAGES:
        origins = {item.origin for item in evidence if item.stage == stage}
        if "added" in origins or ("unknown" in origins and not certain):
            findings.append(_finding(stage, evidence, explanations))
            certain |= "added" in origins
        elif origins:
            inherited.append(stage)
    return tuple(findings), tuple(inherited)


def _finding(
    stage: Stage, evidence: Sequence[Evidence], explanations: Iterable[Explanation]
) -> Finding:
    own = _once(e for e in evidence if e.stage == stage and e.origin != "inherited")
    causes: dict[str, Explanation] = {}
    for cause in explanations:
        held = causes.get(cause.cause)
        if cause.stage == stage and (held is None or cause.proved > held.proved):
            causes[cause.cause] = cause
    ranked = sorted(causes.values(), key=lambda cause: not cause.proved)
    return Finding(stage, own, tuple(ranked))


def _once(evidence: Iterable[Evidence]) -> tuple[Evidence, ...]:
    return tuple({(e.stage, e.fact, e.row, e.sentence): e for e in evidence}.values())


def _failed(what: Look | Rule, error: Exception) -> str:
    name = getattr(what, "__name__", repr(what))
    return f"{name} failed on this recording ({type(error).__name__}: {error})"
