"""What a loss is divided by: counted once for a whole optimizer step, over everything in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from omni_grpo_core.losses.shapes import require_mask


@dataclass(frozen=True, slots=True)
class Totals:
    """Sequences and tokens in the loss of one optimizer step.

    They are those of all micro-batches of all ranks together. Divided by them, the losses of the
    micro-batches *sum* to the loss of the step, however it was cut up. A row without a token in the
    loss is no sequence: masking a row out is the same as leaving it out.

    >>> Totals(sequences=2, tokens=5) + Totals(sequences=1, tokens=3)
    Totals(sequences=3, tokens=8)
    """

    sequences: int
    tokens: int

    @classmethod
    def of(cls, mask: Tensor) -> Totals:
        """Count one micro-batch. ``mask``: bool, (N, C). Raises ``TrainError`` for another mask."""
        require_mask("mask", mask)
        return cls(sequences=int(mask.any(-1).sum()), tokens=int(mask.sum()))

    @classmethod
    def sum(cls, parts: Iterable[Totals]) -> Totals:
        """The totals of all parts."""
        total = cls(0, 0)
        for part in parts:
            total += part
        return total

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.sequences + other.sequences, self.tokens + other.tokens)
