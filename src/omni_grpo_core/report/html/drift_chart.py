"""Float drift by stage on a logarithmic scale, as the geometry of one inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from omni_grpo_core.golden.results import FINE, CaseResult, Verdict
from omni_grpo_core.report.html import Tick

_LABEL, _PLOT, _INFINITE, _VALUE = 104, 500, 92, 76
"""Widths, in pixels: stage names, decades, non-finite values, the printed value."""
_ROW, _TOP, _BOTTOM = 22, 8, 30
_MOST_TICKS = 9

Harm = Literal["none", "new", "drift", "harm"]
_HARMS: tuple[Harm, ...] = get_args(Harm)


def harm_of(verdict: Verdict) -> Harm:
    """``none``: within tolerance; ``new``: no golden yet; ``drift``: float drift only; ``harm``:
    anything else."""
    if verdict in FINE:
        return "none"
    return "new" if verdict == "new" else "drift" if verdict == "benign-drift" else "harm"


@dataclass(frozen=True, slots=True)
class Mark:
    """The largest |Δ| at ``x``, the mean at ``mean_x`` (``None`` if there is none)."""

    x: float
    mean_x: float | None
    y: float
    harm: Harm
    title: str
    value: str


@dataclass(frozen=True, slots=True)
class Chart:
    """``left``, ``right``: where the decades begin and end. ``infinite``: where non-finite values
    go, ``None`` if there are none. ``still``: stages left out for lack of drift. ``rows``: stage
    positions. ``title``: the chart in one sentence, for screen readers."""

    width: int
    height: int
    left: float
    right: float
    infinite: float | None
    base: float
    still: tuple[str, ...]
    rows: tuple[Tick, ...]
    ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    title: str


def drift_chart(cases: Sequence[CaseResult]) -> Chart | None:
    """A row for each stage that drifts, in pipeline order; ``None`` if none does.

    If more than one case drifts, no values are written beside the marks.
    """
    every_stage = dict.fromkeys(stage.stage for case in cases for stage in case.stages)
    drifts = [(case.case, stage) for case in cases for stage in case.stages if stage.max_abs]
    if not drifts:
        return None
    moved = {drift.stage for _, drift in drifts}
    stages = [stage for stage in every_stage if stage in moved]
    sizes = [s for _, d in drifts for s in (d.max_abs, d.mean_abs) if 0 < s < math.inf]
    low = math.floor(math.log10(min(sizes, default=1e-6)))
    high = max(math.ceil(math.log10(max(sizes, default=1.0))), low + 1)
    left, right = _LABEL, _LABEL + _PLOT

    def place(size: float) -> float:
        if not math.isfinite(size):
            return right + _INFINITE / 2
        return left + _PLOT * (math.log10(size) - low) / (high - low)

    single = len({case for case, _ in drifts}) == 1
    middles = {stage: _TOP + _ROW * (i + 0.5) for i, stage in enumerate(stages)}
    marks = tuple(
        Mark(
            x=place(drift.max_abs),
            mean_x=place(drift.mean_abs) if drift.mean_abs else None,
            y=middles[drift.stage],
            harm=harm_of(drift.verdict),
            title=f"{case}, {drift.stage}: max |Δ| {_size_words(drift.max_abs)}, "
            f"mean |Δ| {_size_words(drift.mean_abs)}",
            value=_size_words(drift.max_abs) if single else "",
        )
        # the most harmful is drawn last, on top
        for case, drift in sorted(drifts, key=lambda d: _HARMS.index(harm_of(d[1].verdict)))
    )
    every = -(-(high - low) // _MOST_TICKS)
    ticks = tuple(
        Tick(left + _PLOT * (power - low) / (high - low), f"1e{power}")
        for power in range(low, high + 1, every)
    )
    case, worst = max(drifts, key=lambda drift: drift[1].max_abs)
    return Chart(
        width=right + _INFINITE + _VALUE,
        height=_TOP + _ROW * len(stages) + _BOTTOM,
        left=left,
        right=right,
        infinite=None if all(math.isfinite(d.max_abs) for _, d in drifts) else place(math.inf),
        base=_TOP + _ROW * len(stages),
        still=tuple(stage for stage in every_stage if stage not in moved),
        rows=tuple(Tick(middles[stage], stage) for stage in stages),
        ticks=ticks,
        marks=marks,
        title="largest and mean |Δ| of floats by stage, logarithmic; largest: "
        f"{_size_words(worst.max_abs)} in {worst.stage} of {case}",
    )


def _size_words(size: float) -> str:
    """
    >>> _size_words(0.000123), _size_words(float("inf")), _size_words(0.0)
    ('1.2e-04', 'non-finite', '0')
    """
    if not math.isfinite(size):
        return "non-finite"
    return f"{size:.1e}" if size else "0"
