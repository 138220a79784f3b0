"""Watches backward, gradient scalers and the optimizers' step."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from omni_grpo_core.recorder.hooks import Patches
from omni_grpo_core.recorder.kl_gaps import has_ratio_to_itself, kl_gaps
from omni_grpo_core.recorder.layers import Held, Layers, gradient_norms
from omni_grpo_core.recorder.step_buffer import StepBuffer, died_in
from omni_grpo_core.recorder.thinker import Found
from omni_grpo_core.trace.calls import StepSeen


class StepWatch:
    """Calls ``on_step`` after every optimizer step; with several optimizers, after the last of them
    that holds a parameter with a gradient."""

    def __init__(
        self,
        found: Found,
        buffer: StepBuffer,
        settings: Mapping[str, Any],
        on_step: Callable[[], None],
    ) -> None:
        self._model, self._buffer = found.outer, buffer
        self._settings, self._on_step = settings, on_step
        self._losses: list[Tensor] = []
        self._gaps: list[Tensor] = []
        self._dropped = 0
        self._to_itself = False
        self._inside = False
        self._handles: list[Any] = []
        self._layers: Layers | None = None
        self._stepped: dict[int, Optimizer] = {}
        self._start: Tensor | None = None
        self._last: Tensor | None = None
        self._stale: Mapping[int, Tensor] = {}
        self._scale: Tensor | None = None
        self._resting: set[int] = set()
        self._step = 0

    def start(self, patches: Patches) -> None:
        backward, scaled = torch.autograd.backward, GradScaler.step

        @functools.wraps(backward)
        def watched(tensors: Any, *args: Any, **keywords: Any) -> Any:
            if self._inside:  # re-entrant checkpointing runs a backward inside the backward
                return backward(tensors, *args, **keywords)
            self._inside = True
            try:
                with self._buffer.guarded("backward"):
                    self._before_backward(tensors)
                result = backward(tensors, *args, **keywords)
                with self._buffer.guarded("backward"):
                    self._after_backward()
                return result
            except BaseException as raised:
                died_in(raised, "loss")
                raise
            finally:
                self._inside = False

        @functools.wraps(scaled)
        def scaler_step(scaler: Any, optimizer: Any, *args: Any, **keywords: Any) -> Any:
            step = self._step
            self._scale = getattr(scaler, "_scale", None)
            result = scaled(scaler, optimizer, *args, **keywords)
            if self._step == step and not self._stepped and self._layers is not None:
                with self._buffer.guarded("optimizer step"):
                    self._layers.before_step()
                    self._finish("skipped", [optimizer])
            self._scale = None
            return result

        # Tensor.backward ends here, as does a call for several losses at once
        patches.set(torch.autograd, "backward", watched)
        patches.set(GradScaler, "step", scaler_step)
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._losses:
            with self._buffer.guarded("optimizer step"):
                self._add("stepped" if self._stepped else "never", [*self._stepped.values()])
        self._losses.clear()
        self._gaps.clear()
        self._dropped = 0
        self._to_itself = False
        self._stepped.clear()
        self._layers = self._start = self._last = None

    def _before_backward(self, tensors: Any) -> None:
        if self._stepped:  # another optimizer was waited for, in vain
            self._finish("stepped", [*self._stepped.values()])
        if self._layers is None:
            self._stale = gradient_norms(self._model)
        else:
            self._dropped += self._layers.are_gone()
        for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
            if isinstance(tensor, Tensor) and tensor.numel() == 1:
                self._losses.append(tensor.detach().clone().flatten()[0])
                self._gaps += kl_gaps([tensor])
                self._to_itself = self._to_itself or has_ratio_to_itself([tensor])

    def _after_backward(self) -> None:
        if self._layers is None:
            self._layers = Layers(self._model, self._last, self._stale, self._start)
        self._layers.after_backward()

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        with self._buffer.guarded("optimizer step"):
            if self._layers is None:
                self._layers = Layers(self._model, self._last, start=self._start)
            if not any(optimizer.state.values()):
                self._resting.add(id(optimizer))
            self._layers.before_step(
                _parameters(optimizer) if self._stepped else None,
                _parameters(optimizer) if id(optimizer) in self._resting else (),
            )

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        with self._buffer.guarded("optimizer step"):
            # an optimizer of another model, or a second step without a backward, adds nothing
            if self._layers is None or not (self._losses or self._buffer.records):
                self._layers = None
                return
            self._stepped[id(optimizer)] = optimizer
            if not self._waits():
                self._finish("stepped", [*self._stepped.values()])

    def _waits(self) -> bool:
        """Whether another optimizer holds parameters that have a gradient and were not updated."""
        if self._layers is None:
            return False
        rest = self._layers.unheld(p for o in self._stepped.values() for p in _parameters(o))
        if not rest:
            return False
        # rare, and there is no register of optimizers
        others = (o for o in gc.get_objects() if issubclass(type(o), Optimizer))
        return any(
            id(p) in rest for o in others if id(o) not in self._stepped for p in _parameters(o)
        )

    def _finish(
        self, outcome: Literal["stepped", "skipped", "never"], optimizers: list[Optimizer]
    ) -> None:
        self._add(outcome, optimizers)
        self._losses.clear()
        self._gaps.clear()
        self._dropped = 0
        self._to_itself = False
        self._stepped.clear()
        self._layers = None
        self._step += 1
        self._on_step()

    def _add(
        self, outcome: Literal["stepped", "skipped", "never"], optimizers: list[Optimizer]
    ) -> None:
        layers = self._layers or Layers(self._model, self._last, start=self._start)
        held = Held.of(optimizers, self._model)
        self._start, self._last = layers.first, layers.end()
        seen, factor = layers.seen(held, self._last)
        if any(layer.norm for layer in seen):  # gradients of 0 leave no momentum
            self._resting.clear()
        self._buffer.add(
            StepSeen(
                step=self._step,
                outcome=outcome,
                layers=seen,
                losses=tuple(float(loss) for loss in self._losses),
                kl_gaps=tuple(float(gap) for gap in self._gaps),
                dropped=self._dropped,
                ratio_to_itself=self._to_itself,
                factor=factor,
                scale=None if self._scale is None else float(self._scale),
                rates=held.groups,
                planned=held.planned,
                others=held.others,
                settings=self._buffer.plain.mapping(self._settings),
                warnings=self._buffer.warnings,
                downhill=layers.downhill(self._last),
            )
        )


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in getattr(optimizer, "param_groups", ()) for p in group["params"]]
