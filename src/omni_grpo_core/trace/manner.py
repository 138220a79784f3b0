"""What kind of change turned one tensor into another, where a simple one explains it all."""

from __future__ import annotations

import re

import torch

_PIXELS = re.compile(r"(?:pixel|frames)")
_ALIKE = 0.9999
"""Correlation from which two colour channels are taken for the same picture: normalising gives
each channel its own scale and offset, which correlation does not see."""
_MOST_ROWS = 1 << 16


def manner(path: str, was: torch.Tensor, now: torch.Tensor) -> str:
    """A few words on how ``now`` comes from ``was``, both float64 of one shape, or ``""``.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    >>> manner("features", x, x[[2, 1, 0]])
    'the rows are in another order: row 0 is what row 2 was, row 2 is what row 0 was'
    >>> manner("features", x, 0.5 * x)
    'every element ×0.5'
    >>> manner("features", x, torch.zeros_like(x))
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
