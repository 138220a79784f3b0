"""Recorded steps -> verdict: all looks, then rules on their evidence, then the run's symptoms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from omni_grpo_core.doctor.allow import without_allowed
from omni_grpo_core.doctor.checks.stopped import LOOKS as STOPPED
from omni_grpo_core.doctor.coverage import coverage_of, merged
from omni_grpo_core.doctor.evidence import (
    Case,
    Evidence,
    Explanation,
    Finding,
    Look,
    Rule,
    noted_missing,
    raised_by,
)
from omni_grpo_core.doctor.registry import BLAMES, LOOKS, RULES
from omni_grpo_core.doctor.symptoms import symptoms
from omni_grpo_core.doctor.upstream import sourced
from omni_grpo_core.doctor.verdict import Allow, Diagnosis, Felt
from omni_grpo_core.errors import TraceError
from omni_grpo_core.types import STAGES, Stage


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
    that it may have blamed are not called sound.
    """
    evidence: list[Evidence] = []
    broken: list[str] = []
    failed: dict[Stage, str] = {}
    for look in STOPPED if case.checked else looks:
        try:
            evidence.extend(look(case))
        except Exception as error:  # a foreign recording may contain anything
            broken.append(_failed(look, error))
            failed |= dict.fromkeys(BLAMES.get(look, STAGES), broken[-1])
    explanations: list[Explanation] = []
    for rule in rules if causes else ():
        try:
            explanations.extend(map(sourced, rule(case, evidence)))
        except Exception as error:
            broken.append(_failed(rule, error))
    findings, inherited = _sorted_out(evidence, explanations)
    return Diagnosis(
        findings=findings,
        coverage=coverage_of(case, findings, inherited, failed),
        missing=(*noted_missing(case), *broken),
    )


def diagnose_run(
    cases: Sequence[Case], *, causes: bool = True, allow: Sequence[Allow] = ()
) -> Diagnosis:
    """The verdict on a recorded run: ``cases`` of all its steps, in order."""
    return conclude(cases, [diagnose(case, causes=causes) for case in cases], allow)


def conclude(
    cases: Sequence[Case], diagnoses: Sequence[Diagnosis], allow: Sequence[Allow] = ()
) -> Diagnosis:
    """The verdict on a run from those on its steps: the symptoms that its findings explain, what
    ended it, and without what the user allows."""
    whole = merge(diagnoses)
    felt: list[Felt] = []
    try:
        found = symptoms(cases)
    except Exception as error:  # as for a look
        found, notes = (), (*whole.missing, _failed(symptoms, error))
        whole = replace(whole, missing=notes)
    for symptom in found:
        reasons = [finding for finding in whole.findings if symptom.explained_by(finding)]
        nearest = min(reasons, key=symptom.closeness, default=None)
        felt.append(Felt(symptom, None if nearest is None else nearest.stage))
    whole = replace(
        whole,
        symptoms=tuple(felt),
        raised=next(filter(None, map(raised_by, cases)), None),
        trainer=next((case.trace.header.get("trainer", "") for case in cases), ""),
    )
    return without_allowed(whole, allow) if allow else whole


def merge(diagnoses: Sequence[Diagnosis]) -> Diagnosis:
    """Everything found in any of the steps, once.

    A stage that added an error in one step is not listed as inherited because of another.
    """
    evidence = _once(e for d in diagnoses for f in d.findings for e in f.evidence)
    causes = [c for d in diagnoses for f in d.findings for c in f.causes]
    stages = {finding.stage for diagnosis in diagnoses for finding in diagnosis.findings}
    return Diagnosis(
        findings=tuple(_finding(stage, evidence, causes) for stage in STAGES if stage in stages),
        coverage=merged(diagnosis.coverage for diagnosis in diagnoses),
        missing=tuple(dict.fromkeys(note for d in diagnoses for note in d.missing)),
    )


def require_judged(diagnosis: Diagnosis, name: str) -> None:
    """Raises:
    TraceError: nothing in the recording could be judged, which does not mean that it is healthy.
    """
    if diagnosis.judged or diagnosis.broken:
        return
    reasons = dict.fromkeys(c.why for c in diagnosis.coverage if c.state != "unseen")
    why = "; ".join((*reasons, *(n for n in diagnosis.missing if n not in reasons)))
    raise TraceError(
        name,
        got="a recording in which nothing could be judged: " + (why or "it has no trainer calls"),
        want="trainer calls recorded by record()",
        fix="record the trainer again, or run omni-grpo check on a checkpoint alone",
    )


