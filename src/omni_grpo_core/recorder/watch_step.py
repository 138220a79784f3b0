"""Watches backward and the optimizer's step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from omni_grpo_core.recorder.hooks import Patches
from omni_grpo_core.recorder.step_buffer import StepBuffer
from omni_grpo_core.recorder.tensors import local
from omni_grpo_core.recorder.thinker import Found, part_of
from omni_grpo_core.trace.calls import StepSeen

_SAMPLED = 16
"""Parameters per part that are compared before and after a step; below, elements of each."""
_ELEMENTS = 1024


class StepWatch:
    """Calls ``on_step`` after every optimizer step."""

    def __init__(
        self,
        found: Found,
        buffer: StepBuffer,
        settings: Mapping[str, Any],
        on_step: Callable[[], None],
    ) -> None:
        self._found, self._buffer, self._settings, self._on_step = found, buffer, settings, on_step
        self._losses: list[Tensor] = []
        self._inside = False
        self._handles: list[Any] = []
        self._before: _Before | None = None
        self._step = 0

    def start(self, patches: Patches) -> None:
        backward = torch.autograd.backward

        @functools.wraps(backward)
        def watched(tensors: Any, *args: Any, **keywords: Any) -> Any:
            if self._inside:  # re-entrant checkpointing runs a backward inside the backward
                return backward(tensors, *args, **keywords)
            self._inside = True
            try:
                with self._buffer.guarded("backward"):
                    self._note_losses(tensors)
                return backward(tensors, *args, **keywords)
            finally:
                self._inside = False

        # Tensor.backward ends here, as does a call for several losses at once
        patches.set(torch.autograd, "backward", watched)
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._losses.clear()
        self._before = None

    def _note_losses(self, tensors: Any) -> None:
        for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
            if isinstance(tensor, Tensor) and tensor.numel() == 1:
                self._losses.append(tensor.detach().clone().flatten()[0])

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        with self._buffer.guarded("optimizer step"):
            self._before = _Before(self._found.outer, optimizer)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        with self._buffer.guarded("optimizer step"):
            before, self._before = self._before, None
            losses, self._losses = tuple(float(loss) for loss in self._losses), []
            # a second optimizer of the same step adds nothing
            if before is None or not (losses or self._buffer.records):
                return
            rate = optimizer.param_groups[0].get("lr") if optimizer.param_groups else None
            self._buffer.add(
                StepSeen(
                    step=self._step,
                    trainable=before.trainable,
                    grad_norms={part: float(norm) for part, norm in before.norms.items()},
                    held=before.held,
                    changed=before.changed(),
                    losses=losses,
                    learning_rate=None if rate is None else float(rate),
                    settings=self._buffer.plain.mapping(self._settings),
                    warnings=self._buffer.warnings,
                )
            )
            self._step += 1
            self._on_step()


class _Before:
    """The model just before a step."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.trainable: dict[str, int] = {}
        self.held: dict[str, int] = {}
        gradients: dict[str, list[Tensor]] = {}
        watched: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            part, holds = part_of(name), id(parameter) in held
            if parameter.requires_grad:
                self.trainable[part] = self.trainable.get(part, 0) + parameter.numel()
            if holds:
                self.held[part] = self.held.get(part, 0) + parameter.numel()
            # a rank may hold no shard of a parameter
            if (parameter.requires_grad or holds) and local(parameter).numel():
                watched.setdefault(part, []).append(parameter)
            if parameter.grad is not None:
                gradients.setdefault(part, []).append(local(parameter.grad))
        self.norms = {part: get_total_norm(given) for part, given in gradients.items()}
        self._sampled = {
            part: [(p, _first(p).clone()) for p in _spread(parameters)]
            for part, parameters in watched.items()
        }

    def changed(self) -> dict[str, bool]:
        return {
            part: any(not torch.equal(_first(p), before) for p, before in sampled)
            for part, sampled in self._sampled.items()
        }


def _spread(parameters: list[nn.Parameter]) -> Iterable[nn.Parameter]:
    """Some of them, from first to last, in pairs: LoRA's B matrix changes first, and it follows
    every A."""
    pairs = [parameters[i : i + 2] for i in range(0, len(parameters), 2)]
    stride = max(1, -(-len(pairs) * 2 // _SAMPLED))
    return [parameter for pair in pairs[::stride] for parameter in pair]


def _first(parameter: nn.Parameter) -> Tensor:
    return local(parameter).flatten()[:_ELEMENTS]
