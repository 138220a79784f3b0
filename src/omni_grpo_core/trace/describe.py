"""One short line on a tensor, for people who read a trace as text."""

from __future__ import annotations

import re
from itertools import islice

import torch

from omni_grpo_core.trace import INTEGERS, dtype_name
from omni_grpo_core.trace.runs import runs

_READABLE_RUNS = 400
"""Integer tensors of up to this many runs are given in full: a prompt of ordinary text, ids and
all, and every mask and position of it."""
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Floats that torch can sum and compare as they are."""
_SUMMED_UP_TO = 1 << 22
"""Elements; beyond, statistics would cost more than writing the tensor."""


def summary(tensor: torch.Tensor) -> str:
    """Integers as runs where they are few, else the range and, of floats, the mean.

    >>> summary(torch.tensor([[0, 1, 2, 3, 4, 4, 4]]))
    '0..3 step 1, 4×3'
    >>> summary(torch.tensor([0.5, float("nan"), 1.5]))
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


_PIXELS = re.compile(r"(?:pixel|frames)")
_ALIKE = 0.9999
"""Correlation from which two colour channels are taken for the same picture: normalising gives
each channel its own scale and offset, which correlation does not see."""
_MOST_ROWS = 1 << 16


def describe_change(path: str, was: torch.Tensor, now: torch.Tensor) -> str:
    """A few words on how ``now`` comes from ``was``, both float64 of one shape, or ``""``.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    >>> describe_change("features", x, x[[2, 1, 0]])
    'the rows are in another order: row 0 is what row 2 was, row 2 is what row 0 was'
    >>> describe_change("features", x, 0.5 * x)
    'every element ×0.5'
    >>> describe_change("features", x, torch.zeros_like(x))
    'every element is 0 now'
    """
    lost = int((was.isfinite() & ~now.isfinite()).sum())
    if lost:
        return f"{lost} elements are not finite now"
    if not bool((was.isfinite() & now.isfinite()).all()):
        return ""
    if now.numel() > 1 and bool((now == now.flatten()[0]).all()):
        return f"every element is {float(now.flatten()[0]):g} now"
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
    # a grey picture is the same either way: then the channels are not what changed
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
    moved = [
        f"row {i} is what row {origin[row]} was" for i, row in enumerate(after) if row != before[i]
    ]
    rest = f", … ({len(moved)} rows in all)" if len(moved) > 3 else ""
    return f"the rows are in another order: {', '.join(moved[:3])}{rest}"


def _factor(was: torch.Tensor, now: torch.Tensor) -> str:
    size = float((was * was).sum())
    if was.numel() < 2 or size == 0:
        return ""
    factor = float((was * now).sum()) / size
    # of the scale of the values, not of each: rounding near zero is no counter-example
    unexplained = float((now - factor * was).abs().max())
    if abs(factor - 1) > 1e-3 and unexplained <= 1e-5 * float(now.abs().max()):
        return f"every element ×{factor:.4g}"
    return ""
