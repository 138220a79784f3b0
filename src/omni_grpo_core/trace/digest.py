"""Content digests: equal numbers for equal content, so that values of two calls can be compared
without keeping either.

The digest of a unit (a patch, a frame of sound, a token's embedding) is 64 bits: its bytes are read
as 32-bit words, and two dot products with fixed odd coefficients wrap around, the second over words
rotated by 16 bits, because a change of sign alone would cancel in the first. Sums of integers do
not depend on their order, so every device and numpy give the same number.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_CHUNK_BYTES = 64 << 20
"""Content digested at a time: the products need as much memory again."""
_SEEDS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)
_INTEGER = {1: torch.uint8, 2: torch.int16}


def digest(units: Tensor) -> Tensor:
    """int64 (units,): one number for each row of ``units`` (units, …) of any dtype, on its device.

    >>> same = digest(torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [-1.0, -2.0]]))
    >>> same[0] == same[2], len(same.unique())
    (tensor(True), 3)
    """
    flat = units.detach().reshape(len(units), -1) if units.numel() else None
    if flat is None:
        return torch.zeros(len(units), dtype=torch.int64, device=units.device)
    rows = max(1, _CHUNK_BYTES // max(1, flat.shape[1] * flat.element_size()))
    return torch.cat([_digested(_words(part.contiguous())) for part in torch.split(flat, rows)])


def digest_of(name: str, tensor: Tensor) -> Tensor:
    """The digests of an input or output ``name`` of a processor or model, by its units: int64,
    frames (n, T) of ``input_features`` (n, mel, T), tokens (N, L) of ``inputs_embeds`` (N, L, H),
    else (rows,)."""
    if tensor.dim() == 3 and name == "input_features":
        tensor = tensor.transpose(1, 2)
    elif tensor.dim() != 3 or name != "inputs_embeds":
        return digest(tensor if tensor.dim() else tensor[None])
    return digest(tensor.flatten(0, 1)).view(tensor.shape[:2])


def _words(flat: Tensor) -> Tensor:
    """int32 (units, words): the bytes, padded with zeros to whole words."""
    size = flat.element_size()
    missing = -flat.shape[1] % max(1, 4 // size)
    if missing:
        flat = torch.nn.functional.pad(flat.view(_INTEGER[size]), (0, missing))
    return flat.view(torch.int32)


def _digested(words: Tensor) -> Tensor:
    first, second = (_coefficients(seed, words.shape[1]).to(words.device) for seed in _SEEDS)
    turned = (words << 16) | ((words >> 16) & 0xFFFF)
    high = (words * first).sum(1, dtype=torch.int32).long()
    low = (turned * second).sum(1, dtype=torch.int32).long()
    return (high << 32) | (low & 0xFFFFFFFF)


@lru_cache(maxsize=16)
def _coefficients(seed: int, count: int) -> Tensor:
    """int32 (count,): odd, from SplitMix64 (Steele, Lea and Flood, 2014) of 1, 2, 3 …"""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words = ((z ^ (z >> np.uint64(31))) & np.uint64(0xFFFFFFFF)).astype(np.uint32) | 1
    return torch.from_numpy(words.view(np.int32).copy())
