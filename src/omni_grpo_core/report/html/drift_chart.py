"""Float drift by stage on a logarithmic scale, as the geometry of one inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_LABEL, _PLOT, _INFINITE, _VALUE = 104, 500, 64, 76
"""Widths, in pixels: stage names, the decades, what is not finite, the value told."""
_ROW, _TOP, _BOTTOM = 22, 8, 30
_MOST_TICKS = 9

Shape = Literal["dot", "diamond", "cross"]


@dataclass(frozen=True, slots=True)
class Drift:
    """One stage of one case. ``harm``: ``none`` (within tolerance), ``drift`` or ``harm``."""

    stage: str
    case: str
    harm: Literal["none", "drift", "harm"]
    max_abs: float
    mean_abs: float


@dataclass(frozen=True, slots=True)
class Mark:
    """The largest |Δ| at ``x``, the mean at ``mean_x`` (``None``: there is none)."""

    x: float
    mean_x: float | None
    y: float
    shape: Shape
    harm: str
    title: str
    value: str


@dataclass(frozen=True, slots=True)
class Tick:
    x: float
    label: str


@dataclass(frozen=True, slots=True)
class Band:
    """One stage's row."""

    stage: str
    y: float
    middle: float


@dataclass(frozen=True, slots=True)
class Chart:
    """``left``, ``right``: where the decades begin and end. ``infinite``: where stands what is not
    finite, ``None`` if nothing is. ``still``: stages left out, without a drift to draw.
    ``title``: all of it in one sentence, for who cannot see it."""

    width: int
    height: int
    left: float
    right: float
    infinite: float | None
    base: float
    still: tuple[str, ...]
    bands: tuple[Band, ...]
    ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    title: str


def drift_chart(drifts: Sequence[Drift]) -> Chart | None:
    """A row for each stage that drifts, in the order in which they come; ``None`` if none does.

    With more than one case no values are written beside the marks.
    """
    every_stage = dict.fromkeys(drift.stage for drift in drifts)
    drifts = [drift for drift in drifts if drift.max_abs]
    if not drifts:
        return None
    moved = {drift.stage for drift in drifts}
    stages = [stage for stage in every_stage if stage in moved]
    sizes = [s for d in drifts for s in (d.max_abs, d.mean_abs) if 0 < s < math.inf]
    low = math.floor(math.log10(min(sizes, default=1e-6)))
    high = max(math.ceil(math.log10(max(sizes, default=1.0))), low + 1)
    left, right = _LABEL, _LABEL + _PLOT

    def place(size: float) -> float:
        if not math.isfinite(size):
            return right + _INFINITE / 2
        return left + _PLOT * (math.log10(size) - low) / (high - low)

    single = len({drift.case for drift in drifts}) == 1
    middles = {stage: _TOP + _ROW * (i + 0.5) for i, stage in enumerate(stages)}
    shapes: dict[str, Shape] = {"none": "dot", "drift": "diamond", "harm": "cross"}
    marks = tuple(
        Mark(
            x=place(drift.max_abs),
            mean_x=place(drift.mean_abs) if drift.mean_abs else None,
            y=middles[drift.stage],
            shape=shapes[drift.harm],
            harm=drift.harm,
            title=f"{drift.case}, {drift.stage}: max |Δ| {_told(drift.max_abs)}, "
            f"mean |Δ| {_told(drift.mean_abs)}",
            value=_told(drift.max_abs) if single else "",
        )
        # what matters is drawn last, on top
        for drift in sorted(drifts, key=lambda drift: list(shapes).index(drift.harm))
    )
    every = -(-(high - low) // _MOST_TICKS)
    ticks = tuple(
        Tick(left + _PLOT * (power - low) / (high - low), f"1e{power}")
        for power in range(low, high + 1, every)
    )
    worst = max(drifts, key=lambda drift: drift.max_abs)
    return Chart(
        width=right + _INFINITE + _VALUE,
        height=_TOP + _ROW * len(stages) + _BOTTOM,
        left=left,
        right=right,
        infinite=None if all(math.isfinite(d.max_abs) for d in drifts) else place(math.inf),
        base=_TOP + _ROW * len(stages),
        still=tuple(stage for stage in every_stage if stage not in moved),
        bands=tuple(Band(s, middles[s] - _ROW / 2, middles[s]) for s in stages),
        ticks=ticks,
        marks=marks,
        title="largest and mean |Δ| of floats by stage, logarithmic; largest: "
        f"{_told(worst.max_abs)} in {worst.stage} of {worst.case}",
    )


def _told(size: float) -> str:
    """
    >>> _told(0.000123), _told(float("inf")), _told(0.0)
    ('1.2e-04', 'not finite', '0')
    """
    if not math.isfinite(size):
        return "not finite"
    return f"{size:.1e}" if size else "0"
