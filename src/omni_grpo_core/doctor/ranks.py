"""The recordings of several processes that trained together, joined into one step each.

One row a process is the only way that some trainers run: groups, and the mean of gradients, exist
only over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from operator import mul
from pathlib import PurePath
from statistics import fmean, median
from typing import Any

from omni_grpo_core.trace.calls import (
    ForwardCall,
    GradientSeen,
    LayerSeen,
    LossGradient,
    StepSeen,
    calls_of,
)
from omni_grpo_core.types import StageRecord, Trace

_ROUNDING = 1e-4
"""Relative difference of a norm that two devices may compute from equal numbers in float32."""

_AVERAGED = 1e-2
"""The same of sums over a layer, in which most of a 16-bit gradient's rounding cancels."""


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
    """The first rank's steps, with every rank's layers, and what each backpropagated and was warned
    of."""
    every = [calls_of(trace, StepSeen) for trace in traces]
    records = [r for r in traces[0].stages if isinstance(r.value, StepSeen)]
    found = []
    for record, *steps in zip(records, *every, strict=False):
        value = replace(
            steps[0],
            layers=_layers(steps),
            losses=tuple(loss for step in steps for loss in step.losses),
            warnings=tuple(dict.fromkeys(w for step in steps for w in step.warnings)),
        )
        found.append(replace(record, value=value))
    return found


def _layers(steps: Sequence[StepSeen]) -> tuple[LayerSeen, ...]:
    """A rank may hold nothing of a layer whose shards others have."""
    shares: dict[str, list[LayerSeen]] = {}
    for step in steps:
        for layer in step.layers:
            shares.setdefault(layer.name, []).append(layer)
    times = [one for own in shares.values() if (one := _times_the_mean(own)) is not None]
    factor = median(times) if times else None
    return tuple(_layer(own, factor) for own in shares.values())


def _times_the_mean(shares: Sequence[LayerSeen]) -> float | None:
    """Every rank's gradient before the step, as a multiple of the mean of what their backwards
    left; ``None`` where it is none."""
    left = [one.backward.sums for one in shares if one.backward is not None]
    given = [one.before.sums for one in shares if one.before is not None]
    if len(left) < len(shares) or len(given) < len(shares) or len({*given}) > 1:
        return None
    mean = [fmean(of) for of in zip(*left, strict=True)]
    square = sum(one * one for one in mean)
    times = sum(map(mul, mean, given[0])) / square if square else math.nan
    off = max(abs(one - times * by) for one, by in zip(given[0], mean, strict=True))
    return times if off <= _AVERAGED * max(map(abs, given[0])) else None


def _layer(shares: Sequence[LayerSeen], factor: float | None) -> LayerSeen:
    """What was done to the gradient or the weights on any rank shows in the whole layer, but for
    the mean that a loop takes by itself."""
    own = _times_the_mean(shares)
    averaged = own is not None and factor is not None and math.isclose(own, factor, rel_tol=1e-2)
    size = sum(one.size for one in shares)
    known = [one.between for one in shares if one.between is not None]
    return replace(
        shares[0],
        stale=max(one.stale for one in shares),
        backward=_gradient([one.backward for one in shares]),
        before=_gradient([one.before for one in shares]),
        norm=_whole([one.norm for one in shares]),
        odd={} if averaged else {n: times for one in shares for n, times in one.odd.items()},
        size=size,
        moved=sum(one.moved * one.size for one in shares) / max(size, 1),
        change=max(one.change for one in shares),
        between=max(known) if len(known) == len(shares) else None,
        apart=_apart(shares),
    )


def _apart(shares: Sequence[LayerSeen]) -> tuple[float, float]:
    sums = [one.before.sums for one in shares if one.before is not None]
    if any(one.sharded or not one.held for one in shares) or len(sums) < len(shares):
        return 0.0, 0.0
    size = max(abs(one) for own in sums for one in own)
    away = max(max(of) - min(of) for of in zip(*sums, strict=True))
    weights = [one.weights for one in shares]
    return (away / size if size else 0.0), max(weights) - min(weights)


def _gradient(shares: Sequence[GradientSeen | None]) -> GradientSeen | None:
    there = [one for one in shares if one is not None]
    if not there:
        return None
    alike = all(one.sums == there[0].sums for one in there)
    return GradientSeen(
        norm=_whole([one.norm for one in there]),
        sums=there[0].sums
        if alike
        else tuple(map(sum, zip(*(g.sums for g in there), strict=True))),
        top=max((one.top for one in there), key=lambda top: (not math.isfinite(top), top)),
    )


def _whole(norms: Sequence[float]) -> float:
    """Of a gradient that every rank has whole, after its mean was taken, or of all shards.

    >>> _whole([2.0, 2.0]), _whole([3.0, 4.0])
    (2.0, 5.0)
    """
    alike = max(norms) - min(norms) <= _ROUNDING * max(norms)
    return norms[0] if alike else math.hypot(*norms)
