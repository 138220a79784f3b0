"""Tensors as indices into a pool of their units, so that each unit of content is stored once.

A trainer passes the same patches, frames of sound and embeddings from call to call, and repeats
them for every completion of a group. A unit is a vector along the last axis, or a frame (n, mel, T)
of ``input_features``. All units of one dtype and length form the pool ``@dtype*length``; a tensor
``name`` in it is stored as ``@dtype*length:name``, int32 without the unit's axis.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from omni_grpo_core.errors import TraceError
from omni_grpo_core.trace import dtype_name

_SMALLEST_BYTES = 64
"""Of a unit; an index has 4."""
_FRAMES = re.compile(r"\.input_features'*$")
_KEY = re.compile(r"(@[a-z0-9_]+\*\d+)(?::(.*))?", re.DOTALL)
_MOST_TIMES, _MOST_BYTES = 1 << 10, 1 << 30
"""An altered file must not unfold without limit: to this many times its bytes, and these."""


def pooled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors``, which are contiguous, as they are stored.

    >>> twice = torch.arange(32.0).repeat(3, 1)
    >>> {name: tuple(held.shape) for name, held in pooled({"a": twice, "b": twice[:1]}).items()}
    {'@float32*32': (1, 32), '@float32*32:a': (3,), '@float32*32:b': (1,)}
    """
    stored: dict[str, Tensor] = {}
    pools: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        length = _turned(name, tensor).shape[-1] if tensor.numel() and tensor.dim() else 0
        if length * tensor.element_size() >= _SMALLEST_BYTES:
            pools.setdefault(f"@{dtype_name(tensor)}*{length}", []).append(name)
        else:
            stored[name] = tensor
    for pool, names in pools.items():
        stored |= _indexed(pool, {name: tensors[name] for name in names})
    return stored


def _indexed(pool: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    known: dict[bytes, int] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        turned = _turned(name, tensor)
        rows = _bytes_of(turned)
        raw, width = rows.numpy().tobytes(), rows.shape[1]
        index = [
            known.setdefault(raw[start : start + width], len(known))
            for start in range(0, len(raw), width)
        ]
        found[f"{pool}:{name}"] = torch.tensor(index, dtype=torch.int32).view(turned.shape[:-1])
    units = torch.frombuffer(bytearray().join(known), dtype=torch.uint8).view(len(known), -1)
    return {pool: units.view(next(iter(tensors.values())).dtype), **found}


def unpooled(stored: Mapping[str, Tensor], where: str, fix: str) -> dict[str, Tensor]:
    """The inverse of :func:`pooled`.

    Raises :class:`~omni_grpo_core.errors.TraceError` for ``where`` if an index has no pool, does
    not fit it, or unfolds to far more than was stored.
    """
    tensors: dict[str, Tensor] = {}
    left = _MOST_BYTES + _MOST_TIMES * sum(tensor.nbytes for tensor in stored.values())
    for key, tensor in stored.items():
        match = _KEY.fullmatch(key)
        if match is None:
            tensors[key] = tensor
        elif match[2] is not None:
            pool, name = stored.get(match[1]), match[2]
            left -= tensor.numel() * (pool.nbytes // max(1, len(pool)) if pool is not None else 0)
            misfit = "content that unfolds without limit" if left < 0 else _misfit(tensor, pool)
            if pool is None or misfit:
                raise TraceError(
                    f"{where}: {name}", got=misfit, want=f"rows of {match[1]}", fix=fix
                )
            rows = _bytes_of(pool).index_select(0, tensor.flatten()).view(pool.dtype)
            shaped = rows.view(*tensor.shape, -1)
            tensors[name] = _turned(name, shaped).contiguous()
    return tensors


def _misfit(index: Tensor, pool: Tensor | None) -> str:
    if pool is None or pool.dim() != 2 or not pool.numel():
        return "no such pool"
    if index.dtype != torch.int32 or not index.numel():
        return f"{index.numel()} indices of {dtype_name(index)}"
    outside = int(index.min()) < 0 or int(index.max()) >= len(pool)
    return f"indices outside its {len(pool)} rows" if outside else ""


def _turned(name: str, tensor: Tensor) -> Tensor:
    """A view whose last axis is a unit; of its result, ``tensor``."""
    return tensor.transpose(1, 2) if tensor.dim() == 3 and _FRAMES.search(name) else tensor


def _bytes_of(units: Tensor) -> Tensor:
    """uint8 (units, bytes): torch cannot index every dtype."""
    flat = units.flatten(0, -2) if units.dim() > 1 else units[None]
    return flat.contiguous().view(torch.uint8)
