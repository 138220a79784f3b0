"""A golden check as one HTML page: what changed, where it began, and whether it matters."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from typing import Any

from omni_grpo_core.golden.commands import new_cases
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
from omni_grpo_core.pipeline.hints import STAGE_SUMMARY
from omni_grpo_core.report.html import render
from omni_grpo_core.report.html.drift_chart import drift_chart, harm_of
from omni_grpo_core.report.html.ribbon import Run
from omni_grpo_core.report.html.token_diff import changed_tokens, diff_ribbon, span_changes
from omni_grpo_core.report.html.words import ended

VERDICT_WORDS: Mapping[Verdict, str] = {
    "exact": "equal in value and type",
    "within": "floats moved, but no further than this platform's tolerance",
    "new": "no golden for this platform yet",
    "benign-drift": "floats moved beyond tolerance, but the model's output and its confidence "
    "in it are unchanged",
    "harmful": "the model's input or output changed, or training numbers moved",
    "degenerate": "the model's output is garbage or non-finite",
    "schema": "a different shape, dtype or kind of value, or a stage without a golden failed",
}
ORIGIN_WORDS: Mapping[str, str] = {
    "added": "still differs when fed the golden's own input: it began here",
    "inherited": "is right when fed the golden's own input: it only follows from an earlier stage",
    "inherited or unknown": "the golden holds too little of the input to tell",
}
_MOST_SENTENCES = 8
MOST_CASES = 60
"""Cases shown in full, those that diverge first; every case is in the table."""


def golden_page(report: GoldenReport) -> str:
    """The page for ``report``: verdict, cases, drift by stage; and for each case its stages (which
    added an error, which inherited one), prompts side by side, and the model's output."""
    shown = _shown(report)
    counts = Counter(case.verdict for case in report.cases)
    return render(
        "golden_page.html.j2",
        report=report,
        counts=[(verdict, counts[verdict]) for verdict in VERDICTS if counts[verdict]],
        new=new_cases(report),
        versions={key: pair for case in report.cases for key, pair in case.versions.items()},
        shown=shown,
        first=_first(report),
        open=_open(report, shown),
        **FOR_A_CASE,
    )


def _first(report: GoldenReport) -> tuple[str, str] | None:
    """Stage and case of the first divergence."""
    found = next((case for case in report.cases if case.first), None)
    return None if found is None or found.first is None else (found.first, found.case)


def _shown(report: GoldenReport) -> set[int]:
    """Numbers of at most :data:`MOST_CASES` cases; those that have no golden show nothing."""
    numbers = [
        number
        for number, case in enumerate(report.cases, 1)
        if case.verdict != "new" or any(stage.golden for stage in case.stages)
    ]
    by_harm = sorted(numbers, key=lambda n: report.cases[n - 1].verdict in FINE)
    return set(by_harm[:MOST_CASES])


def _open(report: GoldenReport, shown: set[int]) -> set[int]:
    """Numbers of the cases shown expanded: one of each kind of divergence."""
    kinds = {
        (case.verdict, case.first): number
        for number, case in reversed(list(enumerate(report.cases, 1)))
        if number in shown
    }
    return {number for (verdict, _), number in kinds.items() if verdict not in FINE}


def _commands(case: CaseResult) -> list[str]:
    """The commands that decide the case; none if there is nothing to decide. Degenerate output
    cannot be accepted."""
    if case.verdict in FINE:
        return []
    name = shlex.quote(case.case)
    accept = [f"omni-grpo golden accept {name} --reason WHY"] * (case.verdict != "degenerate")
    return [*accept, f"omni-grpo golden reject {name}"]


def _sentences(stage: StageResult) -> tuple[str, list[str]]:
    """The reason (empty if the first sentence already says it), and the sentences."""
    sentences = [d.sentence for d in stage.differences if d.verdict == "differs"]
    # values within tolerance are listed only if there is nothing else
    sentences = sentences or [d.sentence for d in stage.differences]
    repeated = any(stage.reason.startswith(sentence) for sentence in sentences[:1])
    return "" if repeated or stage.verdict in FINE else stage.reason, sentences


def _ribbons(prompt: PromptTokens) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """Both sides; a side without this row is empty."""
    was, now = prompt.was or Tokens((), ()), prompt.now or Tokens((), ())
    removed, added = changed_tokens(was.ids, now.ids)
    return diff_ribbon(was, removed), diff_ribbon(now, added)


def _facts(found: Generation) -> list[tuple[str, str]]:
    """(name, value) pairs, mostly about the first differing token."""
    facts = []
    if found.first is not None:
        facts.append(("first differing token", str(found.first)))
        facts.append(("rank of the golden's token now", _rank(found.was_rank)))
        facts.append(("rank of the fresh token in the golden", _rank(found.now_rank)))
        if found.margin is not None:
            facts.append(("golden preferred its token by", f"{found.margin:.3g} nats"))
    if found.drift is not None:
        facts.append(("largest |Δ logprob| of the golden's tokens", f"{found.drift:.3g}"))
    return facts


def _rank(place: int | None) -> str:
    return "not in the top" if place is None else f"{place + 1}"


def _split(tokens: Tokens, first: int | None) -> tuple[str, str, str]:
    """One side's completion: up to the first differing token, that token, and the rest."""
    at = len(tokens.words) if first is None else first
    token = "".join(tokens.words[at : at + 1])
    if first is not None and at >= len(tokens.words):
        token = "(nothing: it ended earlier)"
    return "".join(tokens.words[:at]), token, "".join(tokens.words[at + 1 :])


FOR_A_CASE: Mapping[str, Any] = {
    "verdict_words": VERDICT_WORDS,
    "origin_words": ORIGIN_WORDS,
    "does": STAGE_SUMMARY,
    "ended": ended,
    "harm_of": harm_of,
    "drift_chart": drift_chart,
    "span_changes": span_changes,
    "commands": _commands,
    "sentences": _sentences,
    "most": _MOST_SENTENCES,
    "ribbons": _ribbons,
    "split": _split,
    "facts": _facts,
}
