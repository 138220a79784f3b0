"""Proof by reproduction: which small change of the right value gives the recorded one?

A cause is proved when the reference's value, changed in one way and by at most one fitted number,
*is* the recording: exactly, or within the limit that two sound runs keep. What only resembles it is
not listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Reproduction:
    """``name``: of the change (``"reversed"``). ``sentence``: it with its number, to follow "is
    the reference" (``"in reverse order"``, ``"times 2"``). ``values``: its parameters."""

    name: str
    sentence: str
    values: Mapping[str, Any] = field(default_factory=dict)


def reproductions(want: Tensor, got: Tensor, limit: float = 0.0) -> tuple[Reproduction, ...]:
    """Every change of ``want`` that gives ``got``, simplest first; empty where none does, or where
    they are equal.

    Axis 0 is the order of items (frames, rows, tokens, samples). ``limit``: largest difference
    allowed at any element, relative to the largest magnitude of ``got``; 0 demands equality.

    >>> frames = torch.tensor([[1.0], [2.0], [4.0]])
    >>> [found.sentence for found in reproductions(frames, frames.flip(0))]
    ['in reverse order']
    """
    if _is(want, got, limit):
        return ()
    return tuple(found for change in _CHANGES for found in change(want, got, limit))


def _is(made: Tensor, got: Tensor, limit: float) -> bool:
    if made.shape != got.shape:
        return False
    if not limit:
        return bool(torch.equal(made.to(got.dtype), got))
    largest = float(got.abs().max()) if got.numel() else 0.0
    return bool(((made.double() - got.double()).abs() <= limit * largest).all())


_Change = Callable[[Tensor, Tensor, float], Iterator[Reproduction]]


def _reversed(want: Tensor, got: Tensor, limit: float) -> Iterator[Reproduction]:
    if want.dim() and len(want) > 1 and _is(want.flip(0), got, limit):
        yield Reproduction("reversed", "in reverse order")


_CHANGES: tuple[_Change, ...] = (_reversed,)
