"""A training of one process, without Accelerate."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Alone:
    """One process, plain torch."""

    world = 1

    def gather(self, items: Sequence[T]) -> list[T]:
        return list(items)

    def sum(self, numbers: Tensor) -> Tensor:
        return numbers

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def unsynced(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
