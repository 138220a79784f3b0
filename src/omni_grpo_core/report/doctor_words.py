"""Words of a diagnosis that terminal and page share."""

from __future__ import annotations

from collections.abc import Iterator

from omni_grpo_core.doctor.evidence import Explanation, Finding
from omni_grpo_core.doctor.verdict import Diagnosis, causes_of, same_evidence
from omni_grpo_core.pipeline.hints import advice
from omni_grpo_core.types import STAGES


def because(finding: Finding) -> str:
    """One sentence: the proof, or what is known instead of one; every proof where several explain
    the same."""
    causes = _rivals(finding)
    if not causes:
        return f"{finding.evidence[0].sentence}; the cause is unknown"
    if not causes[0].proved:
        return f"{causes[0].seen}; {causes[0].cause} fits, and is not proved"
    return "; or: ".join(dict.fromkeys(cause.proof for cause in causes))


def change(finding: Finding) -> str:
    """What to change; where the cause is unknown, what to look at."""
    fixes = dict.fromkeys(cause.fix for cause in _rivals(finding))
    return "; or: ".join(fixes) or advice(finding.stage, finding.evidence[0].fact)


def _rivals(finding: Finding) -> list[Explanation]:
    """The first cause, and others that are proved of the same evidence."""
    causes = causes_of(finding)
    first = causes[:1]
    return [
        *first,
        *(
            cause
            for cause in causes[1:]
            if first[0].proved and cause.proved and same_evidence(first[0], cause)
        ),
    ]


def joined(finding: Finding) -> list[tuple[str, Explanation]]:
    """The causes to show, each with the word between it and those before: ``or`` where they explain
    the same, else ``and``."""
    causes = causes_of(finding)
    return [
        (
            ("or" if any(same_evidence(cause, c) for c in causes[:at]) else "and") if at else "",
            cause,
        )
        for at, cause in enumerate(causes)
    ]


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
