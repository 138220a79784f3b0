"""Words of a diagnosis that terminal and page share."""

from __future__ import annotations

from collections.abc import Iterator

from omni_grpo_core.doctor.evidence import Finding
from omni_grpo_core.doctor.verdict import Diagnosis, causes_of
from omni_grpo_core.pipeline.hints import advice
from omni_grpo_core.types import STAGES


def because(finding: Finding) -> str:
    """One sentence: the proof, or what is known instead of one."""
    cause = next(iter(causes_of(finding)), None)
    if cause is None:
        return f"{finding.evidence[0].sentence}; the cause is unknown"
    return cause.proof or f"{cause.seen}; {cause.cause} fits, and is not proved"


def change(finding: Finding) -> str:
    """What to change; where the cause is unknown, what to look at."""
    cause = next(iter(causes_of(finding)), None)
    return advice(finding.stage) if cause is None else cause.fix


def symptoms(diagnosis: Diagnosis) -> list[str]:
    """What hurts, the worst first, without what is allowed and the exception that ended the run."""
    return [
        felt.symptom.sentence
        for felt in diagnosis.symptoms
        if not felt.allowed and felt.symptom.name != "raised"
    ]


def not_judged(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    """(stages, why) of what was not judged; notes without a stage come last."""
    reasons: dict[str, list[str]] = {}
    for coverage in diagnosis.coverage:
        if coverage.state in ("failed", "unjudged", "unseen"):
            reasons.setdefault(coverage.why, []).append(coverage.stage)
    yield from ((", ".join(stages), why) for why, stages in reasons.items())
    yield from (("", note) for note in diagnosis.missing if note not in reasons)


def ordered(diagnosis: Diagnosis) -> list[Finding]:
    """The findings, the headline first; what breaks the run before what differs."""
    return sorted(
        diagnosis.findings,
        key=lambda f: (f is not diagnosis.headline, f.severity != "breaks", STAGES.index(f.stage)),
    )
