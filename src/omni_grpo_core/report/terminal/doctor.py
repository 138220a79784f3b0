"""A diagnosis on the terminal: the pipeline, what broke where, why, and what to change.

Recorded text is only ever put into :class:`rich.text.Text`, which interprets no markup, with
control characters written out.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from omni_grpo_core.doctor.evidence import Diagnosis, Evidence, Explanation, Finding
from omni_grpo_core.doctor.experiment import Experiment
from omni_grpo_core.report import shortened, visible
from omni_grpo_core.types import MADE_STAGES, STAGES, Stage

_EVIDENCE = 6
_LONGEST = 300


def print_diagnosis(console: Console, diagnosis: Diagnosis, steps: int) -> None:
    """Stages, findings in pipeline order, what could not be judged, and the verdict last."""
    console.print(_stages(diagnosis))
    for finding in diagnosis.findings:
        console.print(_panel(finding))
    if diagnosis.missing:
        console.print(Text("not judged", style="bold dim"))
        for sentence in diagnosis.missing:
            console.print(Text(f"  {_plain(sentence)}", style="dim"))
    console.print(_verdict(diagnosis, steps))


def print_experiments(console: Console, experiments: Sequence[Experiment]) -> None:
    """The experiments, one line each; nothing if there were none."""
    styles = {"proved": "bold red", "cleared": "green", "open": "dim"}
    for experiment in experiments:
        line = Text(f"{experiment.outcome:8}", style=styles[experiment.outcome])
        line.append(f"{experiment.cause}  ", style="bold")
        console.print(line.append(_plain(experiment.sentence), style="default"))


def _stages(diagnosis: Diagnosis) -> Text:
    broken = {finding.stage for finding in diagnosis.findings}
    text = Text()
    for stage in STAGES:
        if stage not in MADE_STAGES and stage not in broken:
            continue
        if text:
            text.append(" → ", style="dim")
        text.append_text(_marked(stage, broken, diagnosis))
    return text.append(
        "\n✗ broken  ~ inherited an error  ✓ sound  ? not judged  · not seen\n", style="dim"
    )


def _marked(stage: Stage, broken: set[Stage], diagnosis: Diagnosis) -> Text:
    if stage in broken:
        return Text(f"✗ {stage}", style="bold red")
    if stage in diagnosis.inherited:
        return Text(f"~ {stage}", style="yellow")
    if stage in diagnosis.seen:
        return Text(f"✓ {stage}", style="green")
    if stage in diagnosis.unjudged:
        return Text(f"? {stage}", style="yellow")
    return Text(f"· {stage}", style="dim")


def _panel(finding: Finding) -> Panel:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    if finding.causes:
        _explain(table, finding.causes[0])
        for other in finding.causes[1:3]:
            table.add_row("or else", Text(_plain(f"{other.cause}: {other.seen}"), style="dim"))
    else:
        table.add_row("seen", Text("no known fault explains these differences:", style="bold"))
    for number, evidence in enumerate(finding.evidence[:_EVIDENCE]):
        table.add_row("" if number else "evidence", _fact(evidence))
    if len(finding.evidence) > _EVIDENCE:
        table.add_row("", Text(f"and {len(finding.evidence) - _EVIDENCE} more", style="dim"))
    title = Text(f"✗ {finding.stage}", style="bold red")
    return Panel(table, title=title, title_align="left", border_style="red")


def _explain(table: Table, cause: Explanation) -> None:
    table.add_row("seen", Text(_plain(cause.seen), style="bold"))
    table.add_row("why it matters", Text(_plain(cause.harm)))
    table.add_row("change", Text(_plain(cause.fix), style="green"))
    if cause.confirm:
        table.add_row("to be sure", Text(_plain(cause.confirm)))
    table.add_row(
        "cause", Text(f"{cause.cause} ({'proved' if cause.proved else 'fits'})", style="dim")
    )


def _fact(evidence: Evidence) -> Text:
    return Text(_plain(evidence.sentence)).append(f"  [{evidence.fact}]", "dim")


def _verdict(diagnosis: Diagnosis, steps: int) -> Panel:
    first = diagnosis.first
    many = f"{steps} recorded step{'s' if steps != 1 else ''}"
    if first is None:
        text = Text(f"{many}: nothing wrong in {', '.join(diagnosis.seen)}")
        if diagnosis.unjudged:
            text.append(f"; not judged: {', '.join(diagnosis.unjudged)}", style="yellow")
            return Panel(text, title=Text("? HEALTHY AS FAR AS IT WAS JUDGED", style="bold yellow"),
                         title_align="left", border_style="yellow")  # fmt: skip
        return Panel(text, title=Text("✓ HEALTHY", style="bold green"), title_align="left",
                     border_style="green")  # fmt: skip
    text = Text(f"stage {first.stage}: ", style="bold")
    if first.causes:
        text.append(f"{_plain(first.causes[0].seen)}; ").append(
            _plain(first.causes[0].fix), style="green"
        )
    else:
        text.append(_plain(first.evidence[0].sentence))
    others = [finding.stage for finding in diagnosis.findings if finding is not first]
    if others:
        text.append(f"\nthen: {', '.join(others)}", style="dim")
    return Panel(text, title=Text("✗ BROKEN", style="bold red"), title_align="left",
                 border_style="red")  # fmt: skip


def _plain(text: str) -> str:
    return shortened(visible(text), _LONGEST)
