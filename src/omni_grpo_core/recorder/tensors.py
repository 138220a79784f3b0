"""What is kept of a tensor: a copy if it is small, else a description made on its own device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_grpo_core.trace import dtype_name
from omni_grpo_core.trace.calls import TensorSeen
from omni_grpo_core.trace.fingerprint import sample_places

_CHUNK_ELEMENTS = 1 << 25
"""Logits converted to float32 at a time: 128 MiB."""
_UNDER_WAY: set[torch.device] = set()
"""Devices with copies that were not waited for: another rank's must not be touched."""


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor: gathering the whole would make ranks wait for each other."""
    to_local = getattr(tensor, "to_local", None)
    share: Tensor = tensor if to_local is None else to_local()
    return share.detach()


def copied(tensor: Tensor) -> Tensor:
    """An independent copy on the CPU: the trainer may write into the original later.

    From a CUDA device it arrives behind the work that is already queued there: waiting for it would
    stop the trainer at every call. Its values are there after :func:`arrived`.
    """
    own = local(tensor)
    own = own.to_dense() if own.layout != torch.strided else own
    if own.device.type != "cuda":
        return own.to("cpu", copy=True).contiguous()
    _UNDER_WAY.add(own.device)
    return torch.empty(own.shape, dtype=own.dtype, pin_memory=True).copy_(own, non_blocking=True)


def arrived() -> None:
    """Wait for every copy from a device."""
    while _UNDER_WAY:
        torch.cuda.synchronize(_UNDER_WAY.pop())


@dataclass(frozen=True, slots=True)
class Described:
    """``tensor`` in a few numbers, computed on its own device in float32. ``numbers``: low, high,
    mean, deviation and the samples, on their way to the CPU.

    >>> Described.of(torch.arange(6).reshape(2, 3)).seen().mean
    2.5
    """

    dtype: str
    shape: tuple[int, ...]
    numbers: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Described:
        flat = local(tensor).flatten()
        places = torch.from_numpy(sample_places(0, len(flat))).to(flat.device, non_blocking=True)
        wide = flat.float()
        low = high = mean = deviation = wide.sum()
        if len(flat):
            # by themselves both are several times faster on a CPU than torch.std_mean
            mean, deviation = wide.mean(), wide.var(correction=0).sqrt()
            low, high = torch.aminmax(wide)
        numbers = torch.cat([torch.stack([low, high, mean, deviation]), wide[places]])
        return cls(dtype_name(tensor), tuple(tensor.shape), copied(numbers))

    def seen(self) -> TensorSeen:
        """The numbers, which must have arrived."""
        low, high, mean, deviation, *samples = self.numbers.tolist()
        return TensorSeen(
            self.dtype, self.shape, low, high, mean, deviation, samples=tuple(samples)
        )


def token_logprobs(
    logits: Tensor, ids: Tensor, temperature: float = 1.0, suppressed: Sequence[int] = ()
) -> Tensor:
    """Log-probability of ``ids`` (N, K) under ``logits`` (N, K, V) of any dtype: float32 (N, K).

    In chunks, because logits in float32 often do not fit beside the model.

    >>> token_logprobs(torch.zeros(1, 1, 4), torch.tensor([[2]])).exp()
    tensor([[0.2500]])
    """
    rows = []
    for row, targets in zip(logits.detach(), ids.to(logits.device), strict=True):
        parts = [
            chosen(part, wanted, temperature, suppressed) for part, wanted in _chunks(row, targets)
        ]
        rows.append(torch.cat(parts) if parts else row.new_zeros(0, dtype=torch.float32))
    return torch.stack(rows)


def chosen(
    logits: Tensor, wanted: Tensor, temperature: float = 1.0, suppressed: Sequence[int] = ()
) -> Tensor:
    """Log-probability of ``wanted`` (K,) under ``logits`` (K, V): float32 (K,)."""
    scores = logits.float() / temperature
    if suppressed:
        # indexed by a list, it would wait for the device
        places = torch.tensor(suppressed).to(scores.device, non_blocking=True)
        scores = scores.index_fill(-1, places, -torch.inf)
    return scores.gather(-1, wanted[:, None])[:, 0] - scores.logsumexp(-1)


def _chunks(row: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(1, _CHUNK_ELEMENTS // row.shape[-1])
    for start in range(0, len(targets), step):
        yield row[start : start + step], targets[start : start + step]
