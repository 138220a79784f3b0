"""Weights that are higher in sections of a completion, as partial rewards make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from omni_grpo_core.doctor.evidence import Evidence
from omni_grpo_core.doctor.loss_accounts import advantages
from omni_grpo_core.doctor.loss_reading import Reading
from omni_grpo_core.doctor.loss_rows import TrainedRow

_MOST = 4
"""Runs of equal weights along a completion; more are no sections."""


def repeated(known: Reading, settled: Callable[[Reading], bool]) -> Iterator[Evidence]:
    """Sections whose weights are whole multiples of their completion's own, which some of the
    rewards give and all of them do not: a section adds the same advantage again, and not that of
    the reward that is missing. ``settled``: whether a reading's rewards account for its weights."""
    runs = [_runs(row, known) for row in known.rows]
    if not all(map(len, runs)):
        return
    base = torch.stack([own[-1][1] for own in runs])
    times = [_multiples(own, base[n], known.limit) for n, own in enumerate(runs)]
    if not all(times) or max(map(max, times)) == 1:
        return
    rest = replace(known, term=replace(known.term, weights=base, varies=False))
    names = known.rewarded.names
    apart = advantages(known.rewarded.rewards.T, known.rewarded.groups, scale="none").any(1)
    left = _unheard(rest, settled)
    unheard = [names[n] for n in left if apart[n]]
    if not unheard:
        return
    at = max(range(len(times)), key=lambda n: max(times[n]))
    length, most = runs[at][0][0], times[at][0]
    others = [name for n, name in enumerate(names) if apart[n] and n not in left]
    said = " and ".join(unheard)
    yield Evidence(
        "advantage",
        "partial-repeats",
        f"{said} tells completions of one prompt apart and is in the weight of no token: "
        f"{' and '.join(others)} alone give the weights, and sections of a completion (of row "
        f"{known.rows[at].at} the first {length} tokens) have them {most} times",
        row=known.rows[at].at,
        values={"name": said, "names": unheard, "times": most},
    )


def _runs(row: TrainedRow, known: Reading) -> list[tuple[int, Tensor]]:
    """Lengths and weights of the runs of tokens of equal weight; none where they are too many."""
    own = row.own_weights
    limit = known.limit * max(float(one.own_weights.abs().max()) for one in known.rows)
    found: list[tuple[int, Tensor]] = []
    for weight in own:
        if found and abs(float(weight - found[-1][1])) <= limit:
            found[-1] = found[-1][0] + 1, found[-1][1]
        else:
            found.append((1, weight))
        if len(found) > _MOST:
            return []
    return found


def _multiples(runs: list[tuple[int, Tensor]], base: Tensor, limit: float) -> list[int]:
    """By which each run's weight is a multiple of the last one's; none where one is not."""
    if not float(base):
        return [1] * (len(runs) == 1)
    times = [float(weight / base) for _, weight in runs]
    near = all(round(one) >= 1 and abs(one - round(one)) <= limit * one for one in times)
    return [round(one) for one in times] if near else []


def _unheard(known: Reading, settled: Callable[[Reading], bool]) -> list[int]:
    """Numbers of the rewards that are in no sum that gives the weights; none where the sum of all
    does."""
    paid = known.rewarded
    count = paid.rewards.shape[1]

    def gives(kept: tuple[int, ...]) -> bool:
        return settled(replace(known, rewarded=replace(paid, rewards=paid.rewards[:, kept])))

    sums = [kept for size in range(1, count) for kept in combinations(range(count), size)]
    if len(sums) > 2 ** (_MOST + 1) or gives(tuple(range(count))):
        return []
    found = [kept for kept in sums if gives(kept)]
    heard = {n for kept in found for n in kept}
    return [n for n in range(count) if found and n not in heard]
