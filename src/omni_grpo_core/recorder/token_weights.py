"""The loss's weight on every token, solved from its gradient at the logits or at the head's input.

A loss that is a function of the chosen tokens' log-probabilities has at the logits ``l`` of a
position the gradient ``g = (w / T) (e_y - p)`` with ``p = softmax(l / T)``:

* ``y`` is the one token that is pushed the other way than all others. The next token of the
  sequence is taken wherever it can be: that decides between two, and where ``g_y`` rounded to 0.
* ``log |g_v|`` of the others is a line in ``l_v`` of slope ``1 / T``.
* ``w / T`` is minus the sum of the others' gradients by the sum of their probabilities. ``g_y``
  itself is ``w / T`` times ``1 - p_y``, of which nothing is left in a rounded number where the
  model is sure of its token.

An entropy term adds ``c dH/dl = -(c / T) p (log p + H)``: where ``y`` alone leaves something, both
are solved for, at a temperature that is known.

At the input of a head with weights ``W`` the gradient is ``(w / T) W.T (e_y - p)``: one number per
position is then solved for, by projection, and ``T`` is that of the smallest residual.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LEFT, _EXPLAINED = 3e-5, 0.1
"""Of a float32 gradient what is left from which an entropy is tried, and of that what one leaves;
16 bits leave 2**-8 of every gradient."""
_CHUNK_ELEMENTS = 1 << 23
"""Logits in float32 at a time: 32 MiB, and a few times that for what is made of them."""
_PROBES = 32
"""Positions by which the temperature is fitted where there are no logits."""
_ROUNDS = 6
"""Newton steps from each candidate; from a tenth off, four reach float32's precision."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenWeights:
    """Of P positions, (P,): ``tokens`` y, int64; ``weights`` w, ``temperature`` T (NaN where it
    cannot be told, as is then w) and ``residual``, the part of ``|g|`` that is left, float32.
    ``entropy``: c, the loss's derivative by the entropy, 0 where it explains nothing."""

    tokens: Tensor
    weights: Tensor
    temperature: Tensor
    residual: Tensor
    entropy: Tensor

    @staticmethod
    def joined(parts: Sequence[TokenWeights]) -> TokenWeights:
        return TokenWeights(
            *(torch.cat([getattr(part, name) for part in parts]) for name in TokenWeights.__slots__)
        )


