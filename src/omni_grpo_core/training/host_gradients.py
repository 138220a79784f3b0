"""Gradients that leave the device as they are made, for pinned memory of the host.

ZeRO-Offload (arXiv 2101.06840, section 4.1) sends gradients out during the backward pass; here the
optimizer stays on the device, and they come back for its step, a part at a time. The other way to
hold few at a time, an update within the backward pass (LOMO, arXiv 2306.09782), needs a second pass
where gradients are clipped by the norm of all.

All numbers are those of gradients that stay, bit by bit: sums are in the gradient's dtype, as
autograd's are; norms and clipping are torch's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from omni_grpo_core.training.memory import OFFLOADED_AT_ONCE, OFFLOADED_OUTSTANDING


class HostGradients:
    """Gradients of ``learning``, all on one device, since the last step.

    ``outstanding``: bytes of gradients that may wait on the device to be copied, more than which
    the backward pass waits for. ``at_once``: bytes of gradients that come back at a time, or one
    that is larger. On a CPU they are copied too, which saves nothing.
    """

    def __init__(
        self,
        learning: Sequence[nn.Parameter],
        *,
        outstanding: int = OFFLOADED_OUTSTANDING,
        at_once: int = OFFLOADED_AT_ONCE,
    ) -> None:
        self._most = outstanding
        self._buckets = [*_buckets(learning, at_once)]
        self._host: dict[nn.Parameter, Tensor] = {}
        for bucket in self._buckets:
            # one block each: the size of a pinned one is rounded up to a power of two
            sizes = [parameter.numel() for parameter in bucket]
            pinned = bucket[0].is_cuda
            block = torch.empty(sum(sizes), dtype=bucket[0].dtype, pin_memory=pinned)
            for parameter, part in zip(bucket, torch.split(block, sizes), strict=True):
                self._host[parameter] = part.view(parameter.shape)
        device = learning[0].device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._norms: dict[nn.Parameter, Tensor] = {}
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._bytes = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Backward passes inside leave ``grad`` of every parameter ``None``."""
        handles: list[Any] = [
            parameter.register_post_accumulate_grad_hook(self._leave)  # type: ignore[no-untyped-call]
            for parameter in self._host
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """On the parameter's device, to be read only; ``None``: it has none."""
        self._arrive()
        if parameter not in self._norms:
            return None
        return self._host[parameter].to(parameter.device, non_blocking=True)

    def norm(self) -> Tensor:
        """Of all gradients, a scalar on the device: what ``clip_grad_norm_`` returns."""
        self._arrive()
        norms = [self._norms[parameter] for parameter in self._host if parameter in self._norms]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(0.0)

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        """Update the weights by gradients that are clipped to ``max_norm``, and drop these.

        ``optimizer`` is called for a part of its parameters at a time; the others have no gradient,
        and it leaves them as they are.
        """
        norm = self.norm()
        for bucket in self._buckets:
            given = [parameter for parameter in bucket if parameter in self._norms]
            for parameter in given:
                parameter.grad = self.gradient(parameter)
            torch.nn.utils.clip_grads_with_norm_(given, max_norm, norm)
            if given:
                optimizer.step()
            for parameter in given:
                parameter.grad = None
        self.drop()

    def drop(self) -> None:
        """The next gradients are the first."""
        self._arrive()
        self._norms.clear()

    @torch.no_grad()
    def _leave(self, parameter: Tensor) -> None:
        """Called by autograd with a gradient that is complete as far as this pass is concerned."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        assert isinstance(parameter, nn.Parameter)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(parameter.device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            host = self._host[parameter]
            if parameter in self._norms:
                gradient += host.to(gradient.device, non_blocking=True)
            self._norms[parameter] = torch.nn.utils.get_total_norm([gradient])
            host.copy_(gradient, non_blocking=True)
        if self._stream is None:
            return
        self._leaving.append((gradient, self._stream.record_event()))
        self._bytes += gradient.nbytes
        while self._bytes > self._most:
            oldest, copied = self._leaving.popleft()
            # its memory is used again by this stream, so after the copy
            torch.cuda.current_stream(parameter.device).wait_event(copied)
            self._bytes -= oldest.nbytes

    def _arrive(self) -> None:
        """What follows on the current stream finds everything on the host."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._leaving.clear()
        self._bytes = 0


def _buckets(learning: Sequence[nn.Parameter], size: int) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one dtype, whose bytes are ``size`` at most, unless it is a single one."""
    bucket: list[nn.Parameter] = []
    bytes_ = 0
    for parameter in learning:
        if bucket and (bytes_ + parameter.nbytes > size or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, bytes_ = [], 0
        bucket.append(parameter)
        bytes_ += parameter.nbytes
    yield bucket
