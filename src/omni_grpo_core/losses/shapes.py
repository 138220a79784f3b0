"""Wrong shapes raise errors here instead of being broadcast.

Broadcasting makes a wrong loss look right: ``(N,) * (N, C)`` works at ``N == 1``, raises at most
sizes and, at ``N == C``, multiplies column ``j`` by the advantage of row ``j``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni_grpo_core.errors import TrainError

WIDE = (torch.float32, torch.float64)
"""Dtypes allowed for log-probabilities: bf16 has three digits, too few for a ratio."""


class NotFiniteError(TrainError):
    """A non-finite value among those the loss is computed from."""


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ``TrainError`` unless ``tensor`` has exactly ``shape``."""
    if tuple(tensor.shape) != shape:
        raise TrainError(
            name,
            got=f"shape {tuple(tensor.shape)}",
            want=f"shape {shape}",
            fix="pass the tensor at its full shape: nothing is broadcast here",
        )


def require_mask(name: str, mask: Tensor) -> tuple[int, int]:
    """``mask``: bool, (N, C). Returns ``(N, C)``; raises ``TrainError`` for anything else."""
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise TrainError(
            name,
            got=f"{mask.dtype} of shape {tuple(mask.shape)}",
            want="torch.bool of shape (N, C)",
            fix="pass a mask that is True for the completion tokens that count",
        )
    return mask.shape[0], mask.shape[1]


def require_finite(name: str, values: Tensor, mask: Tensor) -> None:
    """``values``: the shape of ``mask`` (else ``TrainError``), finite wherever ``mask`` is True
    (else ``NotFiniteError``).

    Costs one synchronisation with the device.
    """
    require_shape(name, values, tuple(mask.shape))
    broken = mask & ~torch.isfinite(values)
    if bool(broken.any()):
        row, column = broken.nonzero()[0].tolist()
        raise NotFiniteError(
            f"{name}, completion {row}, token {column}",
            got=str(values[row, column].item()),
            want="a finite number",
            fix="find out where that row comes from: one such value makes every weight NaN",
        )


def require_logprobs(name: str, logprobs: Tensor, mask: Tensor) -> None:
    """As :func:`require_finite`; also float32 or float64."""
    require_finite(name, logprobs, mask)
    if logprobs.dtype not in WIDE:
        raise TrainError(
            name,
            got=str(logprobs.dtype),
            want="float32 or float64",
            fix="take the log-softmax in float32: ratios of 16-bit logprobs are noise",
        )


def expand_advantages(advantages: Tensor, like: Tensor) -> Tensor:
    """Advantages per token, in the dtype and on the device of ``like``.

    ``advantages``: (N,), one per completion, or (N, C), one per token. ``like``: (N, C). Returns
    (N, C). Raises ``TrainError`` for any other shape, including ``(1, C)`` and ``(N, 1)``.

    >>> expand_advantages(torch.tensor([1.0, -1.0]), torch.zeros(2, 2)).tolist()
    [[1.0, 1.0], [-1.0, -1.0]]
    """
    rows, width = like.shape
    if advantages.ndim == 1:
        require_shape("advantages", advantages, (rows,))
        advantages = advantages[:, None].expand(rows, width)
    require_shape("advantages", advantages, (rows, width))
    return advantages.to(device=like.device, dtype=like.dtype)
