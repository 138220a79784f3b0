"""Weights of tokens beside an entropy, whose share of a loss's gradient hides them.

An entropy term adds ``c dH/dl = -(c / T) p (log p + H)`` at the logits of a position, so that the
gradient of every token but ``y``, by its probability, is a line in ``log p`` of slope ``-c / T``.
``c`` is one number for all tokens of a row, told by all of them; the temperature is one of those
that are known. What is left without it is read as the gradient of any other loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from omni_grpo_core.recorder.token_weights import (
    Projection,
    TokenWeights,
    at_hidden,
    at_logits,
    chunks,
)

_LEFT, _EXPLAINED = 3e-5, 0.1
"""Of a float32 gradient what is left from which an entropy is tried, and of that what one leaves;
16 bits leave 2**-8 of every gradient."""
_ROUNDED, _UNREAD = 1e-2, 0.3
"""What a row's c, told by few tokens, may leave of an entropy's gradient, and the residual of what
is left that shows it to be no token's."""
_LIGHT = 1e-3
"""Of c, a weight that rounding of an entropy may leave: log-probabilities of 10 times 1e-4 of c."""


def weights_at_logits(
    logits: Tensor, gradient: Tensor, where: tuple[Tensor, ...], following: Tensor,
    temperatures: Sequence[float],
) -> TokenWeights:  # fmt: skip
    """``logits``, ``gradient``: (N, K, V); ``where``: rows and columns of the P positions to be
    read; ``following``: (P,), the next token of the sequence, -1 where there is none."""
    rows, columns = where
    parts = chunks(len(rows), logits.shape[-1])

    def taken(at: slice) -> tuple[Tensor, Tensor]:
        return logits[rows[at], columns[at]], gradient[rows[at], columns[at]]

    def beside(temperature: float) -> TokenWeights:
        ids = torch.stack([following, found.tokens], 1)
        c = _of_rows((_told_at_logits(*taken(at), ids[at], temperature) for at in parts), rows)
        read = []
        for at in parts:
            scores, g = taken(at)
            left = g.float() - _made_at_logits(scores, g, c[at], temperature)
            one = at_logits(scores, left, following[at])
            read.append(_beside(one, c[at], _share(left, g)))
        return TokenWeights.joined(read)

    found = TokenWeights.joined([at_logits(*taken(at), following[at]) for at in parts])
    return _better(found, gradient.dtype, temperatures, beside)


def weights_at_hidden(
    hidden: Tensor, gradient: Tensor, rows: Tensor, near: Tensor, head: Tensor,
    temperatures: Sequence[float],
) -> TokenWeights:  # fmt: skip
    """``hidden``, ``gradient``: (P, H), of the head's input; ``rows``: (P,); ``near``: (P, M), the
    next token of the sequence and others that may be y, -1 where there is none; ``head``: (V, H).
    """
    g, parts = gradient.float(), chunks(len(rows), len(head))

    def beside(temperature: float) -> TokenWeights:
        known = [Projection(hidden[at], g[at], near[at], head) for at in parts]
        told = [
            _told_at_hidden(one, found.tokens[at], temperature)
            for one, at in zip(known, parts, strict=True)
        ]
        c = _of_rows(told, rows)
        made = [_spread(one, temperature) for one in known]
        left = g - c[:, None] * torch.cat(made)
        one = at_hidden(hidden, left, near, head, (temperature,))
        return _beside(one, c, _share(left, g))

    found = at_hidden(hidden, gradient, near, head, temperatures)
    return _better(found, gradient.dtype, temperatures, beside)


# --------------------------------------------------------------------------- the entropy's weight


