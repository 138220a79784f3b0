"""Reads from the gradient at the logits what a loss did to every token.

Whatever a loss is called, where it is a function of the chosen tokens' log-probabilities its
gradient at the logits ``l`` of a position is ``g = (w / T) (e_y - softmax(l / T))``. So ``y`` is
the one token that is pushed the other way than all others, ``log |g|`` of the others is a line in
``l`` with slope ``1 / T``, and the ratio of their sums to those of the softmax is ``w / T``. A head
that makes no logits leaves the same at its input: ``W.T`` times that.

The hooks return nothing, so that the trainer's gradients stay as they are. On a CUDA device they
wait once per backward, for the number of positions that have a gradient, and once per chunk for
that of those where more than a token's weight is to be solved for.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from omni_grpo_core.recorder.step_buffer import StepBuffer
from omni_grpo_core.recorder.tensors import copied, local
from omni_grpo_core.recorder.thinker import Found
from omni_grpo_core.recorder.token_entropy import weights_at_hidden, weights_at_logits
from omni_grpo_core.recorder.token_weights import TokenWeights, line
from omni_grpo_core.trace.calls import LossGradient

_SAMPLED = 16
"""Logits per position that are kept to tell how the others were changed in place."""
_ROUNDED = 2.0**-7
"""Of their size, by which logits scaled in bfloat16 may miss the line: it has 8 bits."""
_NEIGHBOURS = (1, 2, 0, -1)
"""Where the trained token may be, in columns after the position that was scored: the next, and
those of a loss that is off by one or two."""


def in_backward() -> bool:
    """Whether this thread runs a backward: a checkpointed model runs its forward again inside."""
    return bool(torch._C._current_graph_task_id() != -1)


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Scored:
    """A forward whose backward may come. Only hooks of its graph hold it, so that logits which the
    trainer drops are freed. ``values``: the logits and the last hidden state, without a graph.
    ``ids``: (N, L) on their device. ``cast``: the type to which autocast casts what a head gets.
    ``sample``: some columns of the logits as they were made; ``version``: of the logits then.
    ``read_in``: number of the backward that was read last."""

    forward: int
    ids: Tensor | None
    cast: torch.dtype | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    sample: Tensor | None = None
    version: int = 0
    read_in: int = -1


class LossGradientWatch:
    """Hooks on the logits and the last hidden state of every scoring forward. ``sampled_at``: the
    temperature of the latest generate."""

    def __init__(self, found: Found, buffer: StepBuffer) -> None:
        self._found, self._buffer = found, buffer
        self.sampled_at = 1.0
        self._hidden: Tensor | None = None
        self._cast: torch.dtype | None = None
        self._forwards = self._ended = 0
        self._alive: list[weakref.ref[_Scored]] = []
        buffer.at_end = self._end

    def stop(self) -> None:
        self._end()
        self._buffer.at_end = None

    def _end(self) -> None:
        """Of a step: a backward that comes later belongs to none of its forwards."""
        for scored in (held for one in self._alive if (held := one()) is not None):
            scored.values.clear()
        self._alive.clear()
        self._hidden, self._forwards = None, 0
        self._ended += 1

    def hidden(self, _module: Any, _args: Any, output: Any) -> None:
        """A forward hook of the text model."""
        if torch.compiler.is_compiling() or in_backward():
            return
        hidden = getattr(output, "last_hidden_state", output)
        hidden = hidden[0] if isinstance(hidden, tuple) and hidden else hidden
        self._hidden = hidden if isinstance(hidden, Tensor) and hidden.requires_grad else None
        if self._hidden is not None:
            kind = self._hidden.device.type
            casts = torch.is_autocast_enabled(kind)
            self._cast = torch.get_autocast_dtype(kind) if casts else None

    def forward(self, logits: Any, ids: Any) -> None:
        """To be called for every recorded forward outside ``generate``, in order. ``logits``: what
        it returned; ``ids``: its (N, L) ``input_ids``, if it was given any."""
        number, self._forwards = self._forwards, self._forwards + 1
        hidden, self._hidden = self._hidden, None
        held = ids.detach().clone() if isinstance(ids, Tensor) else None
        scored = _Scored(number, held, self._cast)
        for at, tensor in (("logits", logits), ("hidden", hidden)):
            if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.dim() == 3:
                scored.values[at] = tensor.detach()
                if at == "logits":
                    scored.version, scored.sample = tensor._version, _sampled(tensor.detach())
                tensor.register_hook(_Hook(self, scored, at))  # type: ignore[no-untyped-call]
        if scored.values:
            self._alive.append(weakref.ref(scored))

    def of_logprobs(self, logprobs: Tensor, ids: Tensor, mask: Tensor, temperature: float) -> None:
        """To be called for forwards, one for each row, that return the logprobs (N, C) of ``ids``
        at a temperature, 0 where ``mask`` is False, and make no logits to be read."""
        first, self._forwards = self._forwards, self._forwards + len(ids)
        self._hidden = None
        if not logprobs.requires_grad:
            return
        ended = self._ended

        def read(gradient: Tensor) -> None:
            with self._buffer.guarded("loss gradient"):
                if ended == self._ended:
                    weights = gradient.detach().float().cpu()
                    for at, length in enumerate(mask.sum(1).tolist()):
                        row = weights[at, :length]
                        self._buffer.add(_as_read(first + at, row, ids[at], temperature))

        logprobs.register_hook(read)  # type: ignore[no-untyped-call]

    def read(self, scored: _Scored, at: Literal["logits", "hidden"], gradient: Tensor) -> None:
        """Called in a backward."""
        task = torch._C._current_graph_task_id()
        values = scored.values.get(at)
        if values is None or scored.read_in == task:
            return
        scored.read_in = task
        if not _kept_graph():
            scored.values.clear()
        where = torch.linalg.vector_norm(gradient, ord=torch.inf, dim=-1).nonzero(as_tuple=True)
        near = torch.stack([_shifted(scored.ids, values, by)[where] for by in _NEIGHBOURS], 1)
        likely = tuple(dict.fromkeys((self.sampled_at, 1.0)))
        if not len(near):  # no advantage, or no weight: the loss reached the logits all the same
            found = TokenWeights(near[:, 0], *(gradient.new_zeros(0, dtype=torch.float32),) * 4)
        elif at == "logits":
            found = weights_at_logits(values, gradient, where, near[:, 0], likely)
            if values._version != scored.version and scored.sample is not None:
                changed = _sampled(values)[where]
                found = _before_change(found, scored.sample[where], changed)
        else:
            with torch.autocast(gradient.device.type, enabled=False):
                weight = local(self._head_weight(values, scored.ids))
                head = weight if scored.cast is None else weight.to(scored.cast)
                held = values[where], gradient[where]
                found = weights_at_hidden(*held, where[0], near, head, likely)
        shape = gradient.shape[:2]
        self._buffer.add(
            LossGradient(
                forward=scored.forward,
                at=at,
                tokens=copied(_spread(found.tokens, where, shape, -1)),
                weights=copied(_spread(found.weights, where, shape, 0.0)),
                temperature=copied(_spread(found.temperature, where, shape, torch.nan)),
                residual=copied(_spread(found.residual, where, shape, torch.nan)),
                entropy=copied(_spread(found.entropy, where, shape, 0.0)),
            )
        )

    def _head_weight(self, values: Tensor, ids: Tensor | None) -> Tensor:
        weight = getattr(self._found.thinker.lm_head, "weight", None)
        if not isinstance(weight, Tensor) or local(weight).shape[-1:] != values.shape[-1:]:
            raise ValueError("the loss makes no logits, and the head's weights are not whole here")
        if ids is None:
            raise ValueError("the loss makes no logits, and the ids it scored are unknown")
        return weight


@dataclass(slots=True, eq=False)
class _Hook:
    """Of a tensor; it holds what is needed to read its gradient for as long as its graph lives."""

    watch: LossGradientWatch
    scored: _Scored
    at: Any

    def __call__(self, gradient: Tensor) -> None:
        with self.watch._buffer.guarded("loss gradient"):
            self.watch.read(self.scored, self.at, gradient.detach())


def _as_read(forward: int, weights: Tensor, ids: Tensor, temperature: float) -> LossGradient:
    """Of a loss that is a function of one completion's logprobs, with ``weights`` (C,) as its
    derivative. The position after the last token predicts none."""
    weights = torch.cat([weights, weights.new_zeros(1)])
    none = weights == 0
    tokens = torch.cat([ids[: len(weights) - 1], ids.new_zeros(1)])
    given, zero = torch.full_like(weights, temperature), torch.zeros_like(weights)
    return LossGradient(
        forward=forward,
        at="logits",
        tokens=tokens.masked_fill(none, -1)[None],
        weights=weights[None],
        temperature=given.masked_fill(none, torch.nan)[None],
        residual=zero.masked_fill(none, torch.nan)[None],
        entropy=zero[None],
    )


def _kept_graph() -> bool:
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _spread(values: Tensor, where: tuple[Tensor, ...], shape: torch.Size, fill: Any) -> Tensor:
    whole = torch.full(shape, fill, dtype=values.dtype, device=values.device)
    return whole.index_put_(where, values)


def _shifted(ids: Tensor | None, values: Tensor, by: int) -> Tensor:
    """(N, K): the token ``by`` columns after each position of ``values`` (N, K, ...), which are the
    last of the sequence; -1 where there is none.

    >>> _shifted(torch.tensor([[5, 6, 7]]), torch.zeros(1, 2, 4), 1)
    tensor([[ 7, -1]])
    >>> _shifted(torch.tensor([[5, 6]]), torch.zeros(1, 3, 4), 1)
    tensor([[ 5,  6, -1]])
    """
    width = values.shape[1]
    found = torch.full(values.shape[:2], -1, device=values.device)
    if ids is not None:
        begin = ids.shape[1] - width + by
        source = ids[:, max(begin, 0) : max(begin + width, 0)]
        found[:, max(-begin, 0) :][:, : source.shape[1]] = source
    return found


def _sampled(logits: Tensor) -> Tensor:
    """(..., V) -> a few of the V, the same each time, as a copy."""
    every = max(1, logits.shape[-1] // _SAMPLED)
    return logits[..., ::every].to(torch.float32, copy=True)


def _before_change(found: TokenWeights, made: Tensor, changed: Tensor) -> TokenWeights:
    """Of logits that were scaled and shifted in place after the forward: a gradient is that of the
    logits as they were made. NaN where they were changed in another way."""
    seen = changed.isfinite() & made.isfinite()
    slope, offset = line(made, changed, seen)
    off = torch.where(seen, changed - slope[:, None] * made - offset[:, None], 0.0).abs().amax(-1)
    slope = torch.where(off <= _ROUNDED * made.abs().amax(-1), slope, torch.nan)
    return replace(
        found,
        temperature=found.temperature / slope,
        weights=found.weights / slope,
        entropy=found.entropy / slope,
    )
