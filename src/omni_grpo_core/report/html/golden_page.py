"""A check of goldens as one HTML page: what changed, where it began, and whether it matters."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from omni_grpo_core.golden.results import (
    FINE,
    VERDICTS,
    CaseResult,
    Generation,
    GoldenReport,
    PromptTokens,
    StageResult,
    Tokens,
    Verdict,
)
from omni_grpo_core.pipeline.hints import stage_words
from omni_grpo_core.report.html.drift_chart import Chart, Drift, drift_chart
from omni_grpo_core.report.html.page import environment
from omni_grpo_core.report.html.token_diff import (
    DiffRun,
    SpanChange,
    changed_tokens,
    diff_ribbon,
    span_changes,
)

Harm = Literal["none", "drift", "harm"]

VERDICT_WORDS: Mapping[Verdict, str] = {
    "exact": "equal in value and type",
    "within": "floats moved, by no more than this platform's tolerance",
    "benign-drift": "floats moved beyond tolerance, but what the model says, and how sure it is "
    "of it, is as it was",
    "harmful": "what the model is given or what it says is another, or training numbers moved",
    "degenerate": "what the model says is garbage, or not finite",
    "schema": "another shape, dtype or kind of value, or no golden to compare with",
}
ORIGIN_WORDS: Mapping[str, str] = {
    "added": "fed with the golden's own input it still differs: it began here",
    "inherited": "fed with the golden's own input it is right: it only follows from before",
    "inherited or unknown": "the golden holds too little of the input to tell",
}
_MOST_SENTENCES = 8
MOST_CASES = 60
"""Cases shown in full, those that diverge first; every case is in the table."""


@dataclass(frozen=True, slots=True)
class SideBySide:
    """One row's prompt. ``was``, ``now``: empty where that side has no such row."""

    sample_id: str
    same: bool
    was: tuple[DiffRun, ...]
    now: tuple[DiffRun, ...]
    was_count: int
    now_count: int
    spans: tuple[SpanChange, ...]


@dataclass(frozen=True, slots=True)
class Side:
    """One side's completion: up to the first differing token, that token, and the rest."""

    head: str
    token: str
    rest: str
    facts: str


@dataclass(frozen=True, slots=True)
class Said:
    """One completion on both sides. ``facts``: (name, value) of the first differing token."""

    title: str
    verdict: Verdict
    harm: Harm
    sentence: str
    garbage: str
    same: bool
    was: Side
    now: Side
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class StageView:
    """``reason``: empty where the first sentence says it already."""

    result: StageResult
    harm: Harm
    reason: str
    sentences: tuple[str, ...]
    more: tuple[str, ...]
    max_abs: str
    mean_abs: str


@dataclass(frozen=True, slots=True)
class CaseView:
    """``accept``, ``reject``: commands, empty where there is nothing to decide or accepting would
    be refused."""

    number: int
    result: CaseResult
    harm: Harm
    stages: tuple[StageView, ...]
    chart: Chart | None
    prompts: tuple[SideBySide, ...]
    said: tuple[Said, ...]
    accept: str
    reject: str


def golden_page(report: GoldenReport) -> str:
    """The page of ``report``: verdict, cases, drift by stage; and of each case its stages with who
    added an error and who inherited one, prompts side by side, and what the model said."""
    shown = _shown(report)
    cases = [_case(number, case) for number, case in enumerate(report.cases, 1) if number in shown]
    counts = Counter(case.verdict for case in report.cases)
    versions = {key: pair for case in report.cases for key, pair in case.versions.items()}
    drifts = [drift for case in report.cases for drift in _drifts(case)]
    return (
        environment()
        .get_template("golden_page.html.j2")
        .render(
            report=report,
            harm=_harm(report.verdict),
            cases=cases,
            counts=[(v, counts[v], _harm(v), VERDICT_WORDS[v]) for v in VERDICTS if counts[v]],
            versions=versions,
            rows=[(n, case, _harm(case.verdict)) for n, case in enumerate(report.cases, 1)],
            shown=shown,
            chart=drift_chart(drifts) if len(report.cases) > 1 else None,
            verdict_words=VERDICT_WORDS,
            origin_words=ORIGIN_WORDS,
            stage_words=lambda stage: stage_words(stage.partition(".")[0]),
            first=_first(report),
            open=_open(cases),
        )
    )


def _harm(verdict: Verdict) -> Harm:
    return "none" if verdict in FINE else "drift" if verdict == "benign-drift" else "harm"


