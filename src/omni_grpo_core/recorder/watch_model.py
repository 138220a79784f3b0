"""Watches ``generate`` and every forward outside it, also those of the thinker's class' other
instances: a reference model is a copy, or loaded once more."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from omni_grpo_core.core.dialect import tokens_cached
from omni_grpo_core.recorder.completions import decoded
from omni_grpo_core.recorder.hooks import Patches, arguments
from omni_grpo_core.recorder.loss_gradient import LossGradientWatch, in_backward
from omni_grpo_core.recorder.step_buffer import (
    Outcome,
    Seen,
    StepBuffer,
    clock,
    died_in,
    digest_into,
)
from omni_grpo_core.recorder.tensors import chosen, copied, token_logprobs
from omni_grpo_core.recorder.thinker import (
    Found,
    autocast_of,
    find,
    is_rebound,
    modes,
    weights_apart,
)
from omni_grpo_core.trace import dtype_name
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall, Modes

_SECONDS = ("video_second_per_grid", "second_per_grid_ts")
_TOGETHER = 16
"""Tokens per row that are scored at once."""


@dataclass(slots=True)
class _Generating:
    """One ``generate`` in progress. Values stay on the device until it ends: reading one would
    synchronise at every token. ``found``: the model that runs it. ``apart``: a number on the device
    once its weights were compared with the recorded model's."""

    found: Found
    apart: Tensor | None = None
    modes: Modes | None = None
    seen: Seen = field(default_factory=Seen)
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

    @property
    def temperature(self) -> float:
        sampling = getattr(self.config, "do_sample", False)
        return float(getattr(self.config, "temperature", None) or 1.0) if sampling else 1.0

    @property
    def suppressed(self) -> tuple[int, ...]:
        return tuple(map(int, getattr(self.config, "suppress_tokens", None) or ()))

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
    """One forward in progress. ``ids``: its input ids, if it was given any."""

    module: Any
    started: float
    heard: dict[str, None]
    modes: Modes | None = None
    ids: Any = None
    seen: Seen = field(default_factory=Seen)
    keywords: dict[str, Any] = field(default_factory=dict)
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None


class Hook:
    """A hook that a copy of its module does not inherit."""

    # what our own steps decode is recorded from the result
    omni_skips_decoding = True

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (_nothing,)


def _nothing(*_: Any) -> None: ...


