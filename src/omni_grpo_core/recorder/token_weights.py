"""The loss's weight on every token, solved from its gradient at the logits or at the head's input.

A loss that is a function of the chosen tokens' log-probabilities has at the logits ``l`` of a
position the gradient ``g = (w / T) (e_y - p)`` with ``p = softmax(l / T)``:

* ``y`` is the one token that is pushed the other way than all others. The next token of the
  sequence is taken wherever it can be: that decides between two, and where ``g_y`` rounded to 0.
* ``log |g_v|`` of the others is a line in ``l_v`` of slope ``1 / T``.
* ``w / T`` is minus the sum of the others' gradients by the sum of their probabilities. ``g_y``
  itself is ``w / T`` times ``1 - p_y``, of which nothing is left in a rounded number where the
  model is sure of its token.

At the input of a head with weights ``W`` the gradient is ``(w / T) W.T (e_y - p)``: one number per
position is then solved for, by projection, and ``T`` is that of the smallest residual.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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


def at_logits(logits: Tensor, gradient: Tensor, following: Tensor) -> TokenWeights:
    """``logits``, ``gradient``: (P, V) of one dtype. ``following``: (P,), the next token of the
    sequence, -1 where there is none.

    By hand: two tokens beside y with probabilities 1/4 each, and a loss of minus its logprob.

    >>> half = torch.tensor([[0.5, 0.25, 0.25]])
    >>> read = at_logits(half.log(), half - torch.tensor([[1.0, 0, 0]]), torch.tensor([0]))
    >>> read.tokens.item(), read.weights.item(), read.temperature.isnan().item()
    (0, nan, True)
    """
    smallest = torch.finfo(gradient.dtype).tiny
    rounding = torch.finfo(gradient.dtype).eps
    own, g = chosen(gradient, following), gradient.float()
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
    return TokenWeights(own, scale / inverse, 1 / inverse, residual, torch.zeros_like(residual))


def chosen(g: Tensor, following: Tensor) -> Tensor:
    """(P,): y, of gradients (P, V) at the logits."""
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
    known = Projection(hidden[probes], g[probes], near[probes], head)
    fitted = [known.refined(1 / t) for t in dict.fromkeys(temperatures)]
    missed = torch.stack([miss for _, miss in fitted])
    inverse = torch.stack([found for found, _ in fitted])[missed.argmin()]
    parts = []
    for at in chunks(len(g), len(head)):
        one = Projection(hidden[at], g[at], near[at], head)
        scale, direction, own = one.explained(inverse)
        off = (one.g - scale[:, None] * direction).norm(dim=-1) / one.g.norm(dim=-1)
        warm = (1 / inverse).expand_as(scale)
        parts.append(TokenWeights(own, scale / inverse, warm, off, torch.zeros_like(scale)))
    return TokenWeights.joined(parts)


class Projection:
    """Gradients at the head's input of P positions, explained by one inverse temperature."""

    def __init__(self, hidden: Tensor, g: Tensor, near: Tensor, head: Tensor) -> None:
        self.g, self.near, self.head = g, near, head
        self.logits = (hidden.to(head.dtype) @ head.T).float()

    def explained(self, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``w / T`` (P,), ``W.T (e_y - p)`` (P, H) and y (P,), with the y that leaves least."""
        directions = self.directions(inverse)
        scales = (self.g[:, None] * directions).sum(-1) / directions.square().sum(-1)
        left = (self.g[:, None] - scales[..., None] * directions).norm(dim=-1)
        best = left.masked_fill(self.near < 0, torch.inf).argmin(-1)
        rows = torch.arange(len(best), device=best.device)
        return scales[rows, best], directions[rows, best], self.near.clamp(min=0)[rows, best]

    def directions(self, inverse: Tensor | float) -> Tensor:
        """(P, M, H): ``W.T (e_y - p)`` of each y that is near."""
        p = self.softmax(inverse)
        ids = self.near.clamp(min=0)
        vectors = self.head[ids].float()
        share = p.gather(-1, ids)
        total, mean = self.without_likeliest(p)
        directions = vectors - (mean + share[:, :1] * vectors[:, 0])[:, None]
        directions[:, 0] = total[:, None] * vectors[:, 0] - mean
        return directions

    def without_likeliest(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(P,) the sum of values (P, V) and (P, H) that times ``W``, but for the likeliest token,
        whose own vector would cancel what the others are."""
        values = values.scatter(-1, self.near.clamp(min=0)[:, :1], 0.0)
        return values.sum(-1), (values.to(self.head.dtype) @ self.head).float()

    def refined(self, inverse: float) -> tuple[Tensor, Tensor]:
        """The inverse temperature near this one that leaves least, by Gauss-Newton, and the part of
        the gradients that it leaves."""
        beta = self.g.new_tensor(inverse)
        for _ in range(_ROUNDS):
            scale, direction, _ = self.explained(beta)
            p = self.softmax(beta)
            around = self.logits - (p * self.logits).sum(-1, keepdim=True)
            slope = -((p * around).to(self.head.dtype) @ self.head).float()
            along = (slope * direction).sum(-1) / direction.square().sum(-1)
            slope = scale[:, None] * (slope - along[:, None] * direction)
            left = self.g - scale[:, None] * direction
            step = (left * slope).sum() / slope.square().sum()
            beta = beta * (step / beta).clamp(-0.3, 0.3).nan_to_num().exp()
        scale, direction, _ = self.explained(beta)
        return beta, (self.g - scale[:, None] * direction).square().sum()

    def softmax(self, inverse: Tensor | float) -> Tensor:
        """(P, V)"""
        return (self.logits * inverse).softmax(-1)