def chunks(positions: int, width: int) -> list[slice]:
    """Slices of positions whose float32 logits fit into one chunk."""
    step = max(1, _CHUNK_ELEMENTS // width)
    return [slice(begin, begin + step) for begin in range(0, positions, step)]


def at_logits(
    logits: Tensor, gradient: Tensor, following: Tensor, temperatures: Sequence[float] = ()
) -> TokenWeights:
    """``logits``, ``gradient``: (P, V) of one dtype. ``following``: (P,), the next token of the
    sequence, -1 where there is none. ``temperatures``: those at which an entropy is tried.

    By hand: two tokens beside y with probabilities 1/4 each, and a loss of minus its logprob.

    >>> half = torch.tensor([[0.5, 0.25, 0.25]])
    >>> read = at_logits(half.log(), half - torch.tensor([[1.0, 0, 0]]), torch.tensor([0]))
    >>> read.tokens.item(), read.weights.item(), read.temperature.isnan().item()
    (0, nan, True)
    """
    smallest = torch.finfo(gradient.dtype).tiny
    rounding = torch.finfo(gradient.dtype).eps
    own, g = _chosen(gradient, following), gradient.float()
    others = g.scatter(-1, own[:, None], 0.0)
    seen = (others.abs() >= smallest) & logits.isfinite()
    scores = logits.float().masked_fill(~logits.isfinite(), 0.0)
    inverse, offset = line(scores, others.abs().log(), seen)
    scores *= inverse[:, None]
    # rounded to 0, not left out of the softmax; the chosen token is in it even if its gradient is 0
    lost = ~seen & (scores + offset[:, None] < math.log(smallest)) & logits.isfinite()
    inside = (seen | lost).scatter(-1, own[:, None], True)
    del lost, seen
    p = scores.masked_fill_(~inside, -torch.inf).softmax(-1).scatter_(-1, own[:, None], 0.0)
    rest = p.sum(-1)
    scale = -others.sum(-1) / rest
    off = others.addcmul_(p, scale[:, None]).square_().sum(-1)
    # what is left of g_y is as good as the rounding of the logprob it was made from
    largest = (logits.gather(-1, own[:, None])[:, 0].float() * inverse).abs() + 1
    at_own = (g.gather(-1, own[:, None])[:, 0] - scale * rest).abs()
    off += (at_own - 4 * rounding * largest * scale.abs()).clamp(min=0.0).square()
    norm = torch.linalg.vector_norm(g, dim=-1)
    residual = off.sqrt() / norm
    found = TokenWeights(own, scale / inverse, 1 / inverse, residual, torch.zeros_like(residual))
    limit = _LEFT if gradient.dtype == torch.float32 else 16 * rounding
    odd = (~(residual <= limit)).nonzero().flatten() if temperatures else ()
    if len(odd):
        ids = torch.stack([following[odd].clamp(min=0), own[odd]], 1)
        tried = _with_entropy(logits[odd].float(), g[odd], ids, temperatures)
        # an entropy gives all of a gradient, or none: noise of 16 bits is nearer to one as well
        most = (_EXPLAINED * residual[odd].nan_to_num(nan=1.0)).clamp(max=limit)
        better = tried.residual <= most
        for name in TokenWeights.__slots__:
            getattr(found, name)[odd[better]] = getattr(tried, name)[better]
    return found


def _with_entropy(
    logits: Tensor, g: Tensor, ids: Tensor, temperatures: Sequence[float]
) -> TokenWeights:
    """With the token among ``ids`` (P, M), and the temperature, that leave least."""
    tried = [
        _token_and_entropy(logits / temperature, g, own, temperature)
        for temperature in dict.fromkeys(temperatures)
        for own in ids.unbind(1)
    ]
    best = torch.stack([one.residual for one in tried]).nan_to_num(nan=torch.inf).argmin(0)
    every = torch.arange(len(best), device=best.device)
    return TokenWeights(
        *(
            torch.stack([getattr(one, name) for one in tried])[best, every]
            for name in TokenWeights.__slots__
        )
    )


def _token_and_entropy(scores: Tensor, g: Tensor, own: Tensor, temperature: float) -> TokenWeights:
    """Both weights by least squares; ``scores``: logits by the temperature."""
    there = (g != 0).scatter(-1, own[:, None], True) & scores.isfinite()
    logp = scores.masked_fill(~there, -torch.inf).log_softmax(-1)
    p, logp = logp.exp(), logp.masked_fill(~there, 0.0)
    token = (-p).scatter_add_(-1, own[:, None], torch.ones_like(p[:, :1]))
    spread = -p * (logp - (p * logp).sum(-1, keepdim=True))
    # without what the two have in common: of a sure distribution they are nearly the same
    size = token.square().sum(-1, keepdim=True)
    common = (token * spread).sum(-1, keepdim=True) / size
    rest = spread - common * token
    c = (rest * g).sum(-1, keepdim=True) / rest.square().sum(-1, keepdim=True)
    w = ((token * g).sum(-1, keepdim=True)) / size - c * common
    off = (g - w * token - c * spread).norm(dim=-1)
    w, c = w[:, 0], c[:, 0]
    # either is as good as the rounding of the logprobs it was made from
    largest = scores.masked_fill(~there, 0.0).abs().amax(-1) + 1
    rounding = 8 * torch.finfo(g.dtype).eps * largest * (w.abs() + c.abs())
    norm = g.norm(dim=-1)
    # two large weights that cancel: rounding alone is as large as what they are to explain
    left = ((off - rounding).clamp(min=0.0) / norm).masked_fill(rounding > _EXPLAINED * norm, 1.0)
    warm = torch.full_like(w, temperature)
    return TokenWeights(own, w * temperature, warm, left, c * temperature)


def _chosen(g: Tensor, following: Tensor) -> Tensor:
    """(P,): y."""
    up, down = (g > 0).sum(-1), (g < 0).sum(-1)
    there = g.gather(-1, following.clamp(min=0)[:, None])[:, 0]
    fits = torch.where(
        there > 0, up == 1, torch.where(there < 0, down == 1, (up == 0) | (down == 0))
    )
    return torch.where(fits & (following >= 0), following, g.abs().argmax(-1))


def line(x: Tensor, y: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """(slope, offset), (P,), of ``y`` over ``x`` where ``seen``; NaN where ``x`` does not vary."""
    count = seen.sum(-1)
    x0 = torch.where(seen, x, 0.0).sum(-1) / count
    y0 = torch.where(seen, y, 0.0).sum(-1) / count
    gap = torch.where(seen, x - x0[:, None], 0.0)
    spread = gap.square().sum(-1)
    slope = (gap * torch.where(seen, y - y0[:, None], 0.0)).sum(-1) / spread
    slope = torch.where((spread > 1e-6 * count) & (slope > 0), slope, torch.nan)
    return slope, y0 - slope * x0


def at_hidden(
    hidden: Tensor, gradient: Tensor, near: Tensor, head: Tensor, temperatures: Sequence[float]
) -> TokenWeights:
    """``hidden``, ``gradient``: (P, H), of the head's input. ``near``: (P, M) ids among which y is,
    the likeliest first, -1 where there is none. ``head``: (V, H). ``temperatures``: candidates; the
    one that explains most is refined, and is that of all positions."""
    g = gradient.float()
    probes = g.norm(dim=-1).topk(min(_PROBES, len(g))).indices
    known = _Projection(hidden[probes], g[probes], near[probes], head)
    fitted = [known.refined(1 / t) for t in dict.fromkeys(temperatures)]
    missed = torch.stack([miss for _, miss in fitted])
    inverse = torch.stack([found for found, _ in fitted])[missed.argmin()]
    parts = []
    for at in chunks(len(g), len(head)):
        one = _Projection(hidden[at], g[at], near[at], head)
        scale, direction, own = one.explained(inverse)
        off = (one.g - scale[:, None] * direction).norm(dim=-1) / one.g.norm(dim=-1)
        warm = (1 / inverse).expand_as(scale)
        parts.append(TokenWeights(own, scale / inverse, warm, off, torch.zeros_like(scale)))
    return TokenWeights.joined(parts)


class _Projection:
    """Gradients at the head's input of P positions, explained by one inverse temperature."""

    def __init__(self, hidden: Tensor, g: Tensor, near: Tensor, head: Tensor) -> None:
        self.g, self._near, self._head = g, near, head
        self._logits = (hidden.to(head.dtype) @ head.T).float()

    def explained(self, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``w / T`` (P,), ``W.T (e_y - p)`` (P, H) and y (P,), with the y that leaves least."""
        p = self._softmax(inverse)
        ids = self._near.clamp(min=0)
        vectors = self._head[ids].float()
        share = p.gather(-1, ids)
        # without the likeliest token, whose own vector would cancel what the others are
        p = p.scatter(-1, ids[:, :1], 0.0)
        mean = (p.to(self._head.dtype) @ self._head).float()
        directions = vectors - (mean + share[:, :1] * vectors[:, 0])[:, None]
        directions[:, 0] = p.sum(-1)[:, None] * vectors[:, 0] - mean
        scales = (self.g[:, None] * directions).sum(-1) / directions.square().sum(-1)
        left = (self.g[:, None] - scales[..., None] * directions).norm(dim=-1)
        best = left.masked_fill(self._near < 0, torch.inf).argmin(-1)
        rows = torch.arange(len(best), device=best.device)
        return scales[rows, best], directions[rows, best], ids[rows, best]

    def refined(self, inverse: float) -> tuple[Tensor, Tensor]:
        """The inverse temperature near this one that leaves least, by Gauss-Newton, and the part of
        the gradients that it leaves."""
        beta = self.g.new_tensor(inverse)
        for _ in range(_ROUNDS):
            scale, direction, _ = self.explained(beta)
            p = self._softmax(beta)
            around = self._logits - (p * self._logits).sum(-1, keepdim=True)
            slope = -((p * around).to(self._head.dtype) @ self._head).float()
            along = (slope * direction).sum(-1) / direction.square().sum(-1)
            slope = scale[:, None] * (slope - along[:, None] * direction)
            left = self.g - scale[:, None] * direction
            step = (left * slope).sum() / slope.square().sum()
            beta = beta * (step / beta).clamp(-0.3, 0.3).nan_to_num().exp()
        scale, direction, _ = self.explained(beta)
        return beta, (self.g - scale[:, None] * direction).square().sum()

    def _softmax(self, inverse: Tensor) -> Tensor:
        return (self._logits * inverse).softmax(-1)
