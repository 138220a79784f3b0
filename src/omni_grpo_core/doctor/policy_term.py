"""The weights of a loss taken apart: one number per completion, and what varies along it.

On the first update a policy's own term has one weight for all tokens of a completion. A KL term
adds ``beta (1 - exp(reference - logprob))`` to each, by the same divisor; ratios to the policy that
sampled multiply each, and clipping makes some 0. Which of these gives the weights is tried, the
simplest first, and last what somebody may mistake for a ratio.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.loss_rows import UNREAD, TrainedRow, trained_rows
from omni_grpo_core.doctor.ratios import (
    KINDS,
    Factors,
    Ratio,
    against_the_reference,
    known_of,
    meant,
    mistaken,
    ratios_of,
)

CONSTANT, PROJECTED, ROUNDED = 1e-4, 1e-3, 3e-2
"""Spread of equal weights along a completion, by the largest of the step: read at float32 they
agree to 1e-6 on the tiny checkpoint, read at a head's input, by a projection, to 1e-4;
16 bits leave 2**-8 of each and of its temperature."""
_ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Of the largest weight: what is left of others by rounding."""
_FITS = 0.03
"""Of a term's size, what its reproduction from recorded logprobs may leave: they are those of the
whole vocabulary, where a trainer may have left ids out."""
_CLEAR = 0.2
"""Of a spread below that of equal weights, what a KL that explains it may leave."""
_SURE = 4
"""Deviations of the weight of a KL beyond which it does not lie."""
_MULTIPLE = 1e-3
"""Of a token's weight, by which a mistaken ratio may miss it: a log-probability of 100 is good to
1e-5, and 1 / -0.05 to 1e-4."""


@dataclass(frozen=True, slots=True, eq=False)
class PolicyTerm:
    """``weights``: float64 (R,), of the policy's term by row. ``ratio``: by what they are
    multiplied along a completion: nothing, the ratio of each token, clipped where that has no
    gradient, or bounded; or by what was mistaken for it. ``kl``: weight of the KL term times the
    row's divisor, in units of ``divisor``; ``None`` where there is none. ``divisor``: that which
    makes it one number. ``estimator``: of the KL. ``varies``: whether something that was
    not found is left. ``factors``: of each row's tokens up to its end, what ``ratio`` names; none
    where that is 1."""

    rows: tuple[TrainedRow, ...]
    weights: Tensor
    eos_left_out: bool
    ratio: Ratio = "none"
    kl: float | None = None
    divisor: str = ""
    estimator: str = ""
    varies: bool = False
    factors: Factors = ()


def policy_term(case: Case) -> PolicyTerm | None:
    """``None`` where nothing could be read."""
    return case.once(_policy_term)


def _policy_term(case: Case) -> PolicyTerm | None:
    rows = tuple(row for row in trained_rows(case) if not bool((row.residual > UNREAD).any()))
    if not rows:
        return None
    eos_left_out = leaves_eos_out(rows)
    plain = torch.stack([row.level for row in rows])
    plain_term = PolicyTerm(rows, plain, eos_left_out)
    size = max(float(row.own_weights.abs().max()) for row in rows if row.end)
    projected = any(not row.forward.logits_dtype for row in rows)
    exact = PROJECTED if projected else CONSTANT
    allowed = (exact if all(row.exact for row in rows) else ROUNDED) * size
    if all(_spread(row) <= allowed for row in rows):
        return _slight_kl(case, rows, eos_left_out) or plain_term
    best = None
    for found, left in _explained(case, rows, eos_left_out):
        if left <= max(allowed, _FITS * max(map(_spread, rows))) and (
            best is None or left < best[1] / 3
        ):
            best = found, left
    known = [known_of(case, row) for row in rows]
    closely = _MULTIPLE if all(row.exact for row in rows) else ROUNDED
    # with few rows, a number fitted for a KL gives whatever a ratio without one gives
    whole = best is not None and best[0].kl is None
    if not whole and (other := against_the_reference(rows, known, closely)) is not None:
        return PolicyTerm(rows, other[0], eos_left_out, "reference", factors=other[1])
    if best is not None:
        return best[0]
    if wrong := mistaken(rows, known, closely):
        ratio, weights, factors = wrong
        return PolicyTerm(rows, weights, eos_left_out, ratio, factors=factors)
    return PolicyTerm(rows, plain, eos_left_out, varies=True)


def _slight_kl(case: Case, rows: tuple[TrainedRow, ...], eos_left_out: bool) -> PolicyTerm | None:
    """A KL so slight that weights along a completion are nearly equal."""
    fits = [
        (left, term)
        for term, left in _explained(case, rows, eos_left_out)
        if term.kl is not None and term.ratio == "none"
    ]
    left, best = min(fits, key=lambda one: one[0], default=(0.0, None))
    spare = sum(max(len(row.counting) - 1, 0) for row in rows)
    return best if spare > 1 and left < _CLEAR * max(map(_spread, rows)) else None


def most_beta(case: Case, term: PolicyTerm) -> float:
    """The largest beta that weights which follow their ratios leave possible, for a KL to what was
    recorded of the reference; infinite where they say nothing."""
    rows = term.rows
    known = [known_of(case, row).reference for row in rows]
    factors = term.factors or _ones(rows)
    longest = max(len(row.tokens) - row.lead for row in rows)
    found: list[float] = []
    for name in ("logprobs", "sampling_logprobs"):
        gaps = [one[name] for one in known if name in one]
        if len(gaps) < len(rows):
            continue
        for slopes in _estimates(gaps).values():
            whole = noise = slope = 0.0
            spare = -1
            for row, factor, given in zip(rows, factors, slopes, strict=True):
                kept = row.counted[: row.end] | (factor == 0)
                if int(kept.sum()) < 2:
                    continue
                own, by = (_apart(v[kept], factor[kept]) for v in (row.own_weights, given))
                whole, slope = whole + float(by.square().sum()), slope + float((own * by).sum())
                noise, spare = noise + float(own.square().sum()), spare + len(own) - 1
            if spare < 1 or not whole:
                return math.inf
            kl = abs(slope) / whole + _SURE * math.sqrt(noise / spare / whole)
            found.append(kl * len(rows) * longest)
    return max(found, default=math.inf)


