"""Completions that a trainer samples token by token, with forwards of its own: folded into the call
of ``generate`` that they stand for, so that whatever is known of rollouts is known of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from omni_grpo_core.trace.calls import ForwardCall, GenerateCall, LossGradient, calls_of
from omni_grpo_core.types import Trace


def with_own_sampling(trace: Trace, eos: Sequence[int]) -> Trace:
    """The step with each run of forwards that fed one more token each as one
    :class:`~omni_grpo_core.trace.calls.GenerateCall`; unchanged where ``generate`` was called.

    ``eos``: ids that end a completion. How the tokens were drawn is in no forward: the call's
    temperature is NaN.
    """
    forwards = calls_of(trace, ForwardCall)
    runs = [] if calls_of(trace, GenerateCall) else _runs(forwards)
    if not runs:
        return trace
    calls = {run[0]: _call(run, forwards, eos) for run in runs}
    gone = {id(step) for run in runs for step in run}
    kept = [number for number, call in enumerate(forwards) if id(call) not in gone]
    stages = []
    for record in trace.stages:
        value = record.value
        if isinstance(value, ForwardCall) and id(value) in gone:
            if value in calls:
                stages.append(replace(record, stage="completion", value=calls[value]))
            continue
        if isinstance(value, LossGradient):
            if value.forward not in kept:
                continue
            value = replace(value, forward=kept.index(value.forward))
        stages.append(replace(record, value=value))
    return replace(trace, stages=tuple(stages))


def _runs(forwards: Sequence[ForwardCall]) -> list[list[ForwardCall]]:
    """Forwards without gradients, each with the newest token, alone or after all others."""
    runs: list[list[ForwardCall]] = []
    for call in forwards:
        if runs and _goes_on(runs[-1], call):
            runs[-1].append(call)
        else:
            runs.append([call])
    return [run for run in runs if len(run) > 1]


def _goes_on(run: Sequence[ForwardCall], call: ForwardCall) -> bool:
    before, now = run[-1].inputs.get("input_ids"), call.inputs.get("input_ids")
    if before is None or now is None or now.dim() != 2 or len(now) != len(before):
        return False
    if call.modes.grad_enabled or call.own != run[0].own or call.error:
        return False
    if now.shape[1] == 1:
        return True
    return now.shape[1] == before.shape[1] + 1 and torch.equal(now[:, :-1], before)


def _call(
    run: Sequence[ForwardCall], forwards: Sequence[ForwardCall], eos: Sequence[int]
) -> GenerateCall:
    first, *steps = run
    prompt = first.inputs["input_ids"].long()
    ids = torch.cat([prompt, *(step.inputs["input_ids"][:, -1:].long() for step in steps)], 1)
    kept = _mask(first)
    kept = torch.cat([kept, torch.ones_like(ids[:, prompt.shape[1] :], dtype=torch.bool)], 1)
    later = forwards[forwards.index(run[-1]) + 1 :]
    newest = [_next(row[keep], later, eos) for row, keep in zip(ids, kept, strict=True)]
    if None not in newest:
        # it is sampled from the last forward and fed to none
        ids = torch.cat([ids, torch.tensor(newest)[:, None]], 1)
    return GenerateCall(
        inputs=first.inputs,
        keywords={**first.keywords, "stopping_criteria": "the loop's own"},
        config={"do_sample": True, "temperature": math.nan, "eos_token_id": list(eos)},
        modes=first.modes,
        sequences=ids,
        position_ids=first.position_ids,
        inputs_embeds=first.inputs_embeds,
        rope_deltas=None,
        first_logits=None,
        cached=tuple(_seen(step, prompt.shape[1] + n) for n, step in enumerate(steps)),
        step_positions=_positions(steps, eos),
        logprobs=None,
        warnings=first.warnings,
        error=None,
        large=first.large,
        digests=first.digests,
        own=first.own,
    )


def _positions(steps: Sequence[ForwardCall], eos: Sequence[int]) -> tuple[float, ...]:
    """The first row's, until it has ended: what it is fed after that is padding."""
    found: list[float] = []
    for step in steps:
        if step.position_ids is None:
            return ()
        found.append(int(step.position_ids[0, 0, -1]))
        if int(step.inputs["input_ids"][0, -1]) in eos:
            break
    return tuple(found)


def _seen(step: ForwardCall, before: int) -> int:
    """Tokens before the newest that a step could see: all ``before`` where it was given a cache."""
    width = step.inputs["input_ids"].shape[1]
    return before if width > 1 or {"past_key_values", "cache"} & step.keywords.keys() else 0


def _next(row: Tensor, later: Sequence[ForwardCall], eos: Sequence[int]) -> int | None:
    """The token after ``row`` in a later forward; any eos where one has ended it before."""
    sampled = row.tolist()
    if eos and set(sampled[-1:]) & set(eos):
        return eos[0]
    for call in later:
        ids = call.inputs.get("input_ids")
        if ids is None or ids.dim() != 2:
            continue
        for other, keep in zip(ids.long(), _mask(call), strict=True):
            longer = other[keep].tolist()
            if len(longer) > len(sampled) and longer[: len(sampled)] == sampled:
                return int(longer[len(sampled)])
    return None


def _mask(call: ForwardCall) -> Tensor:
    ids, mask = call.inputs["input_ids"], call.inputs.get("attention_mask")
    return torch.ones_like(ids).bool() if mask is None or mask.shape != ids.shape else mask.bool()