def _told_at_logits(
    logits: Tensor, gradient: Tensor, ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """c of each position by itself, times a certainty, and that; (P,) each. ``ids``: (P, M) that
    may be y."""
    logp, _ = _away(logits, gradient, temperature)
    others = (gradient.abs() >= torch.finfo(gradient.dtype).tiny) & logp.isfinite()
    others = others.scatter(-1, ids.clamp(min=0), False)
    slope = gradient.float() / logp.exp() * temperature
    gap = logp - torch.where(others, logp, 0.0).sum(-1, keepdim=True) / others.sum(-1, keepdim=True)
    gap = torch.where(others, gap, 0.0)
    return -(gap * torch.where(others, slope, 0.0)).sum(-1), gap.square().sum(-1)


def _made_at_logits(logits: Tensor, gradient: Tensor, c: Tensor, temperature: float) -> Tensor:
    """(P, V): the gradient of entropies that count ``c`` (P,)."""
    logp, away = _away(logits, gradient, temperature)
    return torch.where(away.isfinite(), -c[:, None] / temperature * logp.exp() * away, 0.0)


def _away(logits: Tensor, gradient: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the ids that are in the softmax, and by how much they are above their
    mean, -H; -inf of all others."""
    scores = logits.float() / temperature
    logp = scores.masked_fill((gradient == 0) | ~scores.isfinite(), -torch.inf).log_softmax(-1)
    mean = torch.where(logp.isfinite(), logp.exp() * logp, 0.0).sum(-1, keepdim=True)
    return logp, logp - mean


def _told_at_hidden(known: Projection, y: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same at the input of a head; ``y``: (P,)."""
    spread = _spread(known, temperature)
    near = (known.near == y[:, None]).to(torch.int8).argmax(-1)
    token = known.directions(1 / temperature)[torch.arange(len(near), device=near.device), near]
    common = (token * spread).sum(-1, keepdim=True) / token.square().sum(-1, keepdim=True)
    rest = (spread - common * token) / known.g.square().sum(-1, keepdim=True)
    return (rest * known.g).sum(-1), (rest * spread).sum(-1)


def _spread(known: Projection, temperature: float) -> Tensor:
    """(P, H): the gradient of the entropy at each position."""
    logp = (known.logits / temperature).log_softmax(-1)
    p = logp.exp()
    total, mean = known.without_likeliest(p * (logp - (p * logp).sum(-1, keepdim=True)))
    likeliest = known.head[known.near[:, 0].clamp(min=0)].float()
    return (total[:, None] * likeliest - mean) / temperature


def _of_rows(told: Iterable[tuple[Tensor, Tensor]], rows: Tensor) -> Tensor:
    """(P,): c of each position's row."""
    by, certain = (torch.cat(parts) for parts in zip(*told, strict=True))
    sums = [one.new_zeros(int(rows.max()) + 1).index_add_(0, rows, one) for one in (by, certain)]
    return (sums[0] / sums[1]).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)[rows]


# --------------------------------------------------------------------------- what is left


def _share(left: Tensor, gradient: Tensor) -> Tensor:
    sizes = [torch.linalg.vector_norm(one.float(), dim=-1) for one in (left, gradient)]
    share: Tensor = sizes[0] / sizes[1]
    return share


def _beside(read: TokenWeights, c: Tensor, share: Tensor) -> TokenWeights:
    """What was read of a gradient without the entropy's, which is the ``share`` (P,) of it."""
    # nothing but an entropy: what rounding, and that of c, leaves is the weight of no token
    unread = (share <= _ROUNDED) & ~(read.residual <= _UNREAD)
    alone = unread | ~(read.weights.abs() > _LIGHT * c.abs())
    return TokenWeights(
        tokens=read.tokens.masked_fill(alone, -1),
        weights=read.weights.masked_fill(alone, 0.0),
        temperature=read.temperature.masked_fill(alone, torch.nan),
        residual=torch.where(alone, share, read.residual * share),
        entropy=c,
    )


def _better(
    found: TokenWeights, dtype: torch.dtype, temperatures: Sequence[float],
    beside: Callable[[float], TokenWeights],
) -> TokenWeights:  # fmt: skip
    """What is read beside an entropy, where that explains what weights of tokens do not: of noise
    some is always nearer to one."""
    limit = _LEFT if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    if bool((found.residual <= limit).all()):
        return found
    ways = [found, *map(beside, temperatures)]
    left = [float(one.residual.nan_to_num(nan=1.0).mean()) for one in ways]
    least = min(range(1, len(ways)), key=left.__getitem__)
    return ways[least] if left[least] <= _EXPLAINED * left[0] else found
