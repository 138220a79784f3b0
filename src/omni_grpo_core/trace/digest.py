"""Content digests: equal numbers for equal content, so that values of two calls can be compared
without keeping either.

The digest of a unit (a patch, a frame of sound, a token's embedding) is 64 bits: its bytes are read
as 32-bit words, and two dot products with fixed odd coefficients wrap around, the second over words
rotated by 16 bits, because a change of sign alone would cancel in the first. Sums of integers do
not depend on their order, so every device and numpy give the same number.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CPU_BYTES, _MOST_BYTES = 4 << 20, 64 << 20
"""Content digested at a time: what the caches of a CPU hold, and elsewhere what the products may
take of its memory."""
_SEEDS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 512
"""Frames that are told to be padding at a time."""


def digest(units: Tensor) -> Tensor:
    """int64 (units,): one number for each row of ``units`` (units, …) of any dtype, on its device.

    >>> same = digest(torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [-1.0, -2.0]]))
    >>> same[0] == same[2], len(same.unique())
    (tensor(True), 3)
    """
    if not units.numel():
        return torch.zeros(len(units), dtype=torch.int64, device=units.device)
    flat = units.detach().reshape(len(units), -1)
    chunk = _CPU_BYTES if flat.device.type == "cpu" else _MOST_BYTES
    rows = max(1, chunk // flat[0].nbytes)
    return torch.cat([_digested(_words(part.contiguous())) for part in torch.split(flat, rows)])


def digest_of(name: str, tensor: Tensor) -> Tensor:
    """The digests of an input or output ``name`` of a processor or model, by its units: int64,
    frames (n, T) of ``input_features`` (n, mel, T), tokens (N, L) of ``inputs_embeds`` (N, L, H),
    else (rows,)."""
    if tensor.dim() == 3 and name == "input_features":
        # clip by clip: turning all of it in memory takes longer than its digest
        frames = [_digest_of_frames(clip) for clip in tensor.detach()]
        return torch.stack(frames) if frames else digest(tensor)[:, None]
    if tensor.dim() != 3 or name != "inputs_embeds":
        return digest(tensor if tensor.dim() else tensor[None])
    return digest(tensor.flatten(0, 1)).view(tensor.shape[:2])


def _digest_of_frames(clip: Tensor) -> Tensor:
    """(T,) of (mel, T). Most of it is the padding of five minutes, which is one frame; a device
    would have to be waited for, and is fast."""
    end = clip.shape[1]
    if clip.device.type == "cpu":
        bits = clip.contiguous().view(_INTEGER[clip.element_size()])
        while end > _BLOCK and bool((bits[:, end - _BLOCK : end] == bits[:, -1:]).all()):
            end -= _BLOCK
    heard = digest(clip[:, :end].T)
    return torch.cat([heard, heard[-1:].expand(clip.shape[1] - end)])


def _words(flat: Tensor) -> Tensor:
    """int32 (units, words): the bytes, padded with zeros to whole words."""
    size = flat.element_size()
    missing = -flat.shape[1] % max(1, 4 // size)
    if missing:
        flat = torch.nn.functional.pad(flat.view(_INTEGER[size]), (0, missing))
    return flat.view(torch.int32)


def _digested(words: Tensor) -> Tensor:
    """int64 (units,) of int32 (units, words)."""
    first, second = (_coefficients(seed, words.shape[1], words.device) for seed in _SEEDS)
    if words.device.type == "cpu":
        return _digested_by_numpy(words.numpy(), first.numpy(), second.numpy())
    return _digested_by_torch(words, first, second)


def _digested_by_torch(words: Tensor, first: Tensor, second: Tensor) -> Tensor:
    turned = (words << 16) | ((words >> 16) & 0xFFFF)
    high = (words * first).sum(1, dtype=torch.int32).long()
    low = (turned * second).sum(1, dtype=torch.int32).long()
    return (high << 32) | (low & 0xFFFFFFFF)


def _digested_by_numpy(words: Any, first: Any, second: Any) -> Tensor:
    """The same without the products in memory: a word is turned into ``(word << 16) + upper``,
    whose product with ``c`` is ``word * (c << 16) + upper * c``."""
    high = np.einsum("ij,j->i", words, first).astype(np.int64)
    upper = np.einsum("ij,j->i", words.view(np.uint32) >> 16, second.view(np.uint32))
    low = np.einsum("ij,j->i", words, second << 16).view(np.uint32) + upper
    return torch.from_numpy((high << 32) | low.astype(np.int64))


@lru_cache(maxsize=64)
def _coefficients(seed: int, count: int, device: torch.device) -> Tensor:
    """int32 (count,): odd, from SplitMix64 (Steele, Lea and Flood, 2014) of 1, 2, 3 … Kept on their
    device: to copy them there again would wait for it."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words = ((z ^ (z >> np.uint64(31))) & np.uint64(0xFFFFFFFF)).astype(np.uint32) | 1
    return torch.from_numpy(words.view(np.int32).copy()).to(device)
