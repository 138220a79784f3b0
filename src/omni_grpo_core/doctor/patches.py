"""Patches of a processor as the pictures that they were cut from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

_COLOURS, _TIMES = 3, 2
"""Of every published Qwen-VL and Qwen-Omni processor: a patch spans two frames."""


def pictures_of(patches: Tensor, grid: Sequence[int], merge: int) -> Tensor | None:
    """(T, 3, H, W) of the patches (t * h * w, 3 * 2 * P * P) of one item, of which ``merge`` a side
    stand together; ``None`` where they are not of that form.

    A patch holds one colour after the other, each of two frames.
    """
    t, h, w = grid
    side = round((patches.shape[-1] / (_COLOURS * _TIMES)) ** 0.5)
    whole = (t * h * w, _COLOURS * _TIMES * side * side)
    if tuple(patches.shape) != whole or h % merge or w % merge:
        return None
    parts = (t, h // merge, w // merge, merge, merge, _COLOURS, _TIMES, side, side)
    pictures = patches.reshape(parts).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return pictures.reshape(t * _TIMES, _COLOURS, h * side, w * side)
