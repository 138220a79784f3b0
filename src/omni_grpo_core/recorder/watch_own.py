"""Watches this package's own rollouts and scoring forwards, plain and fast.

What they hand to the text model is seen there, and taken apart: a call of ``generate`` for every
prompt, a forward for every completion, without padding, whatever they were computed beside. So a
packed row, which holds each prompt once, is recorded as a trainer would have scored it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from omni_grpo_core.core.completions import CompletionTensors, pad_completions
from omni_grpo_core.core.dialect import tokens_cached
from omni_grpo_core.core.observers import OBSERVERS
from omni_grpo_core.recorder.completions import decoded
from omni_grpo_core.recorder.hooks import Patches
from omni_grpo_core.recorder.loss_gradient import LossGradientWatch
from omni_grpo_core.recorder.step_buffer import Outcome, Seen, StepBuffer, digest_into
from omni_grpo_core.recorder.tensors import chosen, copied
from omni_grpo_core.recorder.thinker import Found, find, modes
from omni_grpo_core.recorder.watch_model import Hook
from omni_grpo_core.trace import dtype_name
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall, Modes
from omni_grpo_core.types import Batch, Row

if TYPE_CHECKING:  # recording needs no transformers
    from omni_grpo_core.core.policy import Policy


@dataclass(slots=True, eq=False)
class _Pass:
    """One call of ours, as the text model and the head saw it.

    ``mask``: (N, C), of the completions that are scored, and ``tokens``, what it leaves of their
    ids, in order; ``None`` in a rollout. ``where``, ``embeds``: of the first pass; ``packed``: the
    layout of its row. Of later passes, ``steps``: the rows' positions, (N,); ``cached``: tokens
    before the newest, padding included. ``lost``: log of the probability that suppressed ids leave
    to the others, of each pass. ``scored``: logprobs of ``tokens`` at temperature 1."""

    policy: Policy
    found: Found
    batch: Batch
    temperature: float
    mask: Tensor | None = None
    tokens: Tensor | None = None
    modes: Modes | None = None
    where: Tensor = field(default_factory=lambda: torch.zeros(3, 0, 0))
    embeds: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0))
    packed: Any = None
    steps: list[Tensor] = field(default_factory=list)
    cached: list[Any] = field(default_factory=list)
    first_logits: Tensor | None = None
    logits_dtype: str = ""
    lost: list[Tensor] = field(default_factory=list)
    scored: list[Tensor] = field(default_factory=list)

    def text_model(self, module: Any, keywords: Mapping[str, Any], grad: bool) -> None:
        where = keywords["position_ids"][-3:]  # text positions may precede the three axes
        if self.modes is None:
            self.modes = modes(self.found, grad_enabled=grad)
            self.where, self.embeds = where, keywords["inputs_embeds"].detach()
            self.packed = keywords.get("packed_row")
            return
        self.steps.append(where[0, :, -1].clone())
        prefix = getattr(module.layers[0].self_attn, "omni_prefix", None)
        self.cached.append(
            tokens_cached(keywords)
            if prefix is None
            else (prefix.own == 0).sum() - 1 + self.batch.input_ids.shape[1]
        )

    def head(self, logits: Tensor) -> None:
        logits, self.logits_dtype = logits.detach(), dtype_name(logits)
        if self.tokens is not None:
            if self.mask is not None and logits.shape[:-1] == self.mask.shape:
                logits = logits[self.mask]
            begin = sum(map(len, self.scored))
            self.scored.append(chosen(logits, self.tokens[begin : begin + len(logits)]))
            return
        scores = logits.float()
        if self.first_logits is None:
            self.first_logits = scores
        scores = scores / (self.temperature or 1.0)
        left = scores.masked_fill(self.policy.suppressed, -torch.inf)
        self.lost.append(left.logsumexp(-1) - scores.logsumexp(-1))


class _Later(NamedTuple):
    """Of a rollout's passes, on the CPU once its device was waited for. ``steps``: (passes - 1, N);
    ``cached``: (passes - 1,); ``lost``: (passes, N)."""

    steps: Tensor
    cached: Tensor
    lost: Tensor

    @classmethod
    def of(cls, state: _Pass, copies: int) -> _Later:
        first, *rest = state.lost
        return cls(
            *(
                copied(torch.stack(one)) if one else torch.zeros(0, 0)
                for one in (
                    state.steps,
                    [torch.as_tensor(held, device=first.device) for held in state.cached],
                    [first.repeat_interleave(copies), *rest],
                )
            )
        )


class OwnWatch:
    """``gradients``: takes the gradient of what a scoring forward returned."""

    def __init__(
        self, found: Found, processor: Any, buffer: StepBuffer, gradients: LossGradientWatch
    ) -> None:
        self._found, self._buffer, self._gradients = found, buffer, gradients
        self._tokenizer = getattr(processor, "tokenizer", processor)

    def start(self, _patches: Patches) -> None:
        OBSERVERS.append(self._observe)

    def stop(self) -> None:
        OBSERVERS.remove(self._observe)

    @contextmanager
    def _observe(self, kind: str, given: Mapping[str, Any]) -> Iterator[Callable[[Any], None]]:
        policy: Policy = given["policy"]
        found = self._found if policy.model is self._found.thinker else find(policy.model)
        state = _Pass(policy, found, given["batch"], given["temperature"])
        if kind == "scoring":
            state.mask = given["mask"].to(policy.device)
            state.tokens = given["ids"].to(policy.device)[state.mask]
        note = self._rolled if kind == "rollout" else self._scored
        at = "generate" if kind == "rollout" else "forward"
        handles = [
            policy.text_model.register_forward_pre_hook(
                Hook(functools.partial(self._text_model, state)), with_kwargs=True
            ),
            policy.model.lm_head.register_forward_hook(Hook(functools.partial(self._head, state))),
        ]
        with self._buffer.watching(at, functools.partial(note, state, given)) as outcome:
            try:
                yield functools.partial(setattr, outcome, "result")
            finally:
                for handle in handles:
                    handle.remove()

    def _text_model(self, state: _Pass, module: Any, _args: Any, keywords: Any) -> None:
        grad = torch.is_grad_enabled()
        if not _is_captured():
            with self._buffer.guarded("text model"):
                state.text_model(module, keywords, grad)

    def _head(self, state: _Pass, _module: Any, _args: Any, logits: Tensor) -> None:
        if not _is_captured():
            with self._buffer.guarded("head"):
                state.head(logits)

    def _seen(self, row: Row, ids: Tensor, embeds: Tensor) -> tuple[Seen, Tensor | None]:
        """What the model would have been called with for one row, and its embeddings."""
        seen = Seen()
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **row.tensors}
        self._buffer.see(given, seen)
        digest_into(seen.digests, "inputs_embeds", embeds)
        return seen, self._buffer.keep("inputs_embeds", embeds, seen)

    # ------------------------------------------------------------------ rollouts

    def _rolled(self, state: _Pass, given: Mapping[str, Any], outcome: Outcome) -> None:
        copies, policy = given["group_size"], state.policy
        config = {
            "do_sample": state.temperature > 0,
            "temperature": state.temperature or 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "use_cache": True,
            "max_new_tokens": given["max_new_tokens"],
            "eos_token_id": list(policy.eos_token_ids),
            "pad_token_id": policy.pad_token_id,
            "suppress_tokens": policy.suppressed.nonzero()[:, 0].tolist(),
        }
        if not state.lost:
            return
        completions = () if outcome.result is None else outcome.result.completions
        later = _Later.of(state, copies)
        for index in range(len(state.batch.rows)):
            group = completions[index * copies : (index + 1) * copies]
            tokens = pad_completions(group, policy.pad_token_id) if group else None
            seconds = outcome.seconds / len(state.batch.rows)
            draft = self._generated(state, index, copies, tokens, later, config, outcome)
            self._buffer.add(draft, seconds)

    def _generated(
        self,
        state: _Pass,
        index: int,
        copies: int,
        tokens: CompletionTensors | None,
        later: _Later,
        config: Mapping[str, Any],
        outcome: Outcome,
    ) -> Callable[[], GenerateCall]:
        """One prompt's completions, as if ``generate`` had been asked for them alone."""
        row, pad = state.batch.rows[index], state.batch.pads[index]
        own = slice(index * copies, (index + 1) * copies)
        ids, mode = row.input_ids[None], state.modes
        seen, embeds = self._seen(row, ids, state.embeds[index : index + 1, pad:])
        where = copied(state.where[:, index : index + 1, pad:])
        first = state.first_logits
        if first is not None:
            first = self._buffer.keep("first_logits", first[index].expand(copies, -1), seen)
        sequences = None if tokens is None else torch.cat([ids.expand(copies, -1), tokens.ids], 1)
        texts = {} if sequences is None else decoded(self._tokenizer, ids, sequences, config)
        assert mode is not None
        return lambda: GenerateCall(
            inputs=seen.tensors,
            keywords=_keywords(row),
            config=config,
            modes=mode,
            sequences=sequences,
            position_ids=where,
            inputs_embeds=embeds,
            rope_deltas=where.amax((0, 2)) + 1 - where.shape[2],
            first_logits=first,
            cached=tuple(held - pad for held in map(int, later.cached)),
            step_positions=tuple(map(float, later.steps[:, own.start])) if len(later.steps) else (),
            logprobs=None if tokens is None else _unsuppressed(tokens.logprobs, later.lost[:, own]),
            warnings=outcome.warnings,
            error=outcome.error,
            large=seen.described(),
            digests=seen.digests,
            decoded={name: tuple(map(self._buffer.plain.text, t)) for name, t in texts.items()},
            own=state.found is self._found,
            apart=0.0 if state.found is self._found else None,
        )

    # ------------------------------------------------------------------ scoring

    def _scored(self, state: _Pass, given: Mapping[str, Any], outcome: Outcome) -> None:
        if state.modes is None:
            return
        ids, mask, scored = given["ids"].cpu(), given["mask"].cpu(), outcome.result
        lengths = mask.sum(1).tolist()
        raw = torch.cat(state.scored) if state.scored else torch.zeros(0)
        ends = [*accumulate(lengths)]
        for at, (length, end) in enumerate(zip(lengths, ends, strict=True)):
            sampling = None if scored is None else scored.logprobs[at, :length]
            made = raw[end - length : end], sampling
            draft = self._forward(state, at, ids[at, :length], lengths, made, outcome)
            self._buffer.add(draft, outcome.seconds / len(lengths))
        if scored is not None:
            self._gradients.of_logprobs(scored.logprobs, ids, mask, state.temperature)

    def _forward(
        self,
        state: _Pass,
        at: int,
        tokens: Tensor,
        lengths: Sequence[int],
        made: tuple[Tensor, Tensor | None],
        outcome: Outcome,
    ) -> Callable[[], ForwardCall]:
        """One completion after its prompt, as if they had been scored alone."""
        row = state.batch.rows[at // (len(lengths) // len(state.batch.rows))]
        where, embeds = _part(state, at, lengths)
        seen, kept = self._seen(row, torch.cat([row.input_ids, tokens])[None], embeds)
        places, mode, kind = copied(where), state.modes, state.logits_dtype
        before = torch.full((len(row.input_ids) - 1,), torch.nan)
        raw, sampling = (None if one is None else copied(one.detach().float()) for one in made)
        own = state.found is self._found
        assert mode is not None

        def whole(logprobs: Tensor | None) -> Tensor | None:
            if logprobs is None or len(logprobs) != len(tokens):
                return None
            return torch.cat([before, logprobs])[None]

        return lambda: ForwardCall(
            inputs=seen.tensors,
            keywords=_keywords(row),
            modes=mode,
            position_ids=places,
            inputs_embeds=kept,
            logprobs=whole(raw),
            logits_dtype=kind,
            warnings=outcome.warnings,
            error=outcome.error,
            large=seen.described(),
            digests=seen.digests,
            own=own,
            sampling_logprobs=whole(sampling),
        )


def _part(state: _Pass, at: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Positions (3, 1, length) and embeddings (1, length, H) of one completion and its prompt."""
    rows = state.batch.rows
    index = at // (len(lengths) // len(rows))
    if state.packed is None:
        inside = slice(state.batch.pads[index], state.batch.input_ids.shape[1] + lengths[at])
        return state.where[:, at : at + 1, inside], state.embeds[at : at + 1, inside]
    prompts = [len(row.input_ids) for row in rows]
    starts = [*accumulate([*prompts, *lengths], initial=0)]
    prompt = slice(starts[index], starts[index] + prompts[index])
    begin = starts[len(rows) + at]
    completion = slice(begin, begin + lengths[at])
    return (
        torch.cat([state.where[:, :, prompt], state.where[:, :, completion]], dim=2),
        torch.cat([state.embeds[:, prompt], state.embeds[:, completion]], dim=1),
    )


def _keywords(row: Row) -> dict[str, Any]:
    return {"use_audio_in_video": row.audio_in_video == "interleaved"}


def _unsuppressed(logprobs: Tensor, lost: Tensor) -> Tensor:
    """Logprobs (N, C) of a distribution without the suppressed ids as they are with them; unchanged
    where the head was not seen at every token, as under a CUDA graph. ``lost``: (passes, N)."""
    if len(lost) < logprobs.shape[1]:
        return logprobs.float()
    return (logprobs + lost[: logprobs.shape[1]].T).float()


def _is_captured() -> bool:
    """Whether what runs is being made into a graph, of which nothing may be read."""
    return torch.compiler.is_compiling() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )
