"""A diagnosis on the terminal: the pipeline, what broke where, why, and what to change.

Recorded text is only ever put into :class:`rich.text.Text`, which interprets no markup, with
control characters written out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from omni_grpo_core.doctor.evidence import Evidence, Explanation, Finding
from omni_grpo_core.doctor.experiments import Experiment
from omni_grpo_core.doctor.verdict import Diagnosis, State
from omni_grpo_core.report import shortened, visible
from omni_grpo_core.report.doctor_words import (
    because,
    change,
    joined,
    not_judged,
    ordered,
    symptoms,
)

_EVIDENCE, _SYMPTOMS, _CAUSES = 6, 3, 3
_LONGEST = 300
_MARKS: Mapping[State, tuple[str, str]] = {
    "broken": ("✗", "bold red"),
    "differs": ("!", "yellow"),
    "allowed": ("!", "dim"),
    "inherited": ("~", "yellow"),
    "sound": ("✓", "green"),
    "failed": ("◌", "yellow"),
    "unjudged": ("◌", "dim"),
    "unseen": ("·", "dim"),
}
_LEGEND = "✗ broken  ! recipe differs  ~ inherited  ✓ sound  ◌ not judged  · not seen"


def print_diagnosis(console: Console, diagnosis: Diagnosis, steps: int) -> None:
    """Stages, findings (the headline first), what was not judged and why, and the verdict last."""
    if diagnosis.trainer:
        console.print(Text(_plain(diagnosis.trainer), "dim"))
    console.print(_stages(diagnosis, console.width))
    for finding in ordered(diagnosis):
        console.print(_panel(finding))
    _list(console, "allowed", (
        f"{one.by.cause} ({one.stage}): {one.by.why}" for one in diagnosis.allowed
    ))  # fmt: skip
    _list(console, "allowed, but not found", (one.cause for one in diagnosis.unused))
    _list(console, "not judged", (": ".join(filter(None, o)) for o in not_judged(diagnosis)))
    console.print(_verdict(diagnosis, steps))


def print_experiments(console: Console, experiments: Sequence[Experiment]) -> None:
    """The experiments, one line each; nothing if there were none."""
    styles = {"proved": "bold red", "cleared": "green", "open": "dim"}
    for experiment in experiments:
        line = Text(f"{experiment.outcome:8}", style=styles[experiment.outcome])
        line.append(f"{experiment.cause}  ", style="bold")
        console.print(line.append(_plain(experiment.sentence), style="default"))


def _stages(diagnosis: Diagnosis, width: int) -> Text:
    """The stages in order; a line ends between two of them."""
    text, used = Text(), 0
    for coverage in diagnosis.coverage:
        mark, style = _MARKS[coverage.state]
        item = f"{mark} {coverage.stage}"
        between = (" →\n" if used + len(item) + 5 > width else " → ") if used else ""
        used = len(item) + (used + len(between) if between != " →\n" else 0)
        text.append(between, "dim").append(item, style)
    return text.append(f"\n{_LEGEND}\n", "dim")


def _panel(finding: Finding) -> Panel:
    table = _grid()
    causes = joined(finding)[:_CAUSES]
    for word, cause in causes:
        if word:
            table.add_row(Text(word, "bold"), "")
        _explain(table, cause)
    if not causes:
        table.add_row("cause", Text("unknown", "bold"))
    quoted = "".join(cause.seen for _, cause in causes)
    evidence = [_fact(item, item.sentence in quoted) for item in finding.evidence]
    for number, line in enumerate(evidence[:_EVIDENCE]):
        table.add_row("" if number else "evidence", line)
    if len(evidence) > _EVIDENCE:
        table.add_row("", Text(f"and {len(evidence) - _EVIDENCE} more", style="dim"))
    breaks = finding.severity == "breaks"
    words = f"✗ {finding.stage}" if breaks else f"! {finding.stage}: recipe differs"
    title = Text(words, style="bold red" if breaks else "yellow")
    return Panel(table, title=title, title_align="left", border_style="red" if breaks else "yellow")


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    return table


def _explain(table: Table, cause: Explanation) -> None:
    table.add_row("seen", Text(_plain(cause.seen), style="bold"))
    if cause.proved and cause.proof not in cause.seen:
        table.add_row("proof", Text(_plain(cause.proof)))
    if cause.against:
        table.add_row("against it", Text(_plain(cause.against)))
    table.add_row("why it matters", Text(_plain(cause.harm)))
    table.add_row("change", Text(_plain(cause.fix), style="green"))
    if cause.confirm:
        table.add_row("to be sure", Text(_plain(cause.confirm)))
    known = f"{cause.cause} ({'proved' if cause.proved else 'fits'})"
    table.add_row("cause", Text("  ".join((known, cause.versions)).strip(), style="dim"))
    for link in cause.links:
        table.add_row("", Text(_plain(link), style="dim"))


def _fact(evidence: Evidence, quoted: bool) -> Text:
    """A sentence that is already there is not repeated, its name is: it can be allowed."""
    text = Text("as seen" if quoted else _plain(evidence.sentence))
    return text.append(f"  [{evidence.stage}/{evidence.fact}]", "dim")


def _list(console: Console, title: str, sentences: Iterator[str]) -> None:
    for number, sentence in enumerate(sentences):
        if not number:
            console.print(Text(title, style="bold dim"))
        console.print(Text(f"  {_plain(sentence)}", style="dim"))


def _verdict(diagnosis: Diagnosis, steps: int) -> Panel:
    head, table = diagnosis.headline, _grid()
    many = f"{steps} recorded step{'s' if steps != 1 else ''}"
    if diagnosis.raised is not None:
        table.add_row("raised", Text(_plain(diagnosis.raised.sentence), "bold"))
    for sentence in symptoms(diagnosis)[:_SYMPTOMS]:
        table.add_row("symptom", Text(_plain(sentence), "bold"))
    if isinstance(head, Finding):
        table.add_row("stage", Text(head.stage, "bold red" if diagnosis.broken else "yellow"))
        table.add_row("because", Text(_plain(because(head))))
        table.add_row("change", Text(_plain(change(head)), "green"))
    elif head is not None:
        table.add_row("because", Text("nothing seen explains it"))
    others = [f.stage for f in diagnosis.breaking if f is not head]
    if others:
        table.add_row("then", Text(", ".join(others), style="dim"))
    differs = [f.stage for f in diagnosis.findings if f.severity == "differs" and f is not head]
    if differs and not diagnosis.broken:
        table.add_row("recipe differs", Text(", ".join(differs), style="dim"))
    judged = Text(f"{many}: nothing wrong in {', '.join(_sound(diagnosis)) or 'any stage'}")
    if diagnosis.broken:
        title, style = "✗ BROKEN", "red"
        shown = Group(table)
    elif diagnosis.idle is not None:
        title, style = "? NOTHING LEARNED", "yellow"
        shown = Group(judged, table)
    elif any(c.state == "failed" for c in diagnosis.coverage):
        title, style = "? HEALTHY AS FAR AS IT WAS JUDGED", "yellow"
        shown = Group(judged, table)
    else:
        title, style = "✓ HEALTHY", "green"
        shown = Group(judged, table)
    return Panel(shown, title=Text(title, f"bold {style}"), title_align="left", border_style=style)


def _sound(diagnosis: Diagnosis) -> list[str]:
    return [c.stage for c in diagnosis.coverage if c.state == "sound"]


def _plain(text: str) -> str:
    return shortened(visible(text), _LONGEST)
