"""Steps that are the same bits in every run, for ``full_determinism``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """For a whole run, before its first matrix product: compiled kernels are chosen by rule and not
    by a race between them, and cuBLAS gets the workspace that torch requires of it."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from torch._inductor import config

    with config.patch(deterministic=True):
        yield


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """For a backward pass, which is where kernels add up in an order of their own: torch chooses
    those that do not, and raises ``RuntimeError`` for an operation that has none. What was set
    before is restored."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    # with a warning only, attention would keep its quicker kernel
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
