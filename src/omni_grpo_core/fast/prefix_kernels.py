"""Kernels of :mod:`~omni_grpo_core.fast.prefix` on a CUDA device, where torch alone takes a dozen.

``_over_prompts`` splits a prompt's keys among blocks, each of which attends to its share for all
queries of a group that use these keys; ``_own_and_merged`` attends to a completion's own tokens and
merges all shares, weighted by their sums of exponentials (FlashDecoding; FlashAttention-2, arXiv
2307.08691, section 3.1). Softmax in float32.
"""

# Triton reads the annotations of its kernels as its own
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCKS = 128
"""Blocks among which prompts are split: about one for each of an H100's 132 multiprocessors."""
_KEYS = 128
"""Keys at a time. On an H200, at the 7B's shape with 8 completions, these two and the warps below
were the quickest of twenty combinations: 16 microseconds a layer."""
_LOWEST = tl.constexpr(-1.0e30)
"""In place of -inf, whose differences are NaN."""


@triton.jit
def _over_prompts(
    query, key, value, seen, found, found_lse, scale, length, share, rows,
    HEADS: tl.constexpr, KV: tl.constexpr, COPIES: tl.constexpr, SIZE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A share of one prompt's keys of one head, for the group's queries of heads that use it."""
    group = tl.program_id(0) // KV
    kv = tl.program_id(0) % KV
    split = tl.program_id(1)
    repeats: tl.constexpr = HEADS // KV
    index = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    inside = index < COPIES * repeats
    # (row, head) of each query
    place = (group * COPIES + index // repeats) * HEADS + kv * repeats + index % repeats
    at_size = tl.arange(0, SIZE)
    q = tl.load(query + place[:, None] * SIZE + at_size, mask=inside[:, None], other=0.0)
    top = tl.full([QUERIES], _LOWEST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, SIZE], tl.float32)
    base = (group * KV + kv).to(tl.int64) * length * SIZE
    end = tl.minimum(length, (split + 1) * share)
    for start in range(split * share, end, KEYS):
        at = start + tl.arange(0, KEYS)
        there = at < end
        offsets = base + at[:, None] * SIZE + at_size
        k = tl.load(key + offsets, mask=there[:, None], other=0.0)
        v = tl.load(value + offsets, mask=there[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            scores += tl.load(seen + group * length + at, mask=there, other=0.0)
        scores = tl.where(there, tl.maximum(scores, _LOWEST), _LOWEST)
        higher = tl.maximum(top, tl.max(scores, 1))
        shares = tl.where(scores > _LOWEST, tl.exp(scores - higher[:, None]), 0.0)
        before = tl.exp(top - higher)
        total = total * before + tl.sum(shares, 1)
        sums = sums * before[:, None]
        sums += tl.dot(shares.to(v.dtype), v, input_precision="ieee")
        top = higher
    kept = split * rows * HEADS + place
    some = tl.maximum(total, 1e-38)
    tl.store(found + kept[:, None] * SIZE + at_size, sums / some[:, None], mask=inside[:, None])
    tl.store(found_lse + kept, tl.where(total > 0, top + tl.log(some), _LOWEST), mask=inside)


@triton.jit
def _own_and_merged(
    query, key, value, own_key, own_value, at, found, found_lse, out, scale, rows, length, splits,
    HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """One query: over its completion's tokens before it and itself, and all shares merged. The
    first query of a head of keys keeps the new key and value."""
    place = tl.program_id(0)
    row = place // HEADS
    head = place % HEADS
    repeats: tl.constexpr = HEADS // KV
    kv = row * KV + head // repeats
    at_size = tl.arange(0, SIZE)
    now = tl.load(at)
    q = tl.load(query + place * SIZE + at_size).to(tl.float32) * scale
    new_key = tl.load(key + kv * SIZE + at_size)
    new_value = tl.load(value + kv * SIZE + at_size)
    base = kv.to(tl.int64) * length * SIZE
    if head % repeats == 0:
        tl.store(own_key + base + now * SIZE + at_size, new_key)
        tl.store(own_value + base + now * SIZE + at_size, new_value)
    top = tl.sum(q * new_key.to(tl.float32), 0)
    total = 1.0
    sums = new_value.to(tl.float32)
    for start in range(0, now, KEYS):
        index = start + tl.arange(0, KEYS)
        there = index < now
        offsets = base + index[:, None] * SIZE + at_size
        k = tl.load(own_key + offsets, mask=there[:, None], other=0.0).to(tl.float32)
        v = tl.load(own_value + offsets, mask=there[:, None], other=0.0).to(tl.float32)
        scores = tl.where(there, tl.sum(k * q, 1), _LOWEST)
        higher = tl.maximum(top, tl.max(scores, 0))
        shares = tl.where(there, tl.exp(scores - higher), 0.0)
        before = tl.exp(top - higher)
        total = total * before + tl.sum(shares, 0)
        sums = sums * before + tl.sum(shares[:, None] * v, 0)
        top = higher
    split = tl.arange(0, SPLITS)
    there = split < splits
    kept = split * rows * HEADS + place
    lse = tl.load(found_lse + kept, mask=there, other=_LOWEST)
    parts = tl.load(found + kept[:, None] * SIZE + at_size, mask=there[:, None], other=0.0)
    higher = tl.maximum(top, tl.max(lse, 0))
    weights = tl.where(lse > _LOWEST, tl.exp(lse - higher), 0.0)
    before = tl.exp(top - higher)
    total = total * before + tl.sum(weights, 0)
    sums = sums * before + tl.sum(weights[:, None] * parts, 0)
    tl.store(out + place * SIZE + at_size, (sums / total).to(out.dtype.element_ty))


@torch.library.custom_op("omni_grpo::prefix_attention", mutates_args=("own_keys", "own_values"))
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    seen: Tensor | None,
    at: Tensor,
    scale: float,
) -> Tensor:
    """``query`` (N, heads * R, 1, D); ``key``, ``value`` (N, heads, 1, D), which are kept at ``at``
    in ``own_keys``, ``own_values`` (N, heads, C, D); ``prompt_keys``, ``prompt_values``
    (B, heads, P, D); ``seen`` (B, 1, 1, P), added to the scores. Returns (N, 1, heads * R, D)."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    rows, heads, _, size = query.shape
    groups, kv, length, _ = prompt_keys.shape
    queries = rows // groups * (heads // kv)
    block = min(64, max(16, triton.next_power_of_2(queries)))
    blocks = triton.cdiv(queries, block)
    share = _KEYS * triton.cdiv(
        triton.cdiv(length, _KEYS), max(1, _BLOCKS // (groups * kv * blocks))
    )
    splits = triton.cdiv(length, share)
    found = query.new_empty(splits, rows, heads, size, dtype=torch.float32)
    lse = query.new_empty(splits, rows, heads, dtype=torch.float32)
    out = query.new_empty(rows, 1, heads, size)
    _over_prompts[(groups * kv, splits, blocks)](
        query, prompt_keys, prompt_values, query if seen is None else seen, found, lse,
        scale, length, share, rows,
        HEADS=heads, KV=kv, COPIES=rows // groups, SIZE=size, QUERIES=block,
        KEYS=_KEYS if query.dtype.itemsize == 2 else _KEYS // 4, MASKED=seen is not None,
        num_warps=8,
    )  # fmt: skip
    _own_and_merged[(rows * heads,)](
        query, key, value, own_keys, own_values, at, found, lse, out,
        scale, rows, own_keys.shape[2], splits,
        HEADS=heads, KV=kv, SIZE=size, SPLITS=triton.next_power_of_2(splits), KEYS=_KEYS,
    )  # fmt: skip
    return out


@prefix_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, prompt_keys: Tensor, prompt_values: Tensor,
    own_keys: Tensor, own_values: Tensor, seen: Tensor | None, at: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    rows, heads, _, size = query.shape
    return query.new_empty(rows, 1, heads, size)
