"""What is kept of a tensor: a copy if it is small, else a description made on its own device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from omni_grpo_core.trace.calls import TensorSeen
from omni_grpo_core.trace.fingerprint import sample_places

_CHUNK_ELEMENTS = 1 << 25
"""Logits converted to float32 at a time: 128 MiB."""


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor: gathering the whole would make ranks wait for each other."""
    to_local = getattr(tensor, "to_local", None)
    share: Tensor = tensor if to_local is None else to_local()
    return share.detach()


def copied(tensor: Tensor) -> Tensor:
    """An independent copy on the CPU: the trainer may write into the original later."""
    own = local(tensor).to("cpu", copy=True)
    return own.to_dense() if own.layout != torch.strided else own.contiguous()


def described(tensor: Tensor) -> TensorSeen:
    """``tensor`` in a few numbers, computed on its own device in float32.

    >>> described(torch.arange(6).reshape(2, 3)).mean
    2.5
    """
    flat = local(tensor).flatten()
    places = torch.from_numpy(sample_places(0, len(flat))).to(flat.device)
    wide = flat.float()
    deviation, mean = torch.std_mean(wide, correction=0) if len(flat) else (wide.sum(),) * 2
    low, high = torch.aminmax(wide) if len(flat) else (mean, mean)
    # one transfer for everything: each one waits for the device
    low_high = torch.cat([torch.stack([low, high, mean, deviation]), wide[places]]).tolist()
    return TensorSeen(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        low=low_high[0],
        high=low_high[1],
        mean=low_high[2],
        std=low_high[3],
        samples=tuple(low_high[4:]),
    )


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of ``ids`` (N, K) under ``logits`` (N, K, V) of any dtype: float32 (N, K).

    In chunks, because logits in float32 often do not fit beside the model.

    >>> token_logprobs(torch.zeros(1, 1, 4), torch.tensor([[2]])).exp()
    tensor([[0.2500]])
    """
    rows = []
    for row, targets in zip(logits.detach(), ids.to(logits.device), strict=True):
        parts = [chosen(part, wanted) for part, wanted in _chunks(row, targets)]
        rows.append(torch.cat(parts) if parts else row.new_zeros(0, dtype=torch.float32))
    return torch.stack(rows)


def chosen(logits: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of ``wanted`` (K,) under ``logits`` (K, V): float32 (K,)."""
    scores = logits.float() / temperature
    return scores.gather(-1, wanted[:, None])[:, 0] - scores.logsumexp(-1)


def _chunks(row: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(1, _CHUNK_ELEMENTS // row.shape[-1])
    for start in range(0, len(targets), step):
        yield row[start : start + step], targets[start : start + step]
