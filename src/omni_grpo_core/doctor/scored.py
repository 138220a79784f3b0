"""What the policy's own forwards gave to the tokens of each completion."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from omni_grpo_core.doctor.bundles import FedRow, rows_in
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.rollouts import Completion, joined, temperature_of
from omni_grpo_core.trace.calls import ForwardCall

_SAME = 0.01
"""Relative difference of a temperature that was read and one that was set: none."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A completion as ``row`` of ``forward``. ``logprobs``: (tokens,) up to its eos."""

    completion: Completion
    forward: ForwardCall
    row: FedRow
    logprobs: Tensor


def scored_of(case: Case) -> tuple[Scored, ...]:
    """Every completion as often as the policy scored it: by the recorded model, adapters on."""
    return case.once(_scored_of)


def _scored_of(case: Case) -> tuple[Scored, ...]:
    found: list[Scored] = []
    for forward in case.forwards:
        if forward.logprobs is not None:
            found += _rows_scored(case, forward, forward.logprobs)
    return tuple(found)


def scored_as_sampled(case: Case) -> Iterator[Scored]:
    """The same, at the temperature of sampling: where that is 1, and this step's own completions by
    a fused head, whose temperature was read from the loss's gradient."""
    yield from (one for one in scored_of(case) if temperature_of(one.completion.call) == 1)
    own = {*joined(case).completions}
    for seen in case.gradients:
        forward = case.forwards[seen.forward] if seen.forward < len(case.forwards) else None
        read = seen.temperature[seen.temperature.isfinite()]
        if forward is None or forward.logprobs is not None or not len(read):
            continue
        if forward.sampling_logprobs is None:
            continue
        for one in _rows_scored(case, forward, forward.sampling_logprobs):
            wanted = temperature_of(one.completion.call)
            if one.completion in own and math.isclose(float(read.median()), wanted, rel_tol=_SAME):
                yield one


def _rows_scored(case: Case, forward: ForwardCall, given: Tensor) -> Iterator[Scored]:
    if not forward.own or forward.modes.adapter == "off":
        return
    for row, completion in zip(rows_in(case, forward), joined(case).scored[forward], strict=True):
        start = 0 if completion is None else len(completion.prompt.ids)
        if completion is None or not start or row.ids[:start] != completion.prompt.ids:
            continue
        # a token is predicted by the position before it
        at = row.kept.nonzero()[start : start + completion.end, 0] - 1
        logprobs = given[row.at][at].float()
        if len(at) == completion.end and not bool(logprobs.isnan().any()):
            yield Scored(completion, forward, row, logprobs)
