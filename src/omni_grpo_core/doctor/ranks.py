"""The recordings of several processes that trained together, joined into one step each.

One row a process is the only way that some trainers run: groups, and the mean of gradients, exist
only over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from omni_grpo_core.trace.calls import ForwardCall, LossGradient, StepSeen, calls_of
from omni_grpo_core.types import StageRecord, Trace


def join_ranks(traces: Sequence[tuple[str, Trace]]) -> list[tuple[str, Trace]]:
    """Steps of the same number in ``rank-*`` folders beside each other become one, named after the
    first. A step that some rank lacks stays apart, rank by rank."""
    found: dict[tuple[str, str], list[tuple[str, Trace]]] = {}
    for name, trace in traces:
        path = PurePath(name)
        ranked = path.parent.name.startswith("rank-")
        key = (str(path.parent.parent), path.name) if ranked else (name, "")
        found.setdefault(key, []).append((name, trace))
    joined: list[tuple[str, Trace]] = []
    for many in found.values():
        world = many[0][1].header.get("world", "1")
        whole = len(many) > 1 and world == str(len(many))
        joined += [(many[0][0], _joined([trace for _, trace in many]))] if whole else many
    return joined


def _joined(traces: Sequence[Trace]) -> Trace:
    """All calls of each rank, rank by rank, then the optimizer's step. Together they are what one
    process would have seen."""
    records: list[StageRecord[Any]] = []
    forwards = 0
    for trace in traces:
        for record in trace.stages:
            if isinstance(record.value, StepSeen):
                continue
            if isinstance(record.value, LossGradient):
                value = replace(record.value, forward=record.value.forward + forwards)
                record = replace(record, value=value)
            records.append(record)
        forwards += len(calls_of(trace, ForwardCall))
    ended = [{"raised": t.header["raised"]} for t in traces if t.header.get("raised")]
    first = {**traces[0].header, **(ended[0] if ended else {})}
    header = {**first, "world": "1", "ranks": str(len(traces))}
    return Trace(header, (*records, *_steps(traces)))


def _steps(traces: Sequence[Trace]) -> list[StageRecord[Any]]:
    """The first rank's steps, with what every rank backpropagated and was warned of."""
    every = [calls_of(trace, StepSeen) for trace in traces]
    records = [r for r in traces[0].stages if isinstance(r.value, StepSeen)]
    found = []
    for record, *steps in zip(records, *every, strict=False):
        value = replace(
            steps[0],
            losses=tuple(loss for step in steps for loss in step.losses),
            warnings=tuple(dict.fromkeys(w for step in steps for w in step.warnings)),
        )
        found.append(replace(record, value=value))
    return found
