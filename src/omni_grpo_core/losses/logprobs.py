"""Log-probabilities of given completion ids, in float32, without a float32 copy of the logits.

The logits that predict completion token ``t`` are one position before it. Two functions make sure
of that: :func:`predicting_logits` slices them out of what a model returns, and
:func:`completion_logprobs` takes logits and ids of the same width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.errors import TrainError
from omni_grpo_core.losses.shapes import require_mask, require_shape

CHUNK_SCORES = 2**24
"""Logits upcast at a time: 64 MiB of float32."""


@dataclass(frozen=True, slots=True, eq=False)
class ScoredTokens:
    """``logprobs``: (N, C), float32 (float64 for float64 logits), differentiable. ``entropy``: the
    same shape, nats, of the distribution that was sampled from, without a gradient. Both are 0
    where the mask is False."""

    logprobs: Tensor
    entropy: Tensor


def predicting_logits(logits: Tensor, width: int) -> Tensor:
    """The logits that predict the last ``width`` tokens of a sequence.

    ``logits``: (N, K, V), as a model returns them for at least the last ``width + 1`` positions of
    a sequence (``logits_to_keep=width + 1`` is enough). Returns a view, (N, width, V): from the
    last prompt token to the last but one completion token.

    Raises ``TrainError`` if ``K <= width``: then the logits at the last prompt token are missing,
    or they are shifted already.

    >>> predicting_logits(torch.arange(5.0).view(1, 5, 1), 2).flatten().tolist()
    [2.0, 3.0]
    """
    if logits.ndim != 3 or logits.shape[1] <= width:
        raise TrainError(
            "logits",
            got=f"shape {tuple(logits.shape)}",
            want=f"(N, K, V) with K >= {width + 1} to predict {width} tokens",
            fix="keep one position more than there are completion tokens, and do not shift first",
        )
    return logits[:, -width - 1 : -1]


def completion_logprobs(
    predicting: Tensor,
    ids: Tensor,
    mask: Tensor,
    *,
    temperature: float,
    suppressed: Tensor | None = None,
) -> ScoredTokens:
    """Log-probability of each completion token under ``softmax(logits / temperature)``.

    ``predicting``: (N, C, V), any float dtype, from :func:`predicting_logits`. ``ids``: int64,
    (N, C). ``mask``: bool, (N, C). ``suppressed``: bool, (V,): ids that the sampler must not draw;
    their logits become -inf, so that the distribution is the one sampled from.

    The forward and backward passes upcast a chunk of positions at a time and recompute the softmax:
    no (N, C, V) tensor exists besides ``predicting`` and its gradient (in the same dtype).

    Raises ``TrainError`` for shapes that differ, ``temperature <= 0``, ids outside the vocabulary,
    and a token inside the mask that ``suppressed`` forbids.

    >>> logits = torch.tensor([[[0.0, 0.0, 5.0]]])
    >>> scored = completion_logprobs(
    ...     logits, torch.tensor([[1]]), torch.tensor([[True]]), temperature=0.5,
    ...     suppressed=torch.tensor([False, False, True]),
    ... )
    >>> round(scored.logprobs.exp().item(), 6), round(scored.entropy.exp().item(), 6)
    (0.5, 2.0)
    """
    rows, width = require_mask("mask", mask)
    require_shape("completion ids", ids, (rows, width))
    require_shape("predicting logits", predicting, (rows, width, *predicting.shape[2:3]))
    if not temperature > 0:
        raise TrainError(
            "temperature",
            got=str(temperature),
            want="above 0",
            fix="score at the temperature the completions were sampled at",
        )
    if suppressed is None:
        suppressed = torch.zeros(predicting.shape[-1], dtype=torch.bool, device=predicting.device)
    require_shape("suppressed", suppressed, (predicting.shape[-1],))
    _check_ids(ids, mask, suppressed)
    safe_ids = torch.where(mask, ids, torch.zeros_like(ids))
    logprobs, entropy = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        predicting, safe_ids, mask, suppressed, temperature
    )
    return ScoredTokens(logprobs, entropy)


def _check_ids(ids: Tensor, mask: Tensor, suppressed: Tensor) -> None:
    size = suppressed.shape[0]
    inside = (ids >= 0) & (ids < size)
    wrong = mask & (~inside | suppressed[ids.clamp(0, size - 1)])
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise TrainError(
            f"completion {row}, token {column}",
            got=f"id {ids[row, column].item()}",
            want=f"an id below {size} that the sampler may draw",
            fix="suppress the same ids in sampling and in scoring",
        )


class _ChunkedLogprobs(torch.autograd.Function):
    """d logprob / d logit_v = ([v = id] - p_v) / temperature, with p recomputed a chunk at a time.

    Autograd's own graph would keep every float32 chunk alive: the very copy to avoid.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        mask: Tensor,
        suppressed: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logprobs = torch.zeros(ids.shape, dtype=wide, device=logits.device)
        entropy = torch.zeros_like(logprobs)
        for row, columns in _chunks(logits):
            log_p = _log_softmax(logits[row, columns], suppressed, temperature, wide)
            kept = mask[row, columns]
            chosen = log_p.gather(-1, ids[row, columns, None]).squeeze(-1)
            logprobs[row, columns] = torch.where(kept, chosen, 0.0)
            # a suppressed id has p = 0 and log p = -inf: its term is 0, not NaN
            terms = log_p.exp() * log_p.masked_fill(suppressed, 0.0)
            entropy[row, columns] = torch.where(kept, -terms.sum(-1), 0.0)
        ctx.save_for_backward(logits, ids, mask, suppressed)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor, _entropy: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        logits, ids, mask, suppressed = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for row, columns in _chunks(logits):
            log_p = _log_softmax(
                logits[row, columns], suppressed, ctx.temperature, grad_logprobs.dtype
            )
            weight = torch.where(mask[row, columns], grad_logprobs[row, columns], 0.0)
            weight = weight[:, None] / ctx.temperature
            step = -log_p.exp() * weight
            step.scatter_add_(-1, ids[row, columns, None], weight)
            # a position outside the mask may hold NaN logits: 0 * NaN would leak them
            step.masked_fill_(~mask[row, columns, None], 0.0)
            grad[row, columns] = step.to(grad.dtype)
        return grad, None, None, None, None


def _chunks(logits: Tensor) -> list[tuple[int, slice]]:
    """Row and range of columns, each of at most ``CHUNK_SCORES`` logits (or one position)."""
    rows, width, size = logits.shape
    step = max(1, CHUNK_SCORES // size)
    return [
        (row, slice(start, min(start + step, width)))
        for row in range(rows)
        for start in range(0, width, step)
    ]


def _log_softmax(
    logits: Tensor, suppressed: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    """(positions, V) -> (positions, V)"""
    scores = logits.to(dtype) / temperature
    return scores.masked_fill_(suppressed, -torch.inf).log_softmax(-1)
