"""Advantages, recomputed from their rewards and groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Origin, note_judged, note_missing
from omni_grpo_core.doctor.rollouts import RolloutRecord, rollouts, whole_groups
from omni_grpo_core.tolerances import ADVANTAGE, EQUAL_RECORDED_REWARDS
from omni_grpo_core.trace.calls import AdvantageSeen

_SECTIONS = ("context", "think", "answer")


def whole_rollouts(case: Case) -> Iterator[RolloutRecord]:
    """Rollouts whose advantages can be recomputed from what this process saw."""
    for rollout in rollouts(case):
        if rollout.advantage is not None and not whole_groups(case, rollout.advantage):
            note_missing(
                case, "groups are spread over processes: their advantages were not recomputed"
            )
            continue
        yield rollout


def look_at_totals(case: Case) -> Iterable[Evidence]:
    """The reward totals behind the advantages, compared with what the functions returned."""
    for rollout in rollouts(case):
        seen, table = rollout.advantage, reward_table(rollout)
        if seen is None or table is None or seen.rewards.ndim != 1:
            continue
        names = [call.name for call in rollout.rewards]
        if len(seen.rewards) != table.shape[1] or any(name not in seen.weights for name in names):
            continue
        weights = [float(seen.weights[name]) for name in names]
        kept = [0.0 if name in seen.spans else w for name, w in zip(names, weights, strict=True)]
        note_judged(case, "advantage")
        sums = [_weighted(table, w) for w in (kept, weights)]
        given = seen.rewards.double().nan_to_num()
        if any(_same(given, total) for total in sums):
            continue
        row = int((given - sums[0]).abs().argmax())
        yield Evidence(
            "advantage",
            "total-differs",
            f"the advantage of completion {row} was computed from a reward of "
            f"{float(given[row]):.4g}; its functions returned "
            + ", ".join(f"{n} {float(v):.4g}" for n, v in zip(names, table[:, row], strict=True))
            + f", which gives {float(sums[0][row]):.4g} by their weights",
            row=row,
            values={"given": given.tolist(), "wanted": sums[0].tolist(), "names": names},
        )


def reward_table(rollout: RolloutRecord) -> Tensor | None:
    """Each function's reward for each completion, (functions, N), NaN where it returned None."""
    lengths = {len(call.values) for call in rollout.rewards}
    if len(lengths) != 1 or 0 in lengths:
        return None
    return torch.tensor(
        [[math.nan if v is None else v for v in call.values] for call in rollout.rewards],
        dtype=torch.float64,
    )


def _weighted(table: Tensor, weights: Sequence[float]) -> Tensor:
    return (table * torch.tensor(weights, dtype=torch.float64)[:, None]).nansum(0)


def look_at_advantages(case: Case) -> Iterable[Evidence]:
    """Each advantage, recomputed by group id; any scale that fits is accepted."""
    for rollout in whole_rollouts(case):
        seen = rollout.advantage
        if seen is None or seen.rewards.ndim != 1:
            continue
        count = len(seen.rewards)
        if len(seen.group_ids) != count or len(seen.advantages) != count:
            yield Evidence(
                "advantage",
                "shapes-differ",
                f"{count} rewards, {len(seen.group_ids)} group ids and advantages of shape "
                f"{tuple(seen.advantages.shape)}: there is not one advantage per reward",
                values={"shape": list(seen.advantages.shape), "rewards": count},
            )
            continue
        rewards = seen.rewards.double().nan_to_num()
        values = seen.advantages.double()
        if not bool(torch.isfinite(values).all()):
            broken = not bool(torch.isfinite(seen.rewards).all())
            yield Evidence(
                "advantage",
                "not-finite",
                f"{int((~torch.isfinite(values)).sum())} advantages are NaN or infinite",
                "inherited" if broken else "added",
            )
            continue
        base = _base(values, seen.spans)
        note_judged(case, "advantage")
        if base is None or any(fits(base, by) for by in _variants(rewards, seen)):
            continue
        wanted = next(_variants(rewards, seen))
        yield Evidence(
            "advantage",
            "advantage-differs",
            f"the advantages are {listed(base)}; the rewards {listed(rewards)} in the groups "
            f"{_names(seen.group_ids)} give {listed(wanted)}{_how(base, seen)}",
            values={
                "given": base.tolist(),
                "wanted": wanted.tolist(),
                "how": _match(base, rewards, seen),
            },
        )


def _base(values: Tensor, spans: Mapping[str, Tensor]) -> Tensor | None:
    """One advantage per completion: of token advantages the one outside all partial spans; NaN for
    a completion that lies within them."""
    if values.ndim == 1:
        return values
    if values.ndim != 2:
        return None
    inside = torch.zeros(values.shape, dtype=torch.bool)
    for span in spans.values():
        if span.shape == values.shape:
            inside |= span.bool()
    outside = torch.where(inside, 0.0, values)
    # 0 is padding
    largest = outside.abs().argmax(1, keepdim=True)
    found = outside.gather(1, largest)[:, 0]
    unequal = (outside != 0) & ~torch.isclose(outside, found[:, None], rtol=1e-4, atol=1e-6)
    covered = (found == 0) & (values != 0).any(1)
    return None if bool(unequal.any()) else torch.where(covered, torch.nan, found)


def _variants(rewards: Tensor, seen: AdvantageSeen) -> Iterator[Tensor]:
    scales = (
        (seen.scale,) if seen.scale in ("group", "batch", "none") else ("group", "batch", "none")
    )
    for scale, unbiased in product(scales, (True, False)):
        yield recomputed(rewards, seen.group_ids, scale, unbiased)


