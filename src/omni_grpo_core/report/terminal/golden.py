"""A golden check on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from omni_grpo_core.golden.classify import base_stage
from omni_grpo_core.golden.commands import new_cases
from omni_grpo_core.golden.results import FINE, CaseResult, Generation, GoldenReport, Verdict
from omni_grpo_core.golden.review import Accepted
from omni_grpo_core.pipeline.hints import advice

_COLOURS: dict[Verdict, str] = {
    "exact": "green",
    "within": "green",
    "new": "cyan",
    "benign-drift": "yellow",
    "harmful": "red",
    "degenerate": "red",
    "schema": "magenta",
}
_CASES = 20
"""Cases listed of an acceptance."""
_SHOWN = 6
"""Sentences shown per stage."""


def print_report(console: Console, report: GoldenReport, *, every: bool) -> None:
    """A line per case, then what diverged, stage by stage; with ``every`` also values within
    tolerance and unchanged stages. One line for all cases that only lack goldens."""
    known = [
        case
        for case in report.cases
        if case.verdict != "new" or (every and any(stage.golden for stage in case.stages))
    ]
    table = Table("case", "verdict", "first stage", title=f"Goldens for {report.platform}")
    for case in known:
        table.add_row(case.case, painted(case.verdict), case.first or "")
    if known:
        console.print(table)
    for case in known:
        if every or case.verdict not in FINE:
            print_case(console, case, every=every)
    if report.new:
        line = f"{painted('new')}: {escape(new_cases(report))}"
        console.print(line, highlight=False, soft_wrap=True)
    first = f"first divergent stage: {report.first}, " if report.first else ""
    fine = sum(case.verdict in FINE for case in report.cases)
    console.print(
        f"{painted(report.verdict)}: {first}{fine} of {len(report.cases)} cases match, "
        f"{report.seconds:.1f} s"
    )
    if report.first and report.verdict not in FINE:
        failure = "garbage" if report.verdict == "degenerate" else ""
        console.print(f"do: {advice(base_stage(report.first), failure)}", highlight=False)


def print_case(console: Console, case: CaseResult, *, every: bool) -> None:
    """One case, with ``every`` all of its stages."""
    for line in case_lines(case, every=every):
        console.print(line, highlight=False, soft_wrap=True)


def accepted_json(done: Sequence[Accepted]) -> dict[str, Any]:
    """For ``--json``: per file, and per case."""
    files = [{**asdict(one), "file": str(one.file)} for one in done]
    return {"accepted": files, "cases": [asdict(case) for case in _accepted_cases(done)]}


@dataclass(frozen=True, slots=True)
class _AcceptedCase:
    """``replaced``: how many of the goldens replaced an older one."""

    case: str
    platform: str
    verdict: str
    goldens: int
    replaced: int


def _accepted_cases(done: Sequence[Accepted]) -> list[_AcceptedCase]:
    groups: dict[tuple[str, str], list[Accepted]] = {}
    for one in done:
        groups.setdefault((one.case, one.platform), []).append(one)
    return [
        _AcceptedCase(
            case,
            platform,
            ", ".join(dict.fromkeys(one.verdict for one in found)),
            len(found),
            sum(one.supersedes != "nothing" for one in found),
        )
        for (case, platform), found in groups.items()
    ]


def print_accepted(console: Console, done: Sequence[Accepted], by: str, reason: str) -> None:
    """A line per case, then all together: who accepted them and why."""
    cases = _accepted_cases(done)
    table = Table("case", "platform", "verdict", "goldens", "replaced")
    for case in cases[:_CASES]:
        table.add_row(
            case.case, case.platform, case.verdict, str(case.goldens), str(case.replaced or "")
        )
    if len(cases) > _CASES:
        table.add_row(f"… and {len(cases) - _CASES} more")
    console.print(table)
    replaced = sum(case.replaced for case in cases)
    console.print(
        f"accepted {len(done)} goldens, replacing {replaced or 'none'}, by {escape(by)}: "
        f"{escape(reason)}",
        highlight=False,
        soft_wrap=True,
    )


def painted(verdict: Verdict) -> str:
    """A verdict in its colour, as rich markup."""
    return f"[{_COLOURS[verdict]}]{verdict}[/]"


def case_lines(case: CaseResult, *, every: bool) -> Iterator[str]:
    """One case, as rich markup."""
    yield f"\n[bold]{escape(case.case)}[/]: {painted(case.verdict)}: {escape(case.reason)}"
    for key, (was, now) in case.versions.items():
        yield f"  [dim]{escape(key)}: {escape(was)} → {escape(now)}[/]"
    for stage in case.stages:
        if (not every and stage.verdict in FINE) or not stage.golden:
            continue
        drift = f", max |Δ| {stage.max_abs:.3g}" if stage.max_abs else ""
        origin = f" ({stage.origin})" if stage.origin != "none" else ""
        yield f"  {stage.stage}: {painted(stage.verdict)}{origin}{drift}"
        sentences = [d.sentence for d in stage.differences if every or d.verdict == "differs"]
        sentences = sentences or ([] if stage.verdict == "exact" else [stage.reason])
        yield from (f"    {escape(sentence)}" for sentence in sentences[:_SHOWN])
        if len(sentences) > _SHOWN:
            yield f"    … and {len(sentences) - _SHOWN} more"
    for generation in case.generations:
        if every or generation.verdict not in FINE:
            yield from _generation(generation)


def case_text(case: CaseResult) -> str:
    """One case as ``golden diff`` prints it, without colours."""
    console = Console(file=StringIO(), color_system=None, width=100)
    with console.capture() as captured:
        print_case(console, case, every=True)
    return captured.get().strip("\n")


def _generation(found: Generation) -> Iterator[str]:
    head = f"completion {found.index} of {escape(found.sample_id)}"
    yield f"  {head}: {painted(found.verdict)}: {escape(found.sentence)}"
    if found.first is not None:
        yield f"    was {escape(_marked(found.was.words, found.first))}"
        yield f"    now {escape(_marked(found.now.words, found.first))}"


def _marked(words: Sequence[str], at: int) -> str:
    """A completion with a marker before its first differing token."""
    text = "".join(words[:at]) + " ▶" + "".join(words[at:])
    return text.replace("\n", "⏎")
