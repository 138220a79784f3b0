"""What the tokens of one completion may be weighted by: ratios of the policy that is trained to the
one that sampled, whole, clipped or bounded, and what somebody may mistake for one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from omni_grpo_core.doctor.bundles import rows_in
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.loss_rows import TrainedRow, logprobs_of, scored_without_gradient
from omni_grpo_core.losses import LossConfig
from omni_grpo_core.trace.calls import ForwardCall

Ratio = Literal[
    "none", "token", "clipped", "bounded", "gated",
    "inverted", "probability", "logarithms", "late", "early", "other-rows", "reference",
]  # fmt: skip
Factors = tuple[Tensor, ...]
"""By row, float64 (length,)."""
KINDS = ("logprobs", "sampling_logprobs")
"""Of log-probabilities: of the whole vocabulary, and as the latest generate sampled."""

_PAPER = LossConfig()
_CLIPS = ((0.2, 0.2), (0.2, 0.28), (0.1, 0.1), (0.3, 0.3))
_CUT = 1e-3
"""Of a ratio, by which a bound must have changed it."""
_LEAST = 3
"""Tokens that a mistaken ratio must tell apart from others of their completion."""
_SMALL = 0.05
"""Of a log-probability, below which dividing by it is no exact number."""


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What else was recorded of a row, by the kind of logprobs, (length,). ``own``: the policy's.
    ``reference``, ``old``: log of their probabilities by the policy's."""

    own: dict[str, Tensor]
    reference: dict[str, Tensor]
    old: dict[str, Tensor]


def known_of(case: Case, row: TrainedRow) -> Known:
    """The policy's logprobs of a row, against the reference's and those of the sampling policy."""
    held = rows_in(case, row.forward)
    own = logprobs_of(row.forward, held[row.at], row.completion)
    reference: dict[str, Tensor] = {}
    old: dict[str, Tensor] = {}
    for forward, scores in scored_without_gradient(case, row.completion):
        into = reference if is_reference(forward) else old
        for name in own.keys() & scores.keys():
            # the earliest: later ones may be of a policy that has moved
            into.setdefault(name, scores[name] - own[name])
    sampled = row.completion.call.logprobs
    for name in KINDS[::-1]:
        if sampled is not None and name in own and name not in old:
            given = sampled[row.completion.at, : row.end].double()
            if len(given) == row.end:
                old[name] = given - own[name]
    return Known(own, reference, old)


def is_reference(forward: ForwardCall) -> bool:
    """Whether a forward without a gradient is certainly another policy's."""
    return not forward.own or forward.modes.adapter == "off"


def ratios_of(known: Sequence[Known], kind: str) -> Factors | None:
    """To the policy that sampled; ``None`` where some are not known."""
    if not all(kind in one.old for one in known):
        return None
    return tuple((-one.old[kind]).exp() for one in known)


# --------------------------------------------------------------------------- as they are meant


def meant(
    rows: Sequence[TrainedRow], ratios: Factors, hidden: bool
) -> Iterator[tuple[Ratio, Factors]]:
    """``hidden``: whether another term hides which tokens are clipped, and by how much others are
    bounded. Otherwise a clipped one has no weight."""
    yield "token", ratios
    yield "bounded", _within(rows, ratios)
    yield "gated", _gated(rows, ratios)
    for low, high in _CLIPS if hidden else ():
        yield "clipped", _clipped(rows, ratios, low, high)
        yield "bounded", tuple(ratio.clamp(max=1 + high) for ratio in ratios)
        yield "bounded", tuple(ratio.clamp(1 - low, 1 + high) for ratio in ratios)


def _clipped(rows: Sequence[TrainedRow], ratios: Factors, low: float, high: float) -> Factors:
    """Ratios, 0 where clipping removes the gradient: too large where it is pushed up, too small
    where it is pushed down."""
    found = []
    for row, ratio in zip(rows, ratios, strict=True):
        off = ratio > 1 + high if _pushed_up(row) else ratio < 1 - low
        found.append(torch.where(off, 0.0, ratio))
    return tuple(found)


def _gated(rows: Sequence[TrainedRow], ratios: Factors) -> Factors:
    """Slopes of sapo's gate by the token's logprob, at the temperatures of its paper."""
    found = []
    for row, ratio in zip(rows, ratios, strict=True):
        tau = _PAPER.sapo_temperature_pos if _pushed_up(row) else _PAPER.sapo_temperature_neg
        gate = torch.sigmoid(tau * (ratio - 1))
        found.append(4 * gate * (1 - gate) * ratio)
    return tuple(found)


