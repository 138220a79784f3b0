"""One short line on a tensor, for people who read a trace as text."""

from __future__ import annotations

from itertools import islice

import torch

from omni_grpo_core.trace.dtypes import INTEGERS, dtype_name
from omni_grpo_core.trace.runs import runs

_READABLE_RUNS = 400
"""Integer tensors of up to this many runs are given in full: a prompt of ordinary text, ids and
all, and every mask and position of it."""
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Floats that torch can sum and compare as they are."""
_SUMMED_UP_TO = 1 << 22
"""Elements; beyond, statistics would cost more than writing the tensor."""


def about(tensor: torch.Tensor) -> str:
    """Integers as runs where they are few, else the range and, of floats, the mean.

    >>> about(torch.tensor([[0, 1, 2, 3, 4, 4, 4]]))
    '0..3 step 1, 4×3'
    >>> about(torch.tensor([0.5, float("nan"), 1.5]))
    'min 0.5 max 1.5 mean 1, 1 not finite'
    """
    flat = tensor.flatten()
    if not len(flat) or len(flat) > _SUMMED_UP_TO:
        return f"{len(flat)} elements"
    if dtype_name(tensor) in INTEGERS:
        integers = [int(n) for n in flat.tolist()] if len(flat) <= 1 << 16 else []
        found = list(islice(runs(integers), _READABLE_RUNS + 1))
        if 0 < len(found) <= _READABLE_RUNS:
            return ", ".join(map(str, found))
        wide = flat.numpy()  # torch finds no smallest uint64
        return f"min {int(wide.min())} max {int(wide.max())}"
    # one pass where all are finite, as nearly always: a recorder describes every tensor of a step
    finite = flat if flat.dtype in _PLAIN else flat.to(torch.float64)
    mean = finite.mean(dtype=torch.float64)
    if not mean.isfinite():
        finite = finite[finite.isfinite()].to(torch.float64)
        if not len(finite):
            return f"nothing finite, {len(flat)} not finite"
        mean = finite.mean()
    strange = f", {len(flat) - len(finite)} not finite" if len(finite) < len(flat) else ""
    low, high = finite.aminmax()
    return f"min {float(low):.4g} max {float(high):.4g} mean {float(mean):.4g}{strange}"
