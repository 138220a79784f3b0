"""Seconds, memory, and how fast the device itself is."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cost:
    """``seconds``: the quickest of the runs. ``gib``: the most device memory that was taken in
    them, weights included; 0 on a CPU."""

    seconds: float
    gib: float


def timed(call: Callable[[], T], device: torch.device, repeats: int = 1) -> tuple[Cost, T]:
    """What a call costs, and what it returned the last time."""
    _settle(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        found = call()
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return Cost(min(seconds), gib), found


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    _wait(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _ten_times(call: Callable[[], Tensor]) -> None:
    for _ in range(10):
        call()


@dataclass(frozen=True, slots=True)
class Speed:
    """Of the device, measured: bytes that a copy moves in a second, read and written; operations of
    a matrix product in a second, a multiplication and an addition being two."""

    bytes: float
    operations: float


def speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Takes a second on a GPU. On a CPU, where nobody trains a real model, a coarse guess."""
    large = device.type == "cuda"
    source = torch.zeros((2**32 if large else 2**22) // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    size = 8192 if large else 256
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    found = []
    calls: list[Callable[[], Tensor]] = [lambda: target.copy_(source), lambda: left @ right]
    for call in calls:
        cost, _ = timed(partial(_ten_times, call), device, repeats=4)
        found.append(cost.seconds / 10)
    copy, product = found
    moved = 2 * source.numel() * dtype.itemsize
    return Speed(moved / copy, 2 * size**3 / product)
