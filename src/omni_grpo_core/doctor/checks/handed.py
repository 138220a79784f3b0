"""Values that were handed over, by a dump or by ``recorder.note``: texts without ids, advantages
and log-probabilities. Where the gradient of a loss was read, it says more than any of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, product

import torch
from torch import Tensor

from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged, note_missing
from omni_grpo_core.doctor.loss_accounts import (
    LEAST_CHANCE,
    advantages,
    chance,
    multiples,
    weighted_scales,
)
from omni_grpo_core.doctor.loss_reading import EXACT, reading
from omni_grpo_core.doctor.reproduce import reproductions, told
from omni_grpo_core.doctor.reproduction import Reproduction
from omni_grpo_core.doctor.rollouts import completions_of, settings_of, whole_groups
from omni_grpo_core.doctor.symptoms import degenerate_rows, degenerate_texts
from omni_grpo_core.trace.calls import AdvantageSeen, LossSeen

_EPSILONS = (1e-4, 1e-6, 1e-8)
"""Added to a deviation by common trainers."""
_NATS = 0.1
"""Mean distance of two logprobs of one token from which ratios are off by a tenth. Engines and
trainers in bfloat16 differ by a hundredth or two."""
_TOKENS = 16
"""Tokens from which a mean says something."""
Groups = tuple[object, ...]


def look_at_given_texts(case: Case) -> Iterable[Evidence]:
    """Degenerate completions of a rollout that ran elsewhere: by the texts that rewards got, or by
    a dump's ids. What made them is not known."""
    reasons = list(degenerate_texts(case))
    if case.dumped:
        reasons += [degenerate_rows(call).get(0, "") for call in case.generated]
    if not reasons:
        return
    note_judged(case, "completion")
    bad = [at for at, reason in enumerate(reasons) if reason]
    if 2 * len(bad) >= len(reasons):
        yield Evidence(
            "completion",
            "degenerate",
            f"{len(bad)} of {len(reasons)} completions are degenerate; completion {bad[0]}: "
            f"{reasons[bad[0]]}",
            "unknown",
            row=bad[0],
            values={"rows": bad},
        )


# --------------------------------------------------------------------------- advantages


def look_at_given_advantages(case: Case) -> Iterable[Evidence]:
    """Advantages, made again from their rewards: of the sum, or of what one function pays."""
    if reading(case) is not None:
        return
    for seen in case.advantages:
        rewards = _rewards(case, seen)
        if seen.advantages.ndim != 1 or rewards is None or seen.spans or seen.partial:
            continue
        if not whole_groups(case, seen) or bool(torch.isnan(seen.advantages).any()):
            continue
        yield from _judged(case, seen.advantages.double(), rewards, _partitions(case, seen))


def _judged(
    case: Case, got: Tensor, rewards: Tensor, partitions: Sequence[Groups]
) -> Iterator[Evidence]:
    total = rewards.sum(1)
    given = _listed(total)
    if not bool(got.any()):
        if all(_differ(rewards, groups) for groups in partitions):
            note_judged(case, "advantage")
            yield Evidence(
                "advantage",
                "no-signal",
                f"the rewards of one prompt's completions differ ({given}), and every advantage is "
                "exactly 0: nothing is learnt from them",
                values={"rewards": total.tolist()},
            )
        return
    if any(_sound(got, rewards, groups) for groups in partitions):
        note_judged(case, "advantage")
        return
    pairs = [_better(got, rewards, groups) for groups in partitions]
    contradicted = [groups for groups, pair in zip(partitions, pairs, strict=True) if pair]
    made = [values for groups in contradicted for values in _made(total, groups)]
    if made and min(multiples(got, torch.stack(made), EXACT)) < 0:
        note_judged(case, "advantage")
        yield Evidence(
            "advantage",
            "advantages-negated",
            f"the advantages are those of the rewards {given} with the opposite sign: "
            "higher-rewarded completions are made less likely",
        )
        return
    moved = {one.name: one for values in made for one in _moved(got, values)}
    if moved:
        note_judged(case, "advantage")
        said = told(f"the advantages are those of the rewards {given}", [*moved.values()])
        yield Evidence(
            "advantage",
            "advantages-of-other-rows",
            f"{said}: completions are trained by other completions' rewards",
            values={"reproduced": [*moved] if len(moved) == 1 else []},
        )
        return
    batch = _of_batch(total, partitions[0])
    if max(multiples(got, torch.stack(batch), EXACT)) > 0:
        note_judged(case, "advantage")
        yield Evidence(
            "advantage",
            "advantage-differs",
            f"the advantages are those of the rewards {given} compared with the mean of the whole "
            "batch instead of their group's",
            values={"how": "by-batch", "alone": chance(batch[0], 1) <= LEAST_CHANCE},
            severity="breaks" if "scale_rewards" in settings_of(case) else "differs",
        )
        return
    several = rewards.shape[1] > 1
    if several and any(any(weighted_scales(got, rewards, g, EXACT)) for g in partitions):
        note_judged(case, "advantage")
        return
    if not several and all(pairs) and pairs[0]:
        note_judged(case, "advantage")
        one, other = pairs[0]
        yield Evidence(
            "advantage",
            "weights-against-rewards",
            f"of two completions of one prompt with rewards {float(total[one]):.4g} and "
            f"{float(total[other]):.4g} the first has the advantage {float(got[one]):.3g} and the "
            f"second {float(got[other]):.3g}: they do not come from these rewards",
            row=one,
            values={"rewards": total.tolist(), "advantages": got.tolist()},
        )
        return
    note_missing(case, "how rewards became advantages could not be told", "advantage")