def recomputed(
    rewards: Tensor, group_ids: Sequence[str], scale: str, unbiased: bool = True
) -> Tensor:
    """As :mod:`omni_grpo_core.losses.advantages`, with either standard deviation."""
    values = torch.zeros_like(rewards)
    whole = rewards.std(unbiased=unbiased) if len(rewards) > 1 else torch.tensor(0.0)
    for name in dict.fromkeys(group_ids):
        members = torch.tensor([group == name for group in group_ids])
        own = rewards[members]
        if len(own) < 2 or float(own.max() - own.min()) <= EQUAL_RECORDED_REWARDS:
            continue
        divisor = {"group": own.std(unbiased=unbiased), "batch": whole}.get(
            scale, torch.tensor(1.0)
        )
        values[members] = (own - own.mean()) / (divisor + (1e-4 if scale != "none" else 0))
    return values


def fits(values: Tensor, wanted: Tensor) -> bool:
    """Equal up to the epsilon in the divisor, which trainers choose; a row of 0 fits only a reward
    at the mean of its group."""
    known = ~values.isnan()
    values, wanted = values[known], wanted[known]
    if not len(values):
        return True
    size = max(float(wanted.abs().max()), float(values.abs().max()), 1e-3)
    return bool(((values - wanted).abs() <= 0.02 * size).all())


def _how(base: Tensor, seen: AdvantageSeen) -> str:
    matches = {
        "by-row-order": "; they match groups formed by row order",
        "by-batch": "; they match the whole batch as one group",
        "by-interleaving": "; they match groups of every other row",
        "negated": "; they have the opposite sign",
        "unnormalised": "; they are the rewards themselves",
        "zero": "; they are all 0 although rewards differ",
    }
    return matches.get(_match(base, seen.rewards.double().nan_to_num(), seen), "")


def _match(base: Tensor, rewards: Tensor, seen: AdvantageSeen) -> str:
    """The known mistake that gives these advantages, or ``""``."""
    count = len(rewards)
    sizes = {seen.group_ids.count(name) for name in seen.group_ids}
    wanted = list(_variants(rewards, seen))
    if any(fits(-base, w) for w in wanted):
        return "negated"
    if float(base.nan_to_num().abs().max()) == 0:
        return "zero"
    for size in sorted({*sizes, *(d for d in range(2, count) if count % d == 0)}, reverse=True):
        rows = [str(row // size) for row in range(count)]
        every = [str(row % max(1, count // size)) for row in range(count)]
        for name, groups in (("by-row-order", rows), ("by-interleaving", every)):
            for scale, unbiased in product(("group", "batch", "none"), (True, False)):
                if fits(base, recomputed(rewards, groups, scale, unbiased)):
                    return name
    one = ["all"] * count
    if any(fits(base, recomputed(rewards, one, scale)) for scale in ("group", "none")):
        return "by-batch"
    return "unnormalised" if fits(base, rewards) else ""


def look_at_signal(case: Case) -> Iterable[Evidence]:
    """No group with two different rewards: nothing to learn from, and nothing is raised."""
    for rollout in whole_rollouts(case):
        seen = rollout.advantage
        if seen is None or seen.rewards.ndim != 1 or len(seen.group_ids) != len(seen.rewards):
            continue
        groups: dict[str, list[float]] = {}
        for name, reward in zip(seen.group_ids, seen.rewards.double().tolist(), strict=True):
            groups.setdefault(name, []).append(reward)
        flat = [name for name, r in groups.items() if max(r) - min(r) <= EQUAL_RECORDED_REWARDS]
        # a partial reward may give a signal where the sum of the others has none
        if len(flat) < len(groups) or bool(seen.advantages.double().nan_to_num().any()):
            continue
        single = [name for name, r in groups.items() if len(r) < 2]
        yield Evidence(
            "advantage",
            "no-variance",
            f"in each of the {len(groups)} groups all rewards are equal "
            f"({', '.join(f'{r[0]:.4g}' for r in list(groups.values())[:4])}): every advantage is "
            "0, and so are loss and gradient"
            + (f"; {len(single)} groups have only one completion" if single else ""),
            _signal_origin(rollout, bool(single)),
            values={
                "rewards": {name: r[0] for name, r in list(groups.items())[:8]},
                "single": len(single),
                "groups": len(groups),
            },
        )


def _signal_origin(rollout: RolloutRecord, single: bool) -> Origin:
    """Groups of one and weights that are all 0 are this stage's own fault; rewards whose weighted
    sum is equal across a group are inherited."""
    table, seen = reward_table(rollout), rollout.advantage
    if single:
        return "added"
    if table is None or seen is None or table.shape[1] != len(seen.group_ids):
        return "unknown"
    names = [call.name for call in rollout.rewards]
    weights = [0.0 if name in seen.spans else float(seen.weights.get(name, 1.0)) for name in names]
    counted = [w for name, w in zip(names, weights, strict=True) if name not in seen.spans]
    if counted and not any(counted):
        return "added"
    sums = _weighted(table, weights)
    for name in dict.fromkeys(seen.group_ids):
        own = sums[torch.tensor([group == name for group in seen.group_ids])]
        if float(own.max() - own.min()) > EQUAL_RECORDED_REWARDS:
            return "added"
    return "inherited"


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= ADVANTAGE * (1 + b.abs())).all())


def listed(values: Tensor) -> str:
    shown = ", ".join(f"{float(v):.3g}" for v in values[:8])
    return f"[{shown}{', …' if len(values) > 8 else ''}]"


def _names(values: Sequence[str]) -> str:
    return f"[{', '.join(values[:8])}{', …' if len(values) > 8 else ''}]"


LOOKS: tuple[Look, ...] = (
    look_at_totals,
    look_at_advantages,
    look_at_signal,
)
