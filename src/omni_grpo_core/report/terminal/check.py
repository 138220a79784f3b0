"""A check on the terminal: what was checked, what was seen, and what to do.

Completions and names from data are only ever put into :class:`rich.text.Text`, which interprets no
markup, with control characters written out.
"""

from __future__ import annotations

from dataclasses import fields

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from omni_grpo_core.pipeline.check import CheckResult
from omni_grpo_core.report import pieces, shortened, varied, visible
from omni_grpo_core.report.html.words import first_failure, not_judged, passed_line
from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.types import Check, StageRecord

_COMPLETIONS = 3
_LONGEST = 400
_STYLES = {
    "context": "cyan", "think": "yellow", "answer": "bold green", "plain": "dim",
    "fault": "bold red", "after": "",
}  # fmt: skip


def print_check(console: Console, result: CheckResult) -> None:
    """Stages, modality proof, a few completions, health, and the verdict last, where it is read."""
    console.print(_stages(result))
    if result.modalities:
        console.print(_proof(result))
    console.print(_completions(result))
    console.print(_health(result))
    console.print(_verdict(result))


def _stages(result: CheckResult) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage")
    table.add_column("")
    table.add_column("checked", ratio=1)
    table.add_column("s", justify="right")
    for record in result.trace.stages:
        table.add_row(
            Text(record.stage, style="" if record.ok else "bold red"),
            _mark(record.ok),
            _checks(record),
            Text(f"{record.seconds:.2f}", style="dim"),
        )
    return table


def _checks(record: StageRecord[object]) -> Group:
    """Each failed check with what was seen, then the passed ones on one line."""
    holds = [visible(check.name) for check in record.checks if check.ok]
    failed = [_failed(check) for check in record.checks if not check.ok]
    line = Text(", ".join(holds), style="dim", no_wrap=True, overflow="ellipsis")
    return Group(*failed, *([line] if holds or not failed else []))


def _failed(check: Check) -> Text:
    text = Text(f"✗ {visible(check.name)}", style="red")
    return text.append(f": {shortened(visible(check.detail), _LONGEST)}", style="default")


def _proof(result: CheckResult) -> Table:
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False,
        caption="right answers as is, without the medium, with another row's; share of answers "
        "changed by the swap; logprob shift in nats per token",
        caption_justify="left",
    )  # fmt: skip
    table.add_column("modality")
    table.add_column("")
    for name in ("rows", "as is", "without", "swapped", "moved", "shift"):
        table.add_column(name, justify="right")
    for proof in result.modalities:
        shares = (proof.accuracy, proof.without, proof.swapped, proof.moved)
        table.add_row(
            proof.modality,
            _mark(proof.ok) if proof.judgement != "not judged" else Text("◌", style="yellow"),
            str(proof.rows),
            *(f"{share:.0%}" for share in shares), f"{proof.shift:.2g}",
        )  # fmt: skip
    return table


def _completions(result: CheckResult) -> Group:
    """Greedy completions of rows of different kinds, sections coloured, tags kept."""
    batch, rolled = result.values.get("batch"), result.values.get("completion")
    if batch is None or rolled is None:
        return Group()
    samples = result.values.get("sample")
    lines = []
    for index in varied(batch.rows, _COMPLETIONS):
        completion = rolled.completions[index]
        head = Text(visible(completion.group_id), style="bold")
        if samples is not None:
            head.append(f"  {visible(samples[index].question)}", style="default not bold")
        body = Text()
        left = _LONGEST
        for piece in pieces(completion.text, parse(completion.text)):
            if piece.kind == "fault":
                body.append(f" ⚠ {visible(piece.text)} ", style=_STYLES["fault"])
                continue
            body.append(shortened(visible(piece.text), max(left, 0)), style=_STYLES[piece.kind])
            left -= len(piece.text)
        lines += [head, body or Text("(nothing)", style="dim"), Text()]
    return Group(*lines)


def _health(result: CheckResult) -> Text:
    line = Text("health  ", style="bold")
    numbers = [
        f"{field.name.replace('_', ' ')} {getattr(result.health, field.name):.3g}"
        for field in fields(result.health)
    ]
    return line.append(", ".join(numbers), style="default not bold")


def _verdict(result: CheckResult) -> Panel:
    failure = first_failure(result)
    if failure is None:
        text = Text(passed_line(result))
        for line in filter(None, map(not_judged, result.modalities)):
            text.append(f"\n{line}")
    else:
        text = Text.assemble(
            (f"{failure.where}: {visible(failure.what)}\n", "bold"),
            f"seen: {shortened(visible(failure.seen), _LONGEST)}\n",
            f"do:   {failure.fix}",
            f"\n{failure.others} more failed after it; fix this first" if failure.others else "",
        )
    passed = result.verdict == "pass"
    colour = "green" if passed else "red"
    title = Text("✓ PASS" if passed else "✗ FAIL", style=f"bold {colour}")
    return Panel(text, title=title, title_align="left", border_style=colour)


def _mark(ok: bool) -> Text:
    return Text("✓", style="green") if ok else Text("✗", style="bold red")
