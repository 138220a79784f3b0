"""The result of a comparison: differences, per stage and per pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Verdict = Literal["exact", "within", "differs"]
"""``exact``: equal in value and type. ``within``: floats differ, by no more than the tolerance.
``differs``: anything else."""
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference.

    ``path``: the leaf of the stage's value. ``sentence``: what a person needs to know, including
    the path. ``row``: the sample's row in the batch, ``place``: index of the first (integers) or
    worst (floats) element, if there is one. ``max_abs``, ``mean_abs``: over all elements; for a
    fingerprint the mean is the root mean square estimated from its projections.
    """

    path: str
    verdict: Verdict
    sentence: str
    row: int | None = None
    place: tuple[int, ...] | None = None
    max_abs: float | None = None
    mean_abs: float | None = None


class Drifts:
    """How far the floats of a stage moved, from its ``differences``."""

    __slots__ = ()
    differences: tuple[Difference, ...]

    @property
    def max_abs(self) -> float:
        """The largest |Δ| of any float of the stage; infinite if one side is non-finite."""
        return max((d.max_abs for d in self.differences if d.max_abs is not None), default=0.0)

    @property
    def mean_abs(self) -> float:
        """The largest mean |Δ| of any float tensor of the stage."""
        return max((d.mean_abs for d in self.differences if d.mean_abs is not None), default=0.0)


@dataclass(frozen=True, slots=True)
class StageComparison(Drifts):
    """All differences of one stage, including those within tolerance."""

    stage: str
    differences: tuple[Difference, ...]

    @property
    def verdict(self) -> Verdict:
        return worst(difference.verdict for difference in self.differences)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Two passes, stage by stage, in the order of the first."""

    stages: tuple[StageComparison, ...]

    @property
    def verdict(self) -> Verdict:
        return worst(stage.verdict for stage in self.stages)

    @property
    def first(self) -> StageComparison | None:
        """The first stage that differs beyond tolerance."""
        return next((stage for stage in self.stages if stage.verdict == "differs"), None)

    def lines(self, most: int = 12) -> list[str]:
        """The comparison for a terminal: one line per stage and per difference beyond tolerance,
        up to ``most`` differences each."""
        lines = []
        for stage in self.stages:
            drift = f"  max |Δ| {stage.max_abs:.3g}" if stage.max_abs else ""
            lines.append(f"{stage.stage:<13} {stage.verdict}{drift}")
            sentences = [d.sentence for d in stage.differences if d.verdict == "differs"]
            lines += [f"  {sentence}" for sentence in sentences[:most]]
            if len(sentences) > most:
                lines.append(f"  … and {len(sentences) - most} more")
        return lines


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """
    >>> worst(["exact", "within"]), worst([])
    ('within', 'exact')
    """
    found = set(verdicts)
    return next((verdict for verdict in reversed(VERDICTS) if verdict in found), "exact")