def to_json(diagnosis: Diagnosis, *, strict: bool = False) -> dict[str, Any]:
    """Plain data.

    ``healthy``; ``exit``: the command's exit code; ``trainer``: what ``attach`` recognised, empty
    where nothing was; ``headline``: what to read first, by ``stage``
    (``None``: a symptom that nothing explains, or a healthy run) and ``sentence``; ``raised``: what
    ended the run, or ``None``; ``symptoms``: each with the ``stage`` that explains it;
    ``findings``: stage, severity, evidence, and causes with ``proved`` and ``proof``; ``coverage``:
    by stage its ``state``, and ``why`` where it was not judged; ``missing``: what else could not be
    judged; ``allowed`` with the reasons, and ``unused`` ones.

    >>> to_json(Diagnosis((), (), ()))["healthy"]
    True
    """
    return {
        "healthy": diagnosis.healthy,
        "exit": diagnosis.exit_code(strict=strict),
        "trainer": diagnosis.trainer,
        "headline": _headline(diagnosis, strict),
        "raised": None if diagnosis.raised is None else asdict(diagnosis.raised),
        "symptoms": [
            {**asdict(felt.symptom), "stage": felt.stage, "allowed": felt.allowed}
            for felt in diagnosis.symptoms
        ],
        "findings": [_plain_finding(finding) for finding in diagnosis.findings],
        "coverage": {
            c.stage: {"state": c.state, **({"why": c.why} if c.why else {})}
            for c in diagnosis.coverage
        },
        "missing": list(diagnosis.missing),
        "allowed": [
            {**asdict(one.by), "stage": one.stage, "evidence": [asdict(e) for e in one.evidence]}
            for one in diagnosis.allowed
        ],
        "unused": [asdict(allow) for allow in diagnosis.unused],
    }


def _headline(diagnosis: Diagnosis, strict: bool) -> dict[str, Any]:
    head = diagnosis.headline
    if head is None and strict:
        head = diagnosis.first
    if isinstance(head, Finding):
        sentence = head.causes[0].seen if head.causes else head.evidence[0].sentence
        return {"stage": head.stage, "sentence": sentence}
    if head is not None:
        return {"stage": None, "sentence": head.sentence}
    sound = sum(coverage.state == "sound" for coverage in diagnosis.coverage)
    stages = "stage" if sound == 1 else "stages"
    differs = ", ".join(finding.stage for finding in diagnosis.findings)
    more = f"; its recipe differs from the reference's in {differs}" if differs else ""
    return {"stage": None, "sentence": f"healthy: nothing is wrong in {sound} {stages}{more}"}


def _plain_finding(finding: Finding) -> dict[str, Any]:
    causes = [
        {k: v for k, v in asdict(cause).items() if k != "explains"} | {"proved": cause.proved}
        for cause in finding.causes
    ]
    return {**asdict(finding), "severity": finding.severity, "causes": causes}


def _sorted_out(
    evidence: Sequence[Evidence], explanations: Sequence[Explanation]
) -> tuple[tuple[Finding, ...], tuple[Stage, ...]]:
    """Stages that added an error, and those that only passed one on.

    Where the origin is ``unknown``, a stage is blamed unless an earlier one certainly added an
    error that breaks the run, which then explains it.
    """
    findings: list[Finding] = []
    inherited: list[Stage] = []
    certain = False
    for stage in STAGES:
        own = [item for item in evidence if item.stage == stage]
        broke = any(item.origin == "added" and not _differs(item) for item in own)
        if certain and not broke:
            own = [item for item in own if item.origin == "added"]
        certain |= broke
        if any(item.origin != "inherited" for item in own):
            findings.append(_finding(stage, own, explanations))
        elif any(item.stage == stage for item in evidence):
            inherited.append(stage)
    return tuple(findings), tuple(inherited)


def _finding(
    stage: Stage, evidence: Sequence[Evidence], explanations: Iterable[Explanation]
) -> Finding:
    own = _once(e for e in evidence if e.stage == stage and e.origin != "inherited")
    shown = {*map(_key, own)}
    causes: dict[str, Explanation] = {}
    for cause in explanations:
        if cause.stage != stage or (cause.explains and not {*map(_key, cause.explains)} & shown):
            continue
        held = causes.get(cause.cause, cause)
        best = cause if cause.proved > held.proved else held
        explains = _once((*held.explains, *cause.explains))
        causes[cause.cause] = replace(best, explains=explains)
    ranked = sorted(causes.values(), key=lambda c: (not _breaks(c), not c.proved))
    return Finding(stage, tuple(sorted(own, key=_differs)), tuple(ranked))


def _differs(evidence: Evidence) -> bool:
    return evidence.severity == "differs"


def _breaks(cause: Explanation) -> bool:
    """Whether a cause explains more than a recipe that differs."""
    return not cause.explains or not all(map(_differs, cause.explains))


def _once(evidence: Iterable[Evidence]) -> tuple[Evidence, ...]:
    return tuple({_key(item): item for item in evidence}.values())


def _key(evidence: Evidence) -> tuple[Stage, str, int | None, str]:
    return evidence.stage, evidence.fact, evidence.row, evidence.sentence


def _failed(what: Callable[..., Any], error: Exception) -> str:
    name = getattr(what, "__name__", repr(what))
    return f"{name} failed on this recording ({type(error).__name__}: {error})"