def _rewards(case: Case, seen: AdvantageSeen) -> Tensor | None:
    """(N, F): of each function, else of their sum; 0 where a function returned ``None``."""
    count = len(seen.advantages)
    columns = [call.values for call in case.rewards]
    if columns and all(len(column) == count for column in columns):
        table = [[0.0 if value is None else float(value) for value in c] for c in columns]
        return torch.tensor(table, dtype=torch.float64).T.nan_to_num()
    if seen.rewards.shape == (count,):
        return seen.rewards.double().nan_to_num()[:, None]
    return None


def _partitions(case: Case, seen: AdvantageSeen) -> tuple[Groups, ...]:
    """The groups that rows may have. Prompts of equal text may differ in their media: then runs of
    them are groups of any size that divides all runs."""
    named = tuple(seen.group_ids)
    if case.trace.header.get("groups") != "by prompt":
        return (named,)
    runs = [len(list(held)) for _, held in groupby(named)]
    by = math.gcd(*runs)
    sizes = [size for size in range(2, by + 1) if by % size == 0]
    inside = tuple(tuple(at // size for at in range(len(named))) for size in sizes)
    return tuple(dict.fromkeys((*inside, named)))


def _made(total: Tensor, groups: Groups) -> Iterator[Tensor]:
    """Advantages that sound trainers make of summed rewards."""
    for scale, unbiased, epsilon in product(("group", "batch"), (True, False), _EPSILONS):
        yield advantages(total, groups, "group", scale, unbiased, epsilon)
    yield advantages(total, groups, "group", "none", True, 0.0)
    yield _leave_one_out(total, groups)


def _leave_one_out(total: Tensor, groups: Groups) -> Tensor:
    """Each less the mean of its group's others, over their deviation where there is any.

    >>> _leave_one_out(torch.tensor([1.0, 0, 0, 0.5]), "aaaa").tolist()
    [2.88..., -1.0, -1.0, 0.28...]
    """
    made = torch.zeros_like(total)
    for at, group in enumerate(groups):
        same = [other for other, name in enumerate(groups) if name == group and other != at]
        others = total[same]
        apart = float(others.std()) if len(others) > 1 else 0.0
        made[at] = (total[at] - others.mean()) / (apart or 1.0) if same else 0.0
    return made


def _of_batch(total: Tensor, groups: Groups) -> list[Tensor]:
    """Advantages whose baseline is the batch's mean, a recipe where no settings are GRPO's."""
    return [advantages(total, groups, "batch", scale) for scale in ("none", "group")]


def _sound(got: Tensor, rewards: Tensor, groups: Groups) -> bool:
    """Whether the sum of the rewards gives them, or one function alone: a dump's other columns may
    be no rewards."""
    totals = (rewards.sum(1), *rewards.T)
    made = [values for total in totals for values in _made(total, groups)]
    return max(multiples(got, torch.stack(made), EXACT)) > 0


def _moved(got: Tensor, values: Tensor) -> Iterator[Reproduction]:
    """Orders of rows that give the advantages, where few would by chance: of few numbers there are
    few orders, and with two that differ every one is a sign."""
    norm, own, rows = float(values.norm()), float(got.norm()), len(values)
    if int((got != 0).sum()) < 3 or not norm:
        return
    tried = {"reversed": 1, "rolled": rows - 1, "items-swapped": math.comb(rows, 2)}
    for one in reproductions(values, got * norm / own, EXACT, axes=("rows",)):
        if one.name in tried and chance(values, tried[one.name]) <= LEAST_CHANCE:
            yield one


def _differ(rewards: Tensor, groups: Groups) -> bool:
    rows: dict[object, set[tuple[float, ...]]] = {}
    for group, row in zip(groups, rewards.tolist(), strict=True):
        rows.setdefault(group, set()).add(tuple(row))
    return any(len(held) > 1 for held in rows.values())


def _better(got: Tensor, rewards: Tensor, groups: Groups) -> tuple[int, int] | None:
    """Two completions of one group, the first better by some function and worse by none, and pushed
    down while the second is pushed up."""
    least = EXACT * float(got.abs().max())
    for name in dict.fromkeys(groups):
        own = torch.tensor([at for at, group in enumerate(groups) if group == name])
        down, up = own[got[own] < -least], own[got[own] > least]
        gap = rewards[down][:, None] - rewards[up][None]
        better = ((gap >= 0).all(2) & (gap > 0).any(2)).nonzero()
        if len(better):
            return int(down[better[0, 0]]), int(up[better[0, 1]])
    return None


# --------------------------------------------------------------------------- log-probabilities


def look_at_given_logprobs(case: Case) -> Iterable[Evidence]:
    """The rollout engine's log-probabilities of its own tokens, and the trainer's before the
    update: their ratio should be 1."""
    if case.forwards or not case.dumped:
        return
    for loss in case.losses:
        pairs = list(_pairs(case, loss))
        gaps = torch.cat([(one - other).abs() for one, other in pairs]) if pairs else torch.empty(0)
        if len(gaps) < _TOKENS:
            continue
        note_judged(case, "completion")
        mean = float(torch.nan_to_num(gaps, nan=math.inf).mean())
        if mean <= _NATS:
            continue
        by = next((by for by in (1, -1) if _apart(pairs, by) <= min(_NATS, mean / 4)), 0)
        said = (
            f"they are the same numbers {abs(by)} token {'later' if by > 0 else 'earlier'}: one of "
            "the two is a column off"
            if by
            else f"the ratio of policy and engine is off by a factor of "
            f"{math.exp(min(mean, 50.0)):.3g}"
        )
        yield Evidence(
            "completion",
            "ratio-differs",
            f"the rollout engine and the trainer differ by {mean:.3g} nats on average about the "
            f"same {len(gaps)} tokens: {said}",
            "unknown",
            values={"mean": mean, "reproduced": ["shifted"] if by else []},
        )


def _pairs(case: Case, loss: LossSeen) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each row, the trainer's and the engine's, over the tokens that count."""
    if loss.logprobs is None or loss.old_logprobs is None:
        return
    lengths = [0 if c is None else c.end for c in completions_of(case, loss)]
    rows = zip(lengths, loss.logprobs, loss.old_logprobs, strict=True)
    for at, (length, scored, sampled) in enumerate(rows):
        kept = slice(length) if loss.mask is None else loss.mask[at].bool()
        yield scored[kept].float(), sampled[kept].float()


def _apart(pairs: Sequence[tuple[Tensor, Tensor]], by: int) -> float:
    """Mean distance where the second is taken ``by`` tokens later."""
    moved = [
        (one[: len(one) - by] - other[by:]).abs() if by > 0 else (one[-by:] - other[:by]).abs()
        for one, other in pairs
        if len(one) > abs(by)
    ]
    gaps = torch.cat(moved) if moved else torch.empty(0)
    return float(gaps.mean()) if len(gaps) >= _TOKENS else math.inf


def _listed(values: Tensor) -> str:
    shown = ", ".join(f"{float(v):.3g}" for v in values[:8])
    return f"[{shown}{', …' if len(values) > 8 else ''}]"


LOOKS: tuple[Look, ...] = (look_at_given_texts, look_at_given_advantages, look_at_given_logprobs)