def _pushed_up(row: TrainedRow) -> bool:
    middle = float(row.level)
    return middle < 0 or (middle == 0 and float(row.own_weights.sum()) < 0)


def _within(rows: Sequence[TrainedRow], ratios: Factors) -> Factors:
    """Ratios held within the bounds that the weights of tokens show."""
    bounds = [-math.inf, math.inf]
    for row, ratio in zip(rows, ratios, strict=True):
        kept = row.counted[: row.end]
        if not bool(kept.any()):
            continue
        own = row.own_weights[kept]
        seen = own / (own / ratio[kept]).median()
        for at, cut in enumerate(
            (seen > ratio[kept] * (1 + _CUT), seen < ratio[kept] * (1 - _CUT))
        ):
            if bool(cut.any()):
                bounds[at] = float(seen[cut].median())
    return tuple(ratio.clamp(*bounds) for ratio in ratios)


# --------------------------------------------------------------------------- mistaken


def mistaken(
    rows: Sequence[TrainedRow], known: Sequence[Known], allowed: float
) -> tuple[Ratio, Tensor, Factors] | None:
    """What is no ratio of the token to what sampled it and gives every weight of a completion, up
    to ``allowed`` of each, with the rows' numbers that it is to be multiplied by."""
    for kind in KINDS:
        own = [one.own[kind] for one in known if kind in one.own]
        if len(own) < len(known):
            continue
        olds = [n + k.old[kind] if kind in k.old else n for n, k in zip(own, known, strict=True)]
        for ratio, factors in _mistaken(own, olds):
            if (weights := _multiples(rows, factors, allowed)) is not None:
                return ratio, weights, factors
    return None


def against_the_reference(
    rows: Sequence[TrainedRow], known: Sequence[Known], allowed: float
) -> tuple[Tensor, Factors] | None:
    """As :func:`mistaken`, of ratios to the reference in place of the policy that sampled. Clipped
    tokens have no weight."""
    for kind in KINDS:
        if all(kind in one.reference for one in known):
            factors = tuple((-one.reference[kind]).exp() for one in known)
            if (weights := _multiples(rows, factors, allowed)) is not None:
                return weights, factors
    return None


def _mistaken(own: list[Tensor], olds: list[Tensor]) -> Iterator[tuple[Ratio, Factors]]:
    """NaN where a token's is not known."""
    both = [*zip(own, olds, strict=True)]
    # its derivative is minus itself
    yield "inverted", tuple(-(old - new).exp() for new, old in both)
    yield "probability", tuple(new.exp() for new in own)
    yield "logarithms", tuple(torch.where(old < -_SMALL, 1 / old, torch.nan) for old in olds)
    yield "late", tuple((new - _beside(old, 1)).exp() for new, old in both)
    yield "early", tuple((new - _beside(old, -1)).exp() for new, old in both)
    longest = max(map(len, own))
    whole = [torch.nn.functional.pad(old, (0, longest - len(old)), value=torch.nan) for old in olds]
    for by in range(1, len(own)):
        others = zip(own, whole[-by:] + whole[:-by], strict=True)
        yield "other-rows", tuple((new - other[: len(new)]).exp() for new, other in others)


def _beside(values: Tensor, by: int) -> Tensor:
    """Each value at the place ``by`` later; NaN where none comes from."""
    moved = values.roll(by)
    moved[0 if by > 0 else -1] = torch.nan
    return moved


def _multiples(rows: Sequence[TrainedRow], factors: Factors, allowed: float) -> Tensor | None:
    weights, told = [], 0
    for row, factor in zip(rows, factors, strict=True):
        kept = row.counted[: row.end] & factor.isfinite() & (factor != 0)
        times, by = row.own_weights[kept] / factor[kept], factor[kept]
        one = times.median() if len(times) else times.new_zeros(())
        if len(times) and float((times - one).abs().max()) > allowed * float(one.abs()):
            return None
        told += int(((by / by.median() - 1).abs() > 10 * allowed).sum()) if len(by) else 0
        weights.append(one)
    return torch.stack(weights) if told >= _LEAST else None
