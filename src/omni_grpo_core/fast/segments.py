"""Attention over a packed row: two calls whose results are merged, and no mask.

Every prompt and completion attends causally to itself (one call over all of them), and each group's
completions attend to their prompt (another). A softmax over both sets of keys is the two results
weighted by their shares of the sum of exponentials, which each call returns as a logarithm. The
backward pass needs no more: given the merged result and logarithm, a kernel's own backward formula
gives exactly its share of the gradients (FlashAttention-2, arXiv 2307.08691, algorithm 2).

Shapes as in variable-length kernels: queries (tokens, heads, D), keys and values (tokens, their own
fewer heads, D).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from omni_grpo_core.fast.layout import PackedRow, Spans

FLASH_DTYPES = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float
) -> Tensor:
    """Every token of the row attends to what it may see: (tokens, heads, D), differentiable."""
    merged = _Merged.apply(query, key, value, row, scale)  # type: ignore[no-untyped-call]
    return cast(Tensor, merged)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float
    ) -> Tensor:
        first = row.prompt_tokens
        out, lse, within = attend(query, key, value, row.within, scale)
        prompt, prompt_lse, across = attend(
            query[first:], key[:first], value[:first], row.across, scale
        )
        own_lse = lse[:, first:]
        both = torch.logaddexp(own_lse, prompt_lse)
        own_share, prompt_share = (
            (part - both).exp().t()[..., None] for part in (own_lse, prompt_lse)
        )
        out[first:] = (own_share * out[first:] + prompt_share * prompt).to(out.dtype)
        own_lse.copy_(both)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.row, ctx.scale, ctx.within, ctx.across = row, scale, within, across
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, lse = ctx.saved_tensors
        row, scale = ctx.row, ctx.scale
        first = row.prompt_tokens
        d_query, d_key, d_value = attend_backward(
            grad, query, key, value, out, lse, row.within, scale, ctx.within
        )
        more_query, more_key, more_value = attend_backward(
            grad[first:], query[first:], key[:first], value[:first], out[first:],
            lse[:, first:].contiguous(), row.across, scale, ctx.across,
        )  # fmt: skip
        d_query[first:] += more_query
        d_key[:first] += more_key
        d_value[:first] += more_value
        return d_query, d_key, d_value, None, None


def attend(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float
) -> tuple[Tensor, Tensor, Any]:
    """Each stretch of queries over its keys: the result, the float32 (heads, queries) logarithm of
    the sum of exponentials, and what :func:`attend_backward` wants besides."""
    if _fits_flash(query, spans):
        out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, spans.query_bounds, spans.key_bounds,
            max(spans.queries), max(spans.keys), 0.0, spans.causal, False, scale=scale,
        )  # fmt: skip
        return out, lse, (seed, offset)
    out = torch.empty_like(query)
    wide = _wide(query)
    lse = torch.empty(query.shape[1], query.shape[0], dtype=wide, device=query.device)
    for q, k in _stretches(spans):
        scores = _scores(query[q], key[k], spans.causal, scale)
        total = scores.logsumexp(-1)
        shares = (scores - total[..., None]).exp()
        out[q] = _ungrouped(shares @ _per_head(value[k])).to(out.dtype)
        lse[:, q] = total.flatten(0, 1)
    return out, lse, None


def attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    spans: Spans, scale: float, state: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values. ``out`` and ``lse`` may be those of a softmax over
    more keys than these."""
    if state is not None:
        seed, offset = state
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            grad, query, key, value, out, lse, spans.query_bounds, spans.key_bounds,
            max(spans.queries), max(spans.keys), 0.0, spans.causal, seed, offset, scale=scale,
        )  # fmt: skip
        return gradients
    d_query, d_key, d_value = (torch.zeros_like(one) for one in (query, key, value))
    heads = key.shape[1]
    for q, k in _stretches(spans):
        scores = _scores(query[q], key[k], spans.causal, scale)
        shares = (scores - lse[:, q].view(heads, -1, q.stop - q.start, 1)).exp()
        d_out = _grouped(grad[q], heads)
        own = (d_out * _grouped(out[q], heads)).sum(-1, keepdim=True)
        d_scores = shares * (d_out @ _per_head(value[k]).mT - own) * scale
        d_query[q] = _ungrouped(d_scores @ _per_head(key[k])).to(query.dtype)
        d_key[k] = _summed(d_scores.mT @ _grouped(query[q], heads)).to(key.dtype)
        d_value[k] = _summed(shares.mT @ d_out).to(value.dtype)
    return d_query, d_key, d_value


def _fits_flash(query: Tensor, spans: Spans) -> bool:
    # with one query a stretch the kernel swaps heads and queries, and returns other shapes
    return (
        query.is_cuda
        and query.dtype in FLASH_DTYPES
        and query.shape[-1] <= _LARGEST_HEAD
        and max(spans.queries) > 1
    )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _stretches(spans: Spans) -> Iterator[tuple[slice, slice]]:
    q = k = 0
    for queries, keys in zip(spans.queries, spans.keys, strict=True):
        if queries:
            yield slice(q, q + queries), slice(k, k + keys)
        q, k = q + queries, k + keys


def _grouped(tensor: Tensor, heads: int) -> Tensor:
    """(tokens, heads * R, D) -> (heads, R, tokens, D), in the precision of the sums."""
    wide = tensor.to(_wide(tensor))
    return wide.reshape(len(wide), heads, -1, wide.shape[-1]).permute(1, 2, 0, 3)


def _per_head(tensor: Tensor) -> Tensor:
    """Keys or values, (tokens, heads, D) -> (heads, 1, tokens, D)."""
    return tensor.to(_wide(tensor)).transpose(0, 1)[:, None]


def _ungrouped(tensor: Tensor) -> Tensor:
    return tensor.permute(2, 0, 1, 3).flatten(1, 2)


def _summed(tensor: Tensor) -> Tensor:
    """(heads, R, tokens, D) -> (tokens, heads, D): queries of R heads share one of keys."""
    return tensor.sum(1).transpose(0, 1)


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    """(heads, R, queries, keys)"""
    scores = _grouped(query, key.shape[1]) @ _per_head(key).mT * scale
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores.masked_fill_(~seen, -torch.inf)
    return scores
