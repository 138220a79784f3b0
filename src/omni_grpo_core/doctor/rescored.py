"""Known ways in which scores go wrong, tried on the reference: which of them gives the recorded
ones? Every one gets the recorded embeddings and positions, as the sound replay does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.reproduction import Reproduction
from omni_grpo_core.doctor.teacher_forced import (
    Replayed,
    diff,
    replay_forward,
    text_hidden,
    tolerance,
)
from omni_grpo_core.recorder.token_weights import at_logits
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall, LossGradient

_COOLEST, _HOTTEST = 0.2, 5.0
"""Temperatures that somebody may score at."""
_UNMASKED = Reproduction("mask-ignored", "with padding attended to, as if it had no mask")
_GOLDEN = (5**0.5 - 1) / 2
_PROBED = 256
"""Tokens of a row by which a temperature or a precision is tried."""
_UNREAD = 1e-3
"""Part of a float32 gradient that a loss of the chosen tokens' logprobs leaves unexplained by
rounding: 1e-7 as a rule, 4e-5 where a token is almost certain."""
_AS_UNREAD = 0.25
"""Relative: how near two computations in one low precision come in what they leave, on most
positions; a flipped last bit changes a single one by half."""


def scoring(case: Case, call: ForwardCall) -> tuple[Reproduction, ...]:
    """What gives the recorded logprobs of a scoring forward that is not the reference's."""
    known = replay_forward(case, call)
    if known is None or call.logprobs is None:
        return ()
    allowed = tolerance(call.modes, known.policy)
    counted = known.mask & ~call.logprobs.isnan()

    def gives(made: Tensor) -> bool:
        mean, worst = diff(call.logprobs, made, counted) if call.logprobs is not None else (1, 1)
        return mean <= allowed.mean and worst <= allowed.worst

    mask, embeds, where = call.inputs.get("attention_mask"), call.inputs_embeds, call.position_ids
    found = []
    if mask is not None and not bool(mask.all()) and embeds is not None and where is not None:
        hidden = text_hidden(known.policy, embeds, where[-3:], torch.ones_like(mask))
        if gives(replace(known, hidden=hidden).logprobs()):
            found.append(_UNMASKED)
    fitted = _temperature(known, call.logprobs, counted)
    if gives(known.logprobs(fitted)):
        found.append(Reproduction("tempered", f"at temperature {fitted:.4g}", {"at": fitted}))
    return tuple(found)


def first_scores(call: GenerateCall, known: Replayed) -> tuple[Reproduction, ...]:
    """The same of the scores after a prompt: (N, V)."""
    mask, embeds, where = (
        call.inputs.get("attention_mask"),
        call.inputs_embeds,
        call.position_ids,
    )
    got = call.first_logits
    if mask is None or bool(mask.all()) or embeds is None or where is None or got is None:
        return ()
    if len(embeds) != len(mask):
        return ()
    hidden = text_hidden(known.policy, embeds, where[-3:], torch.ones_like(mask))[:, -1:]
    with torch.no_grad():
        made = known.policy.model.lm_head(hidden)[:, 0].float().cpu()
    if made.shape != got.shape:
        return ()
    allowed = tolerance(call.modes, known.policy)
    mean, worst = diff(
        got.log_softmax(-1), made.log_softmax(-1), torch.ones_like(got, dtype=torch.bool)
    )
    if mean > allowed.mean or worst > allowed.worst:
        return ()
    return (_UNMASKED,)


def _temperature(known: Replayed, got: Tensor, counted: Tensor) -> float:
    """The divisor of the reference's scores that brings its logprobs nearest to recorded ones, by
    the row with most tokens."""
    row = int(counted.sum(1).argmax())
    places = counted[row].nonzero().flatten()[:_PROBED]
    scores = known.scores(row)[:-1][places]
    ids, own = known.ids[row][places], got[row][places]

    def off(log: float) -> float:
        made = (scores / 2.0**log).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        return float((made - own).abs().mean())

    low, high = torch.tensor([_COOLEST, _HOTTEST]).log2().tolist()
    for _ in range(40):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, right) if off(left) < off(right) else (left, high)
    return float(2.0 ** ((low + high) / 2))


# --------------------------------------------------------------------------- precision


def low_precision(case: Case, seen: LossGradient, call: ForwardCall) -> str | None:
    """The dtype of a log-softmax that leaves of the gradient at float32 logits what the recorded
    loss left, position by position; ``None`` where none does."""
    if seen.at != "logits" or (call.modes.autocast or call.modes.dtype) != "float32":
        return None
    used = (seen.weights != 0) & (seen.tokens >= 0) & seen.residual.isfinite()
    if not bool(used.any()) or float(seen.residual[used].median()) <= _UNREAD:
        return None
    known = replay_forward(case, call)
    if known is None:
        return None
    for dtype in (torch.bfloat16, torch.float16):
        near = list(_as_left(known, seen, used, dtype))
        if near and float(torch.cat(near).median()) <= _AS_UNREAD:
            return str(dtype).removeprefix("torch.")
    return None


def _as_left(
    known: Replayed, seen: LossGradient, used: Tensor, dtype: torch.dtype
) -> Iterator[Tensor]:
    """How far what a log-softmax in ``dtype`` leaves is from what was left, relative."""
    width = seen.tokens.shape[1]
    temperature = float(seen.temperature[used].nanmedian())
    for row in range(min(2, len(used))):
        places = used[row].nonzero().flatten()[:_PROBED]
        if not len(places):
            continue
        # the position at k of the last ones predicts the token after it
        scores = known.scores(row)[-width:][places].requires_grad_()
        tokens = seen.tokens[row][places]
        low = (scores.to(dtype) / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        weights = seen.weights[row][places].to(dtype)
        (gradient,) = torch.autograd.grad(low, scores, weights)
        left = at_logits(scores.detach(), gradient, tokens).residual
        own = seen.residual[row][places]
        yield ((left - own).abs() / own.clamp(min=1e-6))