class ModelWatch:
    """Hooks on the thinker and its text model, a wrapped ``generate``, and the call of the
    thinker's class for its other instances. ``processor``: its tokenizer turns completions into
    text."""

    def __init__(self, found: Found, processor: Any, buffer: StepBuffer) -> None:
        self._found, self._buffer = found, buffer
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._generating: _Generating | None = None
        self._forward: _Forward | None = None
        self._handles: list[Any] = []
        self.gradients = LossGradientWatch(found, buffer)
        self._sampling: tuple[float, tuple[int, ...]] = (1.0, ())

    def start(self, patches: Patches) -> None:
        thinker, text_model = self._found.thinker, self._found.text_model
        self._handles = [
            self._on_text_model(text_model),
            text_model.register_forward_hook(Hook(self.gradients.hidden)),
        ]
        # a compiled thinker's own hooks do not run, so its compiled wrapper is watched too
        for module in (thinker, *self._found.compiled):
            self._handles += [
                module.register_forward_pre_hook(Hook(self._before), with_kwargs=True),
                module.register_forward_hook(Hook(self._after), with_kwargs=True, always_call=True),
            ]
        if getattr(thinker, "_compiled_call_impl", None) is not None:
            patches.set(thinker, "_compiled_call_impl", self._around(thinker))
        for name, call in (
            ("generate", self._generate),
            ("_prepare_generation_config", self._prepare),
        ):
            if hasattr(thinker, name):
                patches.set(thinker, name, self._instead(name, call))
        for module in self._found.compiled:
            if is_rebound(module, "generate", thinker):
                patches.set(module, "generate", self._redirected(module))
        # the class that sharding has not replaced by one of its own
        kind = next(kind for kind in type(thinker).__mro__ if "forward" in vars(kind))
        for name, around in (
            ("__call__", self._other),
            ("generate", self._other_generate),
            ("_prepare_generation_config", self._other_prepares),
        ):
            if hasattr(kind, name):
                patches.set(kind, name, self._for_others(getattr(kind, name), kind, around))
        # where a module around the thinker has its forward, the others' thinkers are not called
        for kind in {type(m) for m in self._found.compiled if is_rebound(m, "forward", thinker)}:
            watched = self._for_others(kind.__call__, kind, self._other_around)
            patches.set(kind, "__call__", watched)

    def _on_text_model(self, text_model: nn.Module) -> Any:
        return text_model.register_forward_pre_hook(Hook(self._text_model), with_kwargs=True)

    def _for_others(
        self, original: Callable[..., Any], kind: type, around: Callable[..., Any]
    ) -> Callable[..., Any]:
        """A method of the thinker's class that only its other instances take notice of."""
        own = {id(module) for module in self._found.outer.modules() if isinstance(module, kind)}

        @functools.wraps(original)
        def instead(this: Any, *args: Any, **keywords: Any) -> Any:
            if torch.compiler.is_compiling() or in_backward() or id(this) in own:
                return original(this, *args, **keywords)
            return around(this, functools.partial(original, this), args, keywords)

        return instead

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

    def _redirected(self, module: nn.Module) -> MethodType:
        """``generate`` of a module around the thinker that calls the thinker's function; bound for
        the reason above."""
        before = vars(module)["generate"]

        @functools.wraps(before)
        def instead(model: Any, *args: Any, **keywords: Any) -> Any:
            if model is not module:
                return before(*args, **keywords)
            return self._generate(before, args, keywords)

        return MethodType(instead, module)

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.gradients.stop()
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
        return self._watched(_Generating(self._found), call, args, keywords)

    def _watched(
        self,
        state: _Generating,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> Any:
        buffer, grad = self._buffer, torch.is_grad_enabled()
        with buffer.guarded("generate"):
            given = {**({"inputs": args[0]} if args else {}), **keywords}
            state.keywords = buffer.see(_timed(given), state.seen)
            state.modes = modes(state.found, grad_enabled=grad)
            if state.found is not self._found:
                state.apart = weights_apart(state.found.thinker, self._found.thinker)
        self._generating = state
        with buffer.watching("generate", functools.partial(self._generated, state)) as outcome:
            outcome.result = call(*args, **keywords)
            return outcome.result

    def _generated(self, state: _Generating, outcome: Outcome) -> None:
        self._generating, self.gradients.sampled_at = None, state.temperature
        self._sampling = state.temperature, state.suppressed
        if state.modes is not None:
            self._buffer.add(self._seen(state, state.modes, outcome), outcome.seconds)

    def _seen(
        self, state: _Generating, before: Modes, outcome: Outcome
    ) -> Callable[[], GenerateCall]:
        buffer, seen = self._buffer, state.seen
        sequences = getattr(outcome.result, "sequences", outcome.result)
        if isinstance(sequences, Tensor):  # the last token was never fed back
            state.sampled(sequences[:, -1])
        state.score()
        sequences = buffer.keep("sequences", sequences, seen)
        thinker, own = state.found.thinker, state.found is self._found
        deltas = getattr(thinker, "rope_deltas", None)
        if deltas is None:
            deltas = getattr(thinker.model, "rope_deltas", None)
        deltas = copied(deltas).flatten() if isinstance(deltas, Tensor) else None
        settings = state.config.to_dict() if hasattr(state.config, "to_dict") else {}
        config = buffer.plain.mapping(
            # underscored: tensors that generate derives from other settings
            {k: v for k, v in settings.items() if v is not None and not k.startswith("_")}
        )
        steps = copied(torch.stack(state.step_positions)) if state.step_positions else None
        logprobs = copied(torch.cat(state.logprobs).T) if state.logprobs else None
        return lambda: GenerateCall(
            inputs=seen.tensors,
            keywords=state.keywords,
            config=config,
            modes=before,
            sequences=sequences,
            position_ids=state.position_ids,
            inputs_embeds=state.inputs_embeds,
            rope_deltas=deltas,
            first_logits=state.first_logits,
            cached=tuple(None if n is None else int(n) for n in state.cached),
            step_positions=() if steps is None else tuple(steps.tolist()),
            logprobs=logprobs,
            warnings=outcome.warnings,
            error=outcome.error,
            large=seen.described(),
            digests=seen.digests,
            decoded=self._decoded(seen.tensors, sequences, config),
            own=own,
            apart=0.0 if own else None if state.apart is None else float(state.apart),
        )

    def _decoded(
        self, inputs: Mapping[str, Tensor], sequences: Tensor | None, config: Mapping[str, Any]
    ) -> dict[str, tuple[str, ...]]:
        if sequences is None:
            return {}
        prompt = inputs.get("input_ids", inputs.get("inputs"))
        texts = decoded(self._tokenizer, prompt, sequences, config)
        return {name: tuple(map(self._buffer.plain.text, rows)) for name, rows in texts.items()}

    def _other_generate(
        self, this: Any, call: Callable[..., Any], args: Any, keywords: dict[str, Any]
    ) -> Any:
        if self._generating is not None:
            return call(*args, **keywords)
        found = find(this)
        hook = self._on_text_model(found.text_model)
        try:
            return self._watched(_Generating(found), call, args, keywords)
        finally:
            hook.remove()

    def _other_prepares(
        self, _other: Any, call: Callable[..., Any], args: Any, keywords: dict[str, Any]
    ) -> Any:
        return self._prepare(call, args, keywords)

    # ------------------------------------------------------------------ forward

    def _before(self, module: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        # the recorder must not become part of the graph; a checkpointed forward is run twice
        if torch.compiler.is_compiling() or in_backward():
            return
        grad = torch.is_grad_enabled()
        with self._buffer.guarded("forward"):
            if self._generating is not None:
                if self._generating.found is self._found:
                    self._next_pass(self._generating, args, keywords)
                return
            if self._forward is not None:
                if self._forward.module is not module:  # the forward of a wrapper around this one
                    return
                # it was interrupted without its hook running
                self._buffer.unlisten(self._forward.heard)
            self._begin(self._found, module, args, keywords, grad)

    def _begin(
        self, found: Found, module: Any, args: Any, keywords: Mapping[str, Any], grad: bool
    ) -> None:
        forward = self._forward = _Forward(module, clock(), self._buffer.listen())
        given = arguments(found.thinker.forward, args, keywords)
        forward.ids = given.get("input_ids")
        forward.keywords = self._buffer.see(_timed(given), forward.seen)
        forward.modes = modes(found, grad_enabled=grad)

    def _other(
        self, this: Any, call: Callable[..., Any], args: Any, keywords: dict[str, Any]
    ) -> Any:
        """A forward of another instance."""
        state = self._generating
        found = find(this)
        if state is not None:
            if state.found.thinker is not found.thinker:
                return call(*args, **keywords)
            with self._buffer.guarded("forward"):
                self._next_pass(state, args, keywords)
            output = call(*args, **keywords)
            with self._buffer.guarded("forward"):
                self._passed(state, output)
            return output
        grad, output = torch.is_grad_enabled(), None
        outer, hook = self._forward, self._on_text_model(found.text_model)
        with self._buffer.guarded("forward"):
            self._begin(found, this, args, keywords, grad)
        try:
            output = call(*args, **keywords)
            return output
        finally:
            hook.remove()
            forward, self._forward = self._forward, outer
            if forward is not None and forward is not outer:
                with self._buffer.guarded("forward"):
                    self._end(forward, output, own=False)

    def _other_around(
        self, this: Any, call: Callable[..., Any], args: Any, keywords: dict[str, Any]
    ) -> Any:
        whole = any(type(this) is type(module) for module in self._found.compiled)
        if not whole or "forward" not in vars(this):
            return call(*args, **keywords)
        return self._other(this, call, args, keywords)

    def _next_pass(
        self, state: _Generating, args: tuple[Any, ...], keywords: Mapping[str, Any]
    ) -> None:
        state.passes += 1
        if state.passes == 1:
            return
        given = arguments(state.found.thinker.forward, args, keywords) if args else keywords
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if isinstance(ids, Tensor):
            state.sampled(ids[:, -1])
        # here and not in the text model's hook: some versions raise before calling it
        held, fed = tokens_cached(given), ids if isinstance(ids, Tensor) else embeds
        more = fed.shape[1] - 1 if isinstance(fed, Tensor) else 0
        # a sum even if it adds nothing: a cache may count in a tensor of its own
        state.cached.append(
            (0 if held is None else held) + more if held is not None or more else None
        )

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
            # a wrapper of the model's forward may cast inside it
            if into.modes is not None and (cast := autocast_of(embeds)) is not None:
                into.modes = replace(into.modes, autocast=cast)
            if isinstance(where, Tensor):
                into.position_ids = copied(_three_axes(where))
            if isinstance(embeds, Tensor):
                digest_into(into.seen.digests, "inputs_embeds", embeds)
                into.inputs_embeds = self._buffer.keep("inputs_embeds", embeds, into.seen)

    def _after(self, module: Any, args: Any, keywords: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        buffer, state = self._buffer, self._generating
        with buffer.guarded("forward"):
            if state is not None:
                if state.found is self._found:
                    self._passed(state, output)
                return
            forward = self._forward
            if forward is None or forward.module is not module:
                return
            self._forward = None
            self._end(forward, output, own=True)

    def _passed(self, state: _Generating, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor):
            # a copy: samplers may scale in place, and a view would keep all logits alive
            state.last = logits[:, -1].detach().clone()
            if state.passes == 1:
                first = state.last.float()
                state.first_logits = self._buffer.keep("first_logits", first, state.seen)

    def _end(self, forward: _Forward, output: Any, *, own: bool) -> None:
        buffer, before, seen = self._buffer, forward.modes, forward.seen
        warnings, raised = buffer.unlisten(forward.heard), sys.exc_info()[1]
        if before is None:
            return
        # the hook also runs for a forward that raised, with no output
        error = None
        if output is None and raised is not None:
            error = buffer.plain.error(raised)
            died_in(raised, "logits")
        logits = getattr(output, "logits", None)
        self.gradients.forward(logits, forward.ids)
        kind, logprobs = "" if logits is None else dtype_name(logits), _scored(logits, forward.ids)
        sampled = logprobs
        if logits is None:
            sampled = _returned(output, forward.ids)
        elif self._sampling != (1.0, ()):
            sampled = _scored(logits, forward.ids, *self._sampling)
        buffer.add(
            lambda: ForwardCall(
                inputs=seen.tensors,
                keywords=forward.keywords,
                modes=before,
                position_ids=forward.position_ids,
                inputs_embeds=forward.inputs_embeds,
                logprobs=logprobs,
                logits_dtype=kind,
                warnings=warnings,
                error=error,
                large=seen.described(),
                digests=seen.digests,
                own=own,
                sampling_logprobs=sampled,
            ),
            clock() - forward.started,
        )


def _timed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call, with seconds between frames that are given as numbers in a tensor."""
    listed = {name: given[name] for name in _SECONDS if isinstance(given.get(name), list | tuple)}
    return {**given, **{name: torch.as_tensor(held) for name, held in listed.items()}}


def _three_axes(where: Tensor) -> Tensor:
    """(3, N, length): from 5.x on text positions may come first; a text-only model has one axis."""
    return where.expand(3, *where.shape) if where.dim() == 2 else where[-3:]


def _returned(output: Any, ids: Any) -> Tensor | None:
    """Logprobs that a head without logits returns, one for each token after the first."""
    made = getattr(output, "log_probs", None)
    if not isinstance(made, Tensor) or not isinstance(ids, Tensor) or made.dim() != ids.dim():
        return None
    return copied(made.float()) if made.shape[1:] == ids[:, 1:].shape[1:] else None


def _scored(
    logits: Any, ids: Any, temperature: float = 1.0, suppressed: tuple[int, ...] = ()
) -> Tensor | None:
    """Logprob of each token after the first: (N, length - 1), NaN where it has no logits."""
    if not isinstance(logits, Tensor) or not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    length, given = ids.shape[1], min(logits.shape[1], ids.shape[1])
    scores = torch.full((ids.shape[0], length - 1), torch.nan, device=logits.device)
    if given > 1:
        scores[:, length - given :] = token_logprobs(
            logits[:, -given:-1], ids[:, -given + 1 :], temperature, suppressed
        )
    return copied(scores)
