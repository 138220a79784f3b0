"""Attention of one more token of every completion: over its group's prompt, of which there is one
copy, and over its own tokens so far.

Shapes never change and the position is a tensor, so that a CUDA graph can be captured of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LayerPrefix:
    """One layer's keys and values of B prompts and of their N = B * G completions.

    ``prompt_keys``, ``prompt_values``: (B, heads, P, D), as the prefill left them. ``keys``,
    ``values``: (N, heads, C, D), filled token by token. ``seen``, ``own``, ``at``: as in
    :class:`SharedPrefix`. ``kernel``: our own kernels are used.
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor
    seen: Tensor | None
    own: Tensor
    at: Tensor
    kernel: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefix:
    """All layers' keys and values, and what they have in common.

    ``seen``: float32, (B, 1, 1, P): 0, and -inf on padding; ``None`` without padding. ``own``:
    float32, (C,): 0 up to the current token, -inf after it. ``at``: int64, (1,), the current token.
    """

    layers: tuple[LayerPrefix, ...]
    seen: Tensor | None
    own: Tensor
    at: Tensor

    @classmethod
    def of(
        cls, prompts: Sequence[tuple[Tensor, Tensor]], mask: Tensor, copies: int, length: int
    ) -> SharedPrefix:
        """``prompts``: per layer, keys and values. ``mask``: (B, P), 0 on padding. ``copies``: G;
        ``length``: C, the most tokens of a completion."""
        device = prompts[0][0].device
        padding = mask.to(device) == 0
        bias = torch.zeros(mask.shape, device=device).masked_fill_(padding, -torch.inf)
        seen = bias[:, None, None] if bool(padding.any()) else None
        own = torch.full((length,), -torch.inf, device=device)
        at = torch.zeros(1, dtype=torch.int64, device=device)
        layers = []
        for key, value in prompts:
            # under autocast rotary embeddings leave the keys in float32
            key, value = key.to(value.dtype).contiguous(), value.contiguous()
            groups, heads, _, size = key.shape
            shape = (groups * copies, heads, length)
            fresh = key.new_zeros(*shape, size), value.new_zeros(*shape, value.shape[-1])
            layers.append(LayerPrefix(key, value, *fresh, seen, own, at))
        return cls(tuple(layers), seen, own, at)

    def with_kernel(self) -> SharedPrefix:
        """The same tensors, attended to by our own kernels."""
        return replace(self, layers=tuple(replace(layer, kernel=True) for layer in self.layers))


def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, prefix: LayerPrefix, scale: float
) -> Tensor:
    """``query`` (N, heads * R, 1, D); ``key``, ``value`` (N, heads, 1, D), which are kept.
    Returns (N, 1, heads * R, D)."""
    if prefix.kernel:
        from omni_grpo_core.fast import prefix_kernels

        dtype = prefix.keys.dtype
        found: Tensor = prefix_kernels.prefix_attention(
            query.to(dtype), key.to(dtype), value.to(dtype), prefix.prompt_keys,
            prefix.prompt_values, prefix.keys, prefix.values, prefix.seen, prefix.at, scale,
        )  # fmt: skip
        return found.to(query.dtype)
    prompt_keys, prompt_values = prefix.prompt_keys, prefix.prompt_values
    own_keys, own_values = prefix.keys, prefix.values
    own_keys.index_copy_(2, prefix.at, key.to(own_keys.dtype))
    own_values.index_copy_(2, prefix.at, value.to(own_values.dtype))
    rows, heads = own_keys.shape[:2]
    groups, length = prompt_keys.shape[0], prompt_keys.shape[2]
    # (N, heads, R, D), and the same by group: (B, heads, G * R, D)
    queries = query.to(own_keys.dtype).reshape(rows, heads, -1, query.shape[-1])
    grouped = _by_group(queries, groups)
    over_prompt = _product(grouped, prompt_keys.mT) * scale
    if prefix.seen is not None:
        over_prompt = over_prompt + prefix.seen
    over_own = _product(queries, own_keys.mT) * scale + prefix.own
    over_own = _by_group(over_own, groups)
    shares = torch.cat([over_prompt, over_own], dim=-1).softmax(-1).to(own_values.dtype)
    of_prompt, of_own = shares[..., :length], shares[..., length:]
    found = _product(of_prompt, prompt_values)
    found = _by_row(found, rows) + _product(_by_row(of_own, rows), own_values)
    return found.flatten(1, 2)[:, None].to(query.dtype)


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """(B * G, heads, R, D) -> (B, heads, G * R, D)"""
    rows, heads, _, size = tensor.shape
    parts = tensor.view(groups, rows // groups, heads, -1, size).transpose(1, 2)
    return parts.reshape(groups, heads, -1, size)


def _by_row(tensor: Tensor, rows: int) -> Tensor:
    """The reverse."""
    groups, heads, _, size = tensor.shape
    parts = tensor.view(groups, heads, rows // groups, -1, size).transpose(1, 2)
    return parts.reshape(rows, heads, -1, size)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Batched matrix product whose result is not rounded below float32: scores of 20 would be off
    by 0.1 in bfloat16."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda and hasattr(torch.ops.aten.bmm, "dtype"):  # torch 2.8
        flat = torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out_dtype=torch.float32)
        return flat.view(*left.shape[:2], *flat.shape[1:])
    return left.float() @ right.float()
