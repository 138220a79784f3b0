"""The way of the data through a step as a drawing: calls from top to bottom, one arrow for each
pair of kinds that hand something on, the broken ones marked."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from omni_grpo_core.doctor.continuity import Edge
from omni_grpo_core.doctor.evidence import Case, Evidence, Finding
from omni_grpo_core.doctor.verdict import Coverage
from omni_grpo_core.report import visible
from omni_grpo_core.trace.calls import LossGradient, LossSeen, StepSeen
from omni_grpo_core.types import Stage

State = Literal["ok", "broken", "not judged"]
_RANK: tuple[State, ...] = ("not judged", "ok", "broken")
_MARKS: Mapping[State, str] = {"ok": "✓", "broken": "✗", "not judged": "◌"}

WIDTH = 480
_LEFT, _BOX, _HIGH = 44, 160, 30
"""Of a box: its left side, width and height. At its left is room for lines that pass boxes."""
_CENTRE, _TEXT = _LEFT + _BOX / 2, _LEFT + _BOX / 2 + 14
_LINE, _GAP = 15, 12
_CHARACTERS, _MOST_LINES = 46, 6


@dataclass(frozen=True, slots=True)
class Box:
    """A kind of call, and whether one of its stages broke. ``y``: of its top."""

    label: str
    y: float
    broken: bool
    x: float = _LEFT
    wide: float = _BOX
    high: float = _HIGH


@dataclass(frozen=True, slots=True)
class Label:
    """One line of text beside an arrow."""

    text: str
    y: float


@dataclass(frozen=True, slots=True)
class Arrow:
    """``line`` and ``head``: SVG paths. ``labels``: what was done on the way, or what is wrong."""

    state: State
    line: str
    head: str
    labels: tuple[Label, ...]
    label_x: float = _TEXT


@dataclass(frozen=True, slots=True)
class Way:
    """A drawing of ``height``, :data:`WIDTH` wide; ``summary`` says the same in words."""

    height: float
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    summary: str


def way(
    case: Case, edges: Sequence[Edge], coverage: Sequence[Coverage], findings: Iterable[Finding]
) -> Way | None:
    """The drawing of a step; ``None`` where nothing was handed on."""
    handed = [_of_rewards(edge) for edge in edges]
    merged = _merged((*handed, *_to_the_step(case, handed, coverage)))
    broken = {e.stage for f in findings for e in f.evidence if _inside(e)}
    boxes: dict[str, Box] = {}
    arrows: list[Arrow] = []
    y: float = 4
    for label in _ordered(merged):
        above = next(reversed(boxes.values()), None)
        # a loop of calls has no order: an edge back is not drawn
        incoming = [edge for edge in merged if edge.end == label and edge.start in boxes]
        lines = [_wrapped(edge) for edge in incoming]
        top = y + sum(map(len, lines)) * _LINE + (2 * _GAP if boxes else 0)
        at = y + _GAP + _LINE - 4
        for edge, texts in zip(incoming, lines, strict=True):
            labels = tuple(Label(text, at + n * _LINE) for n, text in enumerate(texts))
            at += len(texts) * _LINE
            start = boxes[edge.start]
            drawn = _down(y, top) if start is above else _around(start.y, top, len(arrows))
            arrows.append(Arrow(edge.state, *drawn, labels))
        boxes[label] = Box(label, top, bool(broken & {*_STAGES.get(label, ())}))
        y = top + _HIGH
    summary = "; ".join(f"{edge.start} to {edge.end}: {edge.state}" for edge in merged)
    return Way(y + 4, tuple(boxes.values()), tuple(arrows), summary) if boxes else None


def _inside(evidence: Evidence) -> bool:
    """Whether a call itself broke, rather than what was handed to it."""
    return evidence.severity == "breaks" and "edge" not in evidence.values


def _of_rewards(edge: Edge) -> Edge:
    """All reward functions in one box; what is wrong names its own."""
    if not edge.end.startswith("reward "):
        return edge
    why = f"{edge.end}: {edge.why}" if edge.why else ""
    return replace(edge, end=_REWARDS, why=why)


def _merged(edges: Iterable[Edge]) -> list[Edge]:
    """One edge for each pair of kinds: a broken one, else one that was judged."""
    found: dict[tuple[str, str], Edge] = {}
    for edge in edges:
        held = found.get((edge.start, edge.end))
        if held is None or _RANK.index(edge.state) > _RANK.index(held.state):
            found[edge.start, edge.end] = edge
    return list(found.values())


def _ordered(edges: Sequence[Edge]) -> list[str]:
    """The kinds, each after those that it gets something from."""
    found: list[str] = []
    for edge in edges:
        if edge.start not in found:
            found.insert(found.index(edge.end) if edge.end in found else len(found), edge.start)
        if edge.end not in found:
            found.append(edge.end)
    return found


def _wrapped(edge: Edge) -> list[str]:
    words = edge.why or edge.relation or "unchanged"
    text = f"{_MARKS[edge.state]} from {edge.start}: {visible(words)}"
    return textwrap.wrap(text, _CHARACTERS, max_lines=_MOST_LINES, placeholder=" …")


def _down(start: float, end: float) -> tuple[str, str]:
    """From a box to the next."""
    x = _CENTRE
    head = f"M {x - 5:g} {end - 8:g} L {x:g} {end:g} L {x + 5:g} {end - 8:g} Z"
    return f"M {x:g} {start:g} V {end - 6:g}", head


def _around(start: float, end: float, number: int) -> tuple[str, str]:
    """Past the boxes between, at their left; lines beside each other keep apart."""
    x, start, end = _LEFT - 12 - 7 * (number % 4), start + _HIGH / 2, end + _HIGH / 2
    line = (
        f"M {_LEFT} {start:g} H {x + 6:g} Q {x:g} {start:g} {x:g} {start + 6:g} V {end - 6:g} "
        f"Q {x:g} {end:g} {x + 6:g} {end:g} H {_LEFT - 6:g}"
    )
    return line, f"M {_LEFT - 8} {end - 5:g} L {_LEFT} {end:g} L {_LEFT - 8} {end + 5:g} Z"


# --------------------------------------------------------------------------- after the rewards

_FORWARD, _REWARDS = "the scoring forward", "rewards"
_STAGES: Mapping[str, tuple[Stage, ...]] = {
    "rendered text": ("conversation", "text"),
    "processor": ("media", "batch"),
    "generate": ("completion",),
    _FORWARD: ("embeddings", "positions", "logits"),
    _REWARDS: ("parsed", "reward"),
    "loss": ("advantage", "loss"),
    "optimizer step": ("gradient",),
}
"""The stages of each kind of call."""


def _to_the_step(case: Case, edges: Sequence[Edge], coverage: Sequence[Coverage]) -> Iterator[Edge]:
    """From rewards and scores to the loss, and from there to the optimizer's step, by what is known
    of the stages: these calls hand on numbers, not rows."""
    ends = list(dict.fromkeys(edge.end for edge in edges))
    kinds = {type(value) for value in case.values}
    read = bool(kinds & {LossSeen, LossGradient})
    for label in ends if read else ():
        if label == _REWARDS:
            yield _by_stage(label, "loss", "advantage", coverage)
        elif label == _FORWARD:
            yield _by_stage(label, "loss", "loss", coverage)
    if StepSeen in kinds and ends:
        yield _by_stage("loss" if read else ends[-1], "optimizer step", "gradient", coverage)


def _by_stage(start: str, end: str, stage: Stage, coverage: Sequence[Coverage]) -> Edge:
    known = next((one for one in coverage if one.stage == stage), None)
    if known is None or known.why:
        why = "nothing was judged" if known is None else known.why
        return Edge(start, end, 0, (), "", "not judged", f"{stage}: {why}")
    if known.state == "broken":
        return Edge(start, end, 0, (), "", "broken", f"{stage} broke here")
    return Edge(start, end, 0, (), f"{stage} as it should be", "ok")