def _ones(rows: tuple[TrainedRow, ...]) -> Factors:
    return tuple(torch.ones(row.end, dtype=torch.float64) for row in rows)


def _apart(values: Tensor, by: Tensor) -> Tensor:
    """What of the values is no multiple of ``by``."""
    return values - by * (values * by).sum() / by.square().sum().clamp(min=1e-30)


def _estimates(gaps: list[Tensor]) -> dict[str, list[Tensor]]:
    """Gradients of a KL by the token's logprob, of ``reference - policy``."""
    return {
        "k3": [1 - gap.exp() for gap in gaps],
        "k2": [-gap for gap in gaps],
        "k3 bounded": [_bounded(gap) for gap in gaps],
        "k3 turned": [(-gap).exp() - 1 for gap in gaps],
    }


def leaves_eos_out(rows: tuple[TrainedRow, ...]) -> bool:
    """Whether every completion that ended and counts counts up to its eos, without it."""
    ended = [
        row.counted[: row.end]
        for row in rows
        if bool(row.counted[: row.end].any()) and row.ended and row.end > 1
    ]
    return bool(ended) and all(bool(kept[:-1].all()) and not bool(kept[-1]) for kept in ended)


def _spread(row: TrainedRow) -> float:
    own = row.counting
    return float(own.max() - own.min()) if len(own) else 0.0


def _explained(
    case: Case, rows: tuple[TrainedRow, ...], eos_left_out: bool
) -> Iterator[tuple[PolicyTerm, float]]:
    """Ways to make the weights from what else was recorded, with what each leaves of them."""
    known = [known_of(case, row) for row in rows]
    for name in KINDS:
        gaps = [gap for one in known if (gap := one.reference.get(name)) is not None]
        estimates = _estimates(gaps)
        ratios: list[tuple[Ratio, Factors]] = [("none", _ones(rows))]
        plain = ratios_of(known, name)
        if plain is not None and any(bool((ratio != 1).any()) for ratio in plain):
            ratios += meant(rows, plain, hidden=bool(gaps))
            # k3 times the ratio, whose own gradient counts (DeepSeek-V3.2, arXiv 2512.02556)
            estimates["k3 weighted"] = [-gap * by for gap, by in zip(gaps, plain, strict=False)]
        for ratio, factors in ratios:
            if ratio != "none":
                weights, left = _fitted(rows, factors)
                yield PolicyTerm(rows, weights, eos_left_out, ratio, factors=factors), left
            if len(gaps) == len(rows):
                for estimator, terms in estimates.items():
                    for divisor in ("sequence", "uniform"):
                        weights, kl, left = _with_kl(rows, factors, terms, divisor)
                        term = PolicyTerm(
                            rows, weights, eos_left_out, ratio, kl, divisor, estimator,
                            factors=factors,
                        )  # fmt: skip
                        yield term, left


def _bounded(gap: Tensor) -> Tensor:
    """The slope of k3 where gaps beyond 20 and values beyond 10 are cut, as some trainers do."""
    cut = (gap.abs() > 20) | (gap.exp() - gap - 1 > 10)
    return torch.where(cut, 0.0, 1 - gap.exp())


def _fitted(rows: tuple[TrainedRow, ...], factors: Factors) -> tuple[Tensor, float]:
    weights, left = [], 0.0
    for row, factor in zip(rows, factors, strict=True):
        kept = row.counted[: row.end] | (factor == 0)
        own, by = row.own_weights[kept], factor[kept]
        level = (own * by).sum() / by.square().sum().clamp(min=1e-30)
        weights.append(level)
        left = max(left, float((own - level * by).abs().max()) if len(own) else 0.0)
    return torch.stack(weights), left


def _with_kl(
    rows: tuple[TrainedRow, ...], factors: Factors, terms: list[Tensor], divisor: str
) -> tuple[Tensor, float, float]:
    """Weights of the rows, that of the term in all of them, and what is left."""
    parts = []
    size = max((float(row.own_weights.abs().max()) for row in rows if row.end), default=0.0)
    for row, factor, term in zip(rows, factors, terms, strict=True):
        kept = row.counted[: row.end]
        own, by = row.own_weights[kept], factor[kept]
        # a token whose KL has no slope counts, and may have no weight
        length = int((kept | (term == 0)).sum()) if divisor == "sequence" else 1
        given = term[kept] / max(length, 1)
        square = by.square().sum().clamp(min=1e-30)
        parts.append((own, by, given, square, _apart(own, by), _apart(given, by)))
    whole = sum(float(p[5].square().sum()) for p in parts)
    kl = sum(float((p[4] * p[5]).sum()) for p in parts) / whole if whole else 0.0
    left = max(float((p[4] - kl * p[5]).abs().max()) if len(p[4]) else 0.0 for p in parts)
    weights = torch.stack([((p[0] - kl * p[2]) * p[1]).sum() / p[3] for p in parts])
    # what is left of a row without an advantage is as good as the fit
    rest = torch.where(weights.abs() <= max(left, _ROUNDING * size), 0.0, weights)
    return rest, kl, left
