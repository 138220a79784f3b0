"""A recorded step's rollouts: which prompts, completions, rewards and losses belong together.

A step may have several micro-batches, each with its own rollout, and several losses on one
rollout. Calls are matched by their order and, for losses, by the completion ids they score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.trace.calls import (
    AdvantageSeen,
    ForwardCall,
    GenerateCall,
    LossSeen,
    ProcessorCall,
    RewardCall,
    SamplesSeen,
    StepSeen,
)


@dataclass(slots=True, eq=False)
class RolloutRecord:
    """One rollout: from the rows that were drawn to the advantages of their completions."""

    samples: SamplesSeen | None = None
    processed: list[ProcessorCall] = field(default_factory=list)
    generated: GenerateCall | None = None
    rewards: list[RewardCall] = field(default_factory=list)
    advantage: AdvantageSeen | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LossRecord:
    """One loss, the scoring forward that its logprobs came from, and the rollout it is about."""

    loss: LossSeen
    forward: ForwardCall | None
    rollout: RolloutRecord | None


def rollouts(case: Case) -> tuple[RolloutRecord, ...]:
    """The rollouts of a step, in order."""
    return case.once(_rollouts)


def _rollouts(case: Case) -> tuple[RolloutRecord, ...]:
    found: list[RolloutRecord] = []
    rollout = RolloutRecord()
    for value in case.values:
        begins = isinstance(value, SamplesSeen | ProcessorCall | GenerateCall)
        ended = rollout.generated is not None or rollout.rewards
        if begins and ended and not _goes_on(rollout, value):
            found.append(rollout)
            rollout = RolloutRecord()
        match value:
            case SamplesSeen():
                rollout.samples = value
            case ProcessorCall():
                rollout.processed.append(value)
            case GenerateCall():
                rollout.generated = value
            case RewardCall():
                rollout.rewards.append(value)
            case AdvantageSeen():
                rollout.advantage = value
            case _:
                pass
    if rollout != RolloutRecord():
        found.append(rollout)
    return tuple(t for t in found if t.generated or t.rewards or t.advantage or t.samples)


def _goes_on(rollout: RolloutRecord, value: object) -> bool:
    """A processor called again to score the same rollout does not begin a new one."""
    return isinstance(value, ProcessorCall) and not rollout.rewards and rollout.advantage is None


def losses_of(case: Case) -> tuple[LossRecord, ...]:
    """The losses of a step, in order."""
    return case.once(_losses_of)


def _losses_of(case: Case) -> tuple[LossRecord, ...]:
    records = rollouts(case)
    found: list[LossRecord] = []
    before: list[ForwardCall] = []
    for value in case.values:
        if isinstance(value, ForwardCall):
            before.append(value)
        elif isinstance(value, LossSeen):
            scored = [f for f in before if f.modes.adapter != "off" and f.error is None]
            forward = scored[-1] if scored else None
            found.append(LossRecord(value, forward, _rollout_of(value, records, len(found))))
        elif isinstance(value, StepSeen):
            before = []
    return tuple(found)


def _rollout_of(loss: LossSeen, records: Sequence[RolloutRecord], at: int) -> RolloutRecord | None:
    if not records:
        return None
    for rollout in records:
        ids = None if rollout.generated is None else completion_ids(rollout.generated)
        if ids is not None and loss.completion_ids is not None and _same(ids, loss.completion_ids):
            return rollout
    return records[at % len(records)]


def _same(ids: Tensor, others: Tensor) -> bool:
    return ids.shape == others.shape and bool(torch.equal(ids.long(), others.long()))


def prompt_length(call: GenerateCall) -> int:
    """Prompt tokens at the start of the sequences."""
    ids = call.inputs.get("input_ids")
    return 0 if ids is None else int(ids.shape[1])


def completion_ids(call: GenerateCall) -> Tensor | None:
    """int64, (N, C): the sampled ids, including padding after the end."""
    if call.sequences is None:
        return None
    return call.sequences[:, prompt_length(call) :].long()


def ids_of(value: Any) -> tuple[int, ...]:
    """Token ids of a setting that may hold one, several or none.

    >>> ids_of(3), ids_of([3, 4]), ids_of(None)
    ((3,), (3, 4), ())
    """
    if value is None or value is False:
        return ()
    return tuple(int(i) for i in value) if isinstance(value, list | tuple) else (int(value),)


def until_end(ids: Tensor, eos: Sequence[int]) -> Tensor:
    """bool, (N, C): True up to and including the first of ``eos``.

    >>> until_end(torch.tensor([[5, 2, 2], [5, 5, 5]]), [2]).tolist()
    [[True, True, False], [True, True, True]]
    """
    ended = torch.isin(ids, torch.tensor(list(eos), dtype=ids.dtype)).long()
    return (ended.cumsum(1) - ended) == 0


def first_step(case: Case) -> bool:
    """Whether the trainer still has the weights it loaded: no optimizer step yet."""
    return all(step.step == 0 for step in case.steps)


def world_size(case: Case) -> int:
    """Processes that trained together; this recording is of one of them."""
    number = case.trace.header.get("world", "1")
    return int(number) if number.isdigit() else 1


def settings_of(case: Case) -> dict[str, Any]:
    """The run's settings, as recorded with its losses and steps."""
    found: dict[str, Any] = {}
    for loss in case.losses:
        found |= dict(loss.settings)
    for step in case.steps:
        found |= dict(step.settings)
    return found


def whole_groups(case: Case, seen: AdvantageSeen) -> bool:
    """Whether every group of a rollout is complete here: other processes may have the rest."""
    size = settings_of(case).get("num_generations")
    counts = [seen.group_ids.count(name) for name in dict.fromkeys(seen.group_ids)]
    return world_size(case) == 1 or (isinstance(size, int) and all(c >= size for c in counts))
