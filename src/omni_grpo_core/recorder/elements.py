"""A few elements of each of many tensors, side by side on their own device.

Reading all gradients after every backward would cost a percent of a large model's step; a few
thousand elements of each, spread over the whole tensor, show what was done to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_RUNS = 64
"""Contiguous runs per tensor: a run is one read of memory, so they are long rather than many."""


class Elements:
    """The same elements of ``tensors`` every time: all, or ``most`` in runs from first to last."""

    def __init__(self, tensors: Sequence[Tensor], most: int) -> None:
        self._most = most
        self._width = max((min(t.numel(), most) for t in tensors), default=0)
        self._device = tensors[0].device if tensors else torch.device("cpu")
        each = _RUNS * (most // _RUNS)
        self.counts = tuple(n if (n := t.numel()) <= most else each for t in tensors)

    def take(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """float32 (tensors, width), zero after a tensor's last element, and where it is ``None``.

        >>> Elements([torch.zeros(2), torch.zeros(3)], 8).take([torch.ones(2), None])
        tensor([[1., 1., 0.],
                [0., 0., 0.]])
        """
        found = torch.zeros(len(tensors), self._width, device=self._device)
        pairs = [
            (found[row, : part.numel()].view(part.shape), part)
            for row, tensor in enumerate(tensors)
            if tensor is not None and tensor.numel()
            for part in [_spread(tensor.reshape(-1), self._most)]
        ]
        if pairs:
            torch._foreach_copy_([to for to, _ in pairs], [part for _, part in pairs])
        return found


def _spread(flat: Tensor, most: int) -> Tensor:
    """
    >>> _spread(torch.arange(300), 128)[:3].tolist()
    [[0, 1], [4, 5], [8, 9]]
    """
    if flat.numel() <= most:
        return flat[None]
    each = flat.numel() // _RUNS
    return flat[: _RUNS * each].view(_RUNS, each)[:, : most // _RUNS]


def signs(width: int, device: torch.device) -> Tensor:
    """(2, width) of ±1: two fixed patterns without a short period."""
    place = torch.arange(width, device=device, dtype=torch.int64)
    mixed = torch.stack([place * 0x9E3779B1 >> 15, place * 0x85EBCA6B >> 17])
    return (1 - 2 * (mixed & 1)).float()
