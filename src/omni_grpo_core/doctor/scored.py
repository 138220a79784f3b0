"""What the policy's own forwards gave to the tokens of each completion."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from omni_grpo_core.doctor.bundles import FedRow, rows_in
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.rollouts import Completion, joined
from omni_grpo_core.trace.calls import ForwardCall


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A completion as ``row`` of ``forward``. ``logprobs``: (tokens,) up to its eos, at temperature
    1."""

    completion: Completion
    forward: ForwardCall
    row: FedRow
    logprobs: Tensor


def scored_of(case: Case) -> tuple[Scored, ...]:
    """Every completion as often as the policy scored it: by the recorded model, adapters on."""
    return case.once(_scored_of)


def _scored_of(case: Case) -> tuple[Scored, ...]:
    found = []
    for forward in case.forwards:
        if not forward.own or forward.modes.adapter == "off" or forward.logprobs is None:
            continue
        rows = rows_in(case, forward)
        for row, completion in zip(rows, joined(case).scored[forward], strict=True):
            start = 0 if completion is None else len(completion.prompt.ids)
            if completion is None or not start or row.ids[:start] != completion.prompt.ids:
                continue
            # a token is predicted by the position before it
            at = row.kept.nonzero()[start : start + completion.end, 0] - 1
            logprobs = forward.logprobs[row.at][at].float()
            if len(at) == completion.end and not bool(logprobs.isnan().any()):
                found.append(Scored(completion, forward, row, logprobs))
    return tuple(found)
