"""What a user sees of a training run: reward, health, and the policy's completions, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from omni_grpo_core.training.loop import StepView


_BARS = " ▁▂▃▄▅▆▇█"


def spark(values: list[float], width: int = 48) -> str:
    """The last values, from 0 to 1, as a row of bars.

    >>> spark([0.0, 0.5, 1.0])
    ' ▄█'
    """
    return "".join(_BARS[round(min(1.0, max(0.0, v)) * 8)] for v in values[-width:])


def health_line(record: Mapping[str, Any]) -> str:
    """The numbers that tell a run that learns from one that is dead.

    >>> health_line({"cap_rate": 0.5, "zero_variance_rate": None})
    'capped 0.5 · flat groups -'
    """
    shown = {
        "loss": "loss",
        "grad_norm": "gradient",
        "entropy": "entropy",
        "kl": "kl",
        "completion_length": "length",
        "cap_rate": "capped",
        "zero_variance_rate": "flat groups",
        "drift_max": "drift",
    }
    return " · ".join(
        f"{label} {'-' if record[name] is None else format(record[name], '.3g')}"
        for name, label in shown.items()
        if name in record
    )


@contextmanager
def display(steps: int, console: Console, *, live: bool) -> Iterator[Callable[[StepView], None]]:
    """A panel redrawn in place if ``live``, else one line per step."""
    rewards: list[float] = []

    def line(view: StepView) -> None:
        measured = "".join(
            f" · {name.removeprefix('eval/')} {value:.3f}"
            for name, value in view.record.items()
            if name.startswith("eval/")
        )
        text = f"step {view.record['step']} · reward {_number(view.record['reward'])}"
        text = f"{text} · {health_line(view.record)}{measured}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if not live:
        yield line
        return
    bar = Progress(
        TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
    task = bar.add_task("train", total=steps)
    with Live(bar, console=console) as screen:

        def draw(view: StepView) -> None:
            bar.update(task, completed=view.record["step"] + 1)
            rewards.append(view.record["reward"] or 0.0)
            screen.update(Group(bar, _panel(view, rewards)))

        yield draw


def _panel(view: StepView, rewards: list[float]) -> Panel:
    samples = Table.grid(padding=(0, 1))
    for completion, total in list(zip(view.rolled.completions, view.scored.total, strict=True))[:3]:
        value = "  - " if total.value is None else f"{total.value:.2f}"
        samples.add_row(value, Text(completion.text[:240], overflow="fold"))
    names = ("reward", *(f"reward/{name}" for name in view.scored.scores))
    parts = [f"{name.removeprefix('reward/')} {_number(view.record[name])}" for name in names]
    return Panel(
        Group(
            Text(f"{' · '.join(parts)}  {spark(rewards)}"),
            Text(health_line(view.record), style="dim"),
            samples,
        )
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