def _first(report: GoldenReport) -> tuple[str, str] | None:
    """Stage and case of the first divergence."""
    found = next((case for case in report.cases if case.first), None)
    return None if found is None or found.first is None else (found.first, found.case)


def _shown(report: GoldenReport) -> set[int]:
    """Numbers of at most :data:`MOST_CASES` cases."""
    numbers = range(1, len(report.cases) + 1)
    by_harm = sorted(numbers, key=lambda n: report.cases[n - 1].verdict in FINE)
    return set(by_harm[:MOST_CASES])


def _open(cases: list[CaseView]) -> set[int]:
    """Numbers of the cases that are open at first: of each kind of divergence one."""
    kinds = {(c.result.verdict, c.result.first): c.number for c in reversed(cases)}
    return {number for (verdict, _), number in kinds.items() if verdict not in FINE}


def _drifts(case: CaseResult) -> list[Drift]:
    return [
        Drift(stage.stage, case.case, _harm(stage.verdict), stage.max_abs, stage.mean_abs)
        for stage in case.stages
    ]


def _case(number: int, case: CaseResult) -> CaseView:
    harm = _harm(case.verdict)
    name = shlex.quote(case.case)
    decide = harm != "none"
    return CaseView(
        number=number,
        result=case,
        harm=harm,
        stages=tuple(_stage(stage) for stage in case.stages),
        chart=drift_chart(_drifts(case)),
        prompts=tuple(_prompt(prompt) for prompt in case.prompts),
        said=tuple(_said(generation) for generation in case.generations),
        accept=f"omni-grpo golden accept {name} --reason WHY"
        if decide and case.verdict != "degenerate"
        else "",
        reject=f"omni-grpo golden reject {name}" if decide else "",
    )


def _stage(stage: StageResult) -> StageView:
    told = [d.sentence for d in stage.differences if d.verdict == "differs"]
    # what is within tolerance is told only where there is nothing else
    told = told or [d.sentence for d in stage.differences]
    harm = _harm(stage.verdict)
    said = harm == "none" or any(stage.reason.startswith(sentence) for sentence in told[:1])
    return StageView(
        stage,
        harm,
        "" if said else stage.reason,
        tuple(told[:_MOST_SENTENCES]),
        tuple(told[_MOST_SENTENCES:]),
        _number(stage.max_abs),
        _number(stage.mean_abs),
    )


def _number(size: float) -> str:
    return f"{size:.2g}" if size else "0"


def _prompt(prompt: PromptTokens) -> SideBySide:
    was, now = prompt.was or Tokens((), ()), prompt.now or Tokens((), ())
    gone, come = changed_tokens(was.ids, now.ids)
    return SideBySide(
        sample_id=prompt.sample_id,
        same=prompt.was == prompt.now,
        was=diff_ribbon(was, gone),
        now=diff_ribbon(now, come),
        was_count=len(was.ids),
        now_count=len(now.ids),
        spans=span_changes(prompt.was, prompt.now),
    )


def _said(found: Generation) -> Said:
    facts = []
    if found.first is not None:
        facts.append(("first differing token", str(found.first)))
        facts.append(("golden's token, place in the fresh top", _rank(found.was_rank)))
        facts.append(("fresh token, place in the golden's top", _rank(found.now_rank)))
        if found.margin is not None:
            facts.append(("golden preferred its token by", f"{found.margin:.3g} nats"))
    if found.drift is not None:
        facts.append(("largest |Δ logprob| of the golden's tokens", f"{found.drift:.3g}"))
    return Said(
        title=f"{found.sample_id}, completion {found.index}",
        verdict=found.verdict,
        harm=_harm(found.verdict),
        sentence=found.sentence,
        garbage=found.garbage,
        same=found.first is None,
        was=_side(found.was, found.first, found.was_finish),
        now=_side(found.now, found.first, found.now_finish),
        facts=tuple(facts),
    )


def _rank(place: int | None) -> str:
    return "not in it" if place is None else f"{place + 1}"


def _side(tokens: Tokens, first: int | None, finish: str) -> Side:
    at = len(tokens.words) if first is None else first
    token = "".join(tokens.words[at : at + 1])
    if first is not None and at >= len(tokens.words):
        token = "(nothing: it ends before)"
    ended = {"stop": "ended by itself", "length": "cut off at the limit"}.get(finish, finish)
    return Side(
        head="".join(tokens.words[:at]),
        token=token,
        rest="".join(tokens.words[at + 1 :]),
        facts=f"{len(tokens.ids)} tokens, {ended}",
    )
