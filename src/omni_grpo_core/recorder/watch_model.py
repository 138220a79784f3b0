"""Watches ``generate`` and every forward outside it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.dialect import tokens_cached
from omni_grpo_core.recorder.hooks import Patches, arguments
from omni_grpo_core.recorder.step_buffer import Outcome, StepBuffer, clock
from omni_grpo_core.recorder.tensors import chosen, copied, token_logprobs
from omni_grpo_core.recorder.thinker import Found, modes
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall, Modes, TensorSeen

_TOGETHER = 16
"""Tokens per row that are scored at once."""


@dataclass(slots=True)
class _Generating:
    """One ``generate`` in progress. Values stay on the device until it ends: reading one would
    synchronise at every token."""

    modes: Modes | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    keywords: dict[str, Any] = field(default_factory=dict)
    config: Any = None
    passes: int = 0
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    first_logits: Tensor | None = None
    cached: list[Any] = field(default_factory=list)
    step_positions: list[Tensor] = field(default_factory=list)
    last: Tensor | None = None
    waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
    large: dict[str, TensorSeen] = field(default_factory=dict)

    @property
    def temperature(self) -> float:
        sampling = getattr(self.config, "do_sample", False)
        return float(getattr(self.config, "temperature", None) or 1.0) if sampling else 1.0

    def sampled(self, tokens: Tensor) -> None:
        """``tokens`` (N,) were sampled from the last logits (N, V). Scoring each token separately
        would launch more kernels than the rest of the recorder."""
        if self.last is not None and not self.beams:
            self.waiting.append((self.last, tokens))
        self.last = None
        if len(self.waiting) >= _TOGETHER:
            self.score()

    def score(self) -> None:
        waiting, self.waiting = self.waiting, []
        if waiting:
            logits = torch.stack([one for one, _ in waiting])
            tokens = torch.stack([one for _, one in waiting])
            scores = chosen(logits.flatten(0, 1), tokens.flatten(), self.temperature)
            self.logprobs.append(scores.view(tokens.shape))

    @property
    def beams(self) -> bool:
        return (getattr(self.config, "num_beams", None) or 1) > 1


@dataclass(slots=True)
class _Forward:
    """One forward in progress."""

    module: Any
    started: float
    heard: dict[str, None]
    modes: Modes | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keywords: dict[str, Any] = field(default_factory=dict)
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    large: dict[str, TensorSeen] = field(default_factory=dict)


class ModelWatch:
    """Hooks on the thinker and its text model, and a wrapped ``generate``."""

    def __init__(self, found: Found, buffer: StepBuffer) -> None:
        self._found, self._buffer = found, buffer
        self._generating: _Generating | None = None
        self._forward: _Forward | None = None
        self._handles: list[Any] = []

    def start(self, patches: Patches) -> None:
        thinker, text_model = self._found.thinker, self._found.text_model
        self._handles = [text_model.register_forward_pre_hook(self._text_model, with_kwargs=True)]
        # a compiled thinker's own hooks do not run, so its compiled wrapper is watched too
        for module in (thinker, *self._found.compiled):
            self._handles += [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]
        if getattr(thinker, "_compiled_call_impl", None) is not None:
            patches.set(thinker, "_compiled_call_impl", self._around(thinker))
        for name, call in (
            ("generate", self._generate),
            ("_prepare_generation_config", self._prepare),
        ):
            if hasattr(thinker, name):
                patches.set(thinker, name, self._instead(name, call))

    def _around(self, thinker: Any) -> Callable[..., Any]:
        """The call of a module compiled in place, whose hooks are inside the compiled graph."""
        compiled = thinker._compiled_call_impl

        def called(*args: Any, **keywords: Any) -> Any:
            self._before(thinker, args, keywords)
            output = None
            try:
                output = compiled(*args, **keywords)
                return output
            finally:
                self._after(thinker, args, keywords, output)

        return called

    def _instead(self, name: str, call: Callable[..., Any]) -> MethodType:
        """A method bound to the model rather than a closure over it: ``copy.deepcopy`` of the model
        binds it to the copy, which is then not mistaken for the original."""
        thinker = self._found.thinker
        before = vars(thinker).get(name)

        @functools.wraps(getattr(type(thinker), name, before))
        def instead(model: Any, *args: Any, **keywords: Any) -> Any:
            if model is not thinker:
                return getattr(type(model), name)(model, *args, **keywords)
            original = before or MethodType(getattr(type(model), name), model)
            return call(original, args, keywords)

        return MethodType(instead, thinker)

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._generating = self._forward = None

    # ------------------------------------------------------------------ generate

    def _prepare(
        self, call: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        made = call(*args, **keywords)
        if self._generating is not None:
            self._generating.config = made[0] if isinstance(made, tuple) else made
        return made

    def _generate(
        self, call: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        if self._generating is not None:
            return call(*args, **keywords)
        buffer, state, grad = self._buffer, _Generating(), torch.is_grad_enabled()
        with buffer.guarded("generate"):
            given = {**({"inputs": args[0]} if args else {}), **keywords}
            state.inputs, state.keywords = buffer.keep_all(given, state.large)
            state.modes = modes(self._found, grad_enabled=grad)
        self._generating = state
        with buffer.watching("generate", functools.partial(self._generated, state)) as outcome:
            outcome.result = call(*args, **keywords)
            return outcome.result

    def _generated(self, state: _Generating, outcome: Outcome) -> None:
        self._generating = None
        if state.modes is not None:
            self._buffer.add(self._seen(state, state.modes, outcome), outcome.seconds)

    def _seen(self, state: _Generating, before: Modes, outcome: Outcome) -> GenerateCall:
        buffer = self._buffer
        sequences = getattr(outcome.result, "sequences", outcome.result)
        sequences = sequences if isinstance(sequences, Tensor) else None
        if sequences is not None:  # the last token was never fed back
            state.sampled(sequences[:, -1])
        state.score()
        deltas = getattr(self._found.thinker, "rope_deltas", None)
        if deltas is None:
            deltas = getattr(self._found.thinker.model, "rope_deltas", None)
        config = state.config.to_dict() if hasattr(state.config, "to_dict") else {}
        return GenerateCall(
            inputs=state.inputs,
            keywords=state.keywords,
            config=buffer.plain.mapping(
                # underscored: tensors that generate derives from other settings
                {k: v for k, v in config.items() if v is not None and not k.startswith("_")}
            ),
            modes=before,
            sequences=None
            if sequences is None
            else buffer.keep("sequences", sequences, state.large),
            position_ids=state.position_ids,
            inputs_embeds=state.inputs_embeds,
            rope_deltas=copied(deltas).flatten() if isinstance(deltas, Tensor) else None,
            first_logits=state.first_logits,
            cached=tuple(None if n is None else int(n) for n in state.cached),
            step_positions=(
                tuple(torch.stack(state.step_positions).tolist()) if state.step_positions else ()
            ),
            logprobs=torch.cat(state.logprobs).T.contiguous().cpu() if state.logprobs else None,
            warnings=outcome.warnings,
            error=outcome.error,
            large=state.large,
        )

    # ------------------------------------------------------------------ forward

    def _before(self, module: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():  # the recorder must not become part of the graph
            return
        buffer, grad = self._buffer, torch.is_grad_enabled()
        with buffer.guarded("forward"):
            if self._generating is not None:
                self._next_pass(self._generating, args, keywords)
                return
            if self._forward is not None:
                if self._forward.module is not module:  # the forward of a wrapper around this one
                    return
                buffer.unlisten(self._forward.heard)  # it was interrupted without its hook running
            forward = self._forward = _Forward(module, clock(), buffer.listen())
            given = arguments(self._found.thinker.forward, args, keywords)
            forward.tensors, forward.keywords = buffer.keep_all(given, forward.large)
            forward.modes = modes(self._found, grad_enabled=grad)

    def _next_pass(
        self, state: _Generating, args: tuple[Any, ...], keywords: Mapping[str, Any]
    ) -> None:
        state.passes += 1
        if state.passes == 1:
            return
        given = arguments(self._found.thinker.forward, args, keywords) if args else keywords
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if isinstance(ids, Tensor):
            state.sampled(ids[:, -1])
        # here and not in the text model's hook: some versions raise before calling it
        held, fed = tokens_cached(given), ids if isinstance(ids, Tensor) else embeds
        more = fed.shape[1] - 1 if isinstance(fed, Tensor) else 0
        state.cached.append((held or 0) + more if held is not None or more else None)

    def _text_model(self, _module: Any, _args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        with self._buffer.guarded("text model"):
            where, embeds = keywords.get("position_ids"), keywords.get("inputs_embeds")
            state = self._generating
            if state is not None and state.passes > 1:
                if isinstance(where, Tensor):
                    state.step_positions.append(_three_axes(where)[0, 0, -1])
                return
            into = state or self._forward
            if into is None:
                return
            if isinstance(where, Tensor):
                into.position_ids = copied(_three_axes(where))
            if isinstance(embeds, Tensor):
                into.inputs_embeds = self._buffer.keep("inputs_embeds", embeds, into.large)

    def _after(self, module: Any, args: Any, keywords: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        buffer, state = self._buffer, self._generating
        with buffer.guarded("forward"):
            logits = getattr(output, "logits", None)
            if state is not None:
                if isinstance(logits, Tensor):
                    # a copy: samplers may scale in place, and a view would keep all logits alive
                    state.last = logits[:, -1].detach().clone()
                    if state.passes == 1:
                        first = state.last.float()
                        state.first_logits = buffer.keep("first_logits", first, state.large)
                return
            forward = self._forward
            if forward is None or forward.module is not module:
                return
            self._forward = None
            warnings, raised = buffer.unlisten(forward.heard), sys.exc_info()[1]
            if forward.modes is None:
                return
            buffer.add(
                ForwardCall(
                    inputs=forward.tensors,
                    keywords=forward.keywords,
                    modes=forward.modes,
                    position_ids=forward.position_ids,
                    inputs_embeds=forward.inputs_embeds,
                    logprobs=_scored(logits, keywords.get("input_ids", args[0] if args else None)),
                    logits_dtype=(
                        "" if logits is None else str(logits.dtype).removeprefix("torch.")
                    ),
                    warnings=warnings,
                    # the hook also runs for a forward that raised, with no output
                    error=buffer.plain.error(raised) if output is None and raised else None,
                    large=forward.large,
                ),
                clock() - forward.started,
            )


def _three_axes(where: Tensor) -> Tensor:
    """(3, N, length): from 5.x on text positions may come first; a text-only model has one axis."""
    return where.expand(3, *where.shape) if where.dim() == 2 else where[-3:]


def _scored(logits: Any, ids: Any) -> Tensor | None:
    """Logprob of each token after the first: (N, length - 1), NaN where it has no logits."""
    if not isinstance(logits, Tensor) or not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    length, given = ids.shape[1], min(logits.shape[1], ids.shape[1])
    scores = torch.full((ids.shape[0], length - 1), torch.nan)
    if given > 1:
        known = token_logprobs(logits[:, -given:-1], ids[:, -given + 1 :])
        scores[:, length - given :] = known.cpu()
    return scores
