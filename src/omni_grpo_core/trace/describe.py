"""One short line describing a tensor, for people who read a trace as text."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

import numpy as np
import torch

from omni_grpo_core.trace import INTEGERS, dtype_name
from omni_grpo_core.trace.runs import runs

_READABLE_RUNS = 100
"""Integer tensors with up to this many runs are given in full: masks, positions, and the ids of a
short prompt. A recorder describes every tensor of a step, and makes its trainer wait."""
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Floats that torch can sum and compare as they are."""
_SUMMED_UP_TO = 1 << 22
"""Elements; above this, statistics would cost more than writing the tensor."""


def summary(tensor: torch.Tensor) -> str:
    """Integers as runs if they are few, else the range and, for floats, the mean.

    >>> summary(torch.tensor([[0, 1, 2, 3, 4, 4, 4]]))
    '0..3 step 1, 4×3'
    >>> summary(torch.tensor([0.5, float("nan"), 1.5]))
    'min 0.5 max 1.5 mean 1, 1 non-finite'
    """
    flat = tensor.flatten()
    if not len(flat) or len(flat) > _SUMMED_UP_TO:
        return f"{len(flat)} elements"
    if dtype_name(tensor) in INTEGERS:
        wide = flat.numpy()  # torch has no min of uint64
        found = list(islice(runs(wide), _READABLE_RUNS + 1)) if _readable(wide) else []
        if 0 < len(found) <= _READABLE_RUNS:
            return ", ".join(map(str, found))
        return f"min {int(wide.min())} max {int(wide.max())}"
    # one pass if all are finite, as is usual: a recorder describes every tensor of a step
    finite = flat if flat.dtype in _PLAIN else flat.to(torch.float64)
    mean = finite.mean(dtype=torch.float64)
    if not mean.isfinite():
        finite = finite[finite.isfinite()].to(torch.float64)
        if not len(finite):
            return f"no finite values, {len(flat)} non-finite"
        mean = finite.mean()
    nonfinite = f", {len(flat) - len(finite)} non-finite" if len(finite) < len(flat) else ""
    low, high = finite.aminmax()
    return f"min {float(low):.4g} max {float(high):.4g} mean {float(mean):.4g}{nonfinite}"


def _readable(integers: np.ndarray[Any, Any]) -> bool:
    """Whether they may be few runs: a run has one step, so its end is at most two changes of it."""
    steps = np.diff(integers.view(np.uint8) if integers.dtype == bool else integers)
    return len(integers) <= 1 << 16 and bool(np.count_nonzero(np.diff(steps)) <= 2 * _READABLE_RUNS)


_PIXELS = re.compile(r"(?:pixel|frames)")
_ALIKE = 0.9999
"""Correlation above which two colour channels count as the same image: normalising gives each
channel its own scale and offset, to which correlation is invariant."""
_MOST_ROWS = 1 << 16


def describe_change(path: str, was: torch.Tensor, now: torch.Tensor) -> str:
    """A few words on how ``now`` follows from ``was``, both float64 of one shape, or ``""``.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    >>> describe_change("features", x, x[[2, 1, 0]])
    'the rows are reordered: row 0 was row 2, row 2 was row 0'
    >>> describe_change("features", x, 0.5 * x)
    'every element ×0.5'
    >>> describe_change("features", x, torch.zeros_like(x))
    'every element is now 0'
    """
    lost = int((was.isfinite() & ~now.isfinite()).sum())
    if lost:
        return f"{lost} elements are now non-finite"
    if not bool((was.isfinite() & now.isfinite()).all()):
        return ""
    if now.numel() > 1 and bool((now == now.flatten()[0]).all()):
        return f"every element is now {float(now.flatten()[0]):g}"
    if _PIXELS.search(path) and _channels_reversed(was, now):
        return "the colour channels are reversed (RGB ↔ BGR)"
    return _row_order(was, now) or _factor(was, now)


def _channels_reversed(was: torch.Tensor, now: torch.Tensor) -> bool:
    if was.ndim >= 3 and was.shape[-3] == 3:
        a, b = was.movedim(-3, 0), now.movedim(-3, 0)
    elif was.ndim == 2 and was.shape[1] % 3 == 0:  # patches: channels outermost within a patch
        a, b = (x.reshape(len(x), 3, -1).movedim(1, 0) for x in (was, now))
    else:
        return False
    # a grey image is the same either way: then something else changed
    swapped = _alike(a[0], b[2]) and _alike(a[2], b[0]) and _alike(a[1], b[1])
    return swapped and not _alike(a[0], b[0])


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    size = a.norm() * b.norm()
    return bool(size > 0) and bool((a @ b) / size > _ALIKE)


def _row_order(was: torch.Tensor, now: torch.Tensor) -> str:
    if was.ndim < 2 or not 2 <= len(was) <= _MOST_ROWS:
        return ""
    before = [row.numpy().tobytes() for row in was.contiguous()]
    after = [row.numpy().tobytes() for row in now.contiguous()]
    if sorted(before) != sorted(after):
        return ""
    origin = {row: number for number, row in reversed(list(enumerate(before)))}
    moved = [f"row {i} was row {origin[row]}" for i, row in enumerate(after) if row != before[i]]
    rest = f", … ({len(moved)} rows in all)" if len(moved) > 3 else ""
    return f"the rows are reordered: {', '.join(moved[:3])}{rest}"


def _factor(was: torch.Tensor, now: torch.Tensor) -> str:
    size = float((was * was).sum())
    if was.numel() < 2 or size == 0:
        return ""
    factor = float((was * now).sum()) / size
    # relative to the largest value, not to each: rounding near zero does not count
    unexplained = float((now - factor * was).abs().max())
    if abs(factor - 1) > 1e-3 and unexplained <= 1e-5 * float(now.abs().max()):
        return f"every element ×{factor:.4g}"
    return ""
