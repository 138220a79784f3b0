"""What a loss did, from its weights on tokens and the recorded rewards: nothing is handed over.

The weight of a completion is minus its advantage by a divisor: its length and the number of
completions (a mean of sequence means), or one number for all (a mean over tokens, or a constant).
So the weights times a divisor are the advantages up to one factor, and any account of the
advantages that is off is off in some row. An account that fits is a reproduction of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.loss_rows import TrainedRow, trained_rows
from omni_grpo_core.doctor.policy_term import PolicyTerm, policy_term
from omni_grpo_core.doctor.reproduce import reproductions
from omni_grpo_core.doctor.reproduction import Reproduction
from omni_grpo_core.doctor.rollouts import Completion, joined

EXACT, ROUNDED = 2e-3, 2e-2
"""Largest misfit of a row's weight, by the largest: in float32 what trainers add to a deviation
before dividing by it (1e-4 of about 0.3); otherwise what 16 bits leave of it (2**-8), in a mean of
tokens and at a temperature that is itself read."""
_EPSILONS = (1e-4, 1e-8)
"""Added to a deviation by common trainers."""
_FITS = 50
"""Rounds of fitting weights of rewards to advantages scaled by the deviation of their sum."""
Divisor = str
"""``"sequence"``: the length of a completion. ``"uniform"``: one number for all."""


@dataclass(frozen=True, slots=True, eq=False)
class Rewarded:
    """The completions that advantages were computed over. ``rewards``: float64 (P, F), 0 where a
    function returned None. ``groups``: the completions of one prompt, (P,)."""

    completions: tuple[Completion, ...]
    rewards: Tensor
    groups: tuple[int, ...]
    calls: tuple[int, ...]

    @property
    def total(self) -> Tensor:
        """(P,): the sum of the functions' rewards."""
        return self.rewards.sum(1)


@dataclass(frozen=True, slots=True, eq=False)
class Account:
    """One way to have computed the advantages that gives the weights. ``base``: what rewards are
    compared with (``"group"``, ``"batch"``, ``"nothing"``, ``"other groups"``); ``scale`` likewise,
    or ``"none"``; ``divisor``: of the weights. ``factor``: minus the weights times the divisor are
    so many times the advantages; NaN where weights of the rewards were fitted. ``order``: what was
    done to the rows."""

    base: str
    scale: str
    divisor: Divisor
    factor: float
    order: Reproduction | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """Weights of rows with rewards. ``policy``: the rows' weights of the policy's term, (R,), and
    ``at``: each row's place among the rewarded. ``limit``: misfit allowed."""

    rows: tuple[TrainedRow, ...]
    rewarded: Rewarded
    at: tuple[int, ...]
    term: PolicyTerm
    limit: float

    @property
    def lengths(self) -> Tensor:
        """float64 (R,): tokens that count; those up to the eos where a row has no weight."""
        return torch.tensor(
            [
                float(row.counted.sum()) or float(row.end - self.term.eos_left_out)
                for row in self.rows
            ],
            dtype=torch.float64,
        )

    def divided(self, divisor: Divisor) -> Tensor:
        """(R,): the advantages up to one factor, if this is the divisor."""
        return -self.term.weights * (self.lengths if divisor == "sequence" else 1.0)


def reading(case: Case) -> Reading | None:
    """``None`` where no row with a known reward has a weight that is the policy's alone."""
    return case.once(_reading)


def _reading(case: Case) -> Reading | None:
    term = policy_term(case)
    rewarded = _rewarded(case)
    if term is None or rewarded is None:
        return None
    place = {completion: at for at, completion in enumerate(rewarded.completions)}
    if any(row.completion not in place for row in term.rows):
        return None
    at = tuple(place[row.completion] for row in term.rows)
    limit = EXACT if all(row.exact for row in term.rows) else ROUNDED
    return Reading(term.rows, rewarded, at, term, limit)


def _rewarded(case: Case) -> Rewarded | None:
    step = joined(case)
    trained = {row.completion for row in trained_rows(case)}
    pool = step.completions if trained & {*step.completions} else step.earlier
    held = [(c, step.rewards_of(c)) for c in pool]
    names = list(dict.fromkeys(name for _, given in held for name in given))
    known = [(c, g) for c, g in held if any(g.get(name) is not None for name in names)]
    if not names or len(known) < 2:
        return None
    rewards = torch.tensor(
        [[_number(given.get(name)) for name in names] for _, given in known], dtype=torch.float64
    )
    calls: dict[int, int] = {}
    return Rewarded(
        tuple(c for c, _ in known),
        rewards,
        tuple(c.group for c, _ in known),
        tuple(calls.setdefault(id(c.call), len(calls)) for c, _ in known),
    )


def _number(value: float | None) -> float:
    return 0.0 if value is None or not math.isfinite(value) else float(value)


# --------------------------------------------------------------------------- advantages


def advantages(
    total: Tensor, groups: Sequence[object], base: str, scale: str, unbiased: bool, epsilon: float
) -> Tensor:
    """(P,): of total rewards; 0 in a group of equal rewards or of one."""
    values = torch.zeros_like(total)
    whole = _deviation(total, unbiased) + epsilon
    for name in dict.fromkeys(groups):
        own = torch.tensor([group == name for group in groups])
        rewards = total[own]
        if base == "group" and (len(rewards) < 2 or _equal(rewards)):
            continue
        mean = {"group": rewards.mean(), "batch": total.mean()}.get(base, torch.tensor(0.0))
        by = {"group": _deviation(rewards, unbiased) + epsilon, "batch": whole}
        values[own] = (rewards - mean) / by.get(scale, torch.tensor(1.0))
    return values


def _deviation(values: Tensor, unbiased: bool) -> Tensor:
    return values.std(unbiased=unbiased) if len(values) > 1 else torch.tensor(0.0)


def _equal(values: Tensor) -> bool:
    return float(values.max() - values.min()) <= 1e-6 * (1 + float(values.abs().max()))


def _groupings(known: Rewarded) -> dict[str, tuple[object, ...]]:
    """Completions of one prompt; where a step asks it again, those of one generate."""
    apart = tuple(zip(known.groups, known.calls, strict=True))
    return {"prompt": known.groups, "call": apart}


def sound_accounts(known: Reading) -> list[Account]:
    """Every sound way to have computed the advantages of summed rewards that gives the weights."""
    return [
        Account("group", scale, divisor, factor)
        for values, scale in _sound_values(known)
        for divisor in ("sequence", "uniform")
        if (factor := _factor(known, divisor, values)) is not None and factor > 0
    ]


def weighted_accounts(known: Reading) -> list[Account]:
    """The same with rewards weighted by what fits, where there are several and rows to spare."""
    if known.rewarded.rewards.shape[1] < 2:
        return []
    return [
        Account("group", scale, divisor, math.nan)
        for groups in dict.fromkeys(_groupings(known.rewarded).values())
        for divisor in ("sequence", "uniform")
        for scale in _weighted_scales(known, divisor, groups)
    ]


def _sound_values(known: Reading) -> Iterator[tuple[Tensor, str]]:
    total = known.rewarded.total
    for groups in dict.fromkeys(_groupings(known.rewarded).values()):
        for scale, unbiased, epsilon in product(("group", "batch"), (True, False), _EPSILONS):
            yield advantages(total, groups, "group", scale, unbiased, epsilon), scale
        yield advantages(total, groups, "group", "none", True, 0.0), "none"


def _factor(known: Reading, divisor: Divisor, values: Tensor) -> float | None:
    """How many times ``values`` (P,) the divided weights are; ``None`` where they are not."""
    got, want = known.divided(divisor), values[list(known.at)]
    return multiple(got, want, known.limit)


def multiple(got: Tensor, want: Tensor, limit: float) -> float | None:
    """The factor by which ``want`` is ``got`` up to ``limit`` of the largest; ``None`` if none.

    >>> multiple(torch.tensor([2.0, -4.0]), torch.tensor([1.0, -2.0]), 1e-6)
    2.0
    """
    square = float(want.square().sum())
    if not square or not bool(got.isfinite().all()):
        return None
    factor = float((got * want).sum()) / square
    off = float((got - factor * want).abs().max())
    return factor if off <= limit * float(got.abs().max()) and factor else None


def _weighted_scales(known: Reading, divisor: Divisor, groups: Sequence[object]) -> Iterator[str]:
    """Scales at which some weights of the rewards give the advantages, with rows to spare."""
    got, rewards = known.divided(divisor), known.rewarded.rewards
    columns = rewards.T
    centred = [advantages(c, groups, "group", "none", True, 0.0) for c in columns]
    apart = [advantages(c, groups, "group", "group", True, 1e-4) for c in columns]
    for scale, made in (("none", centred), ("group", apart)):
        if _solved(known, got, torch.stack(made, 1)[list(known.at)]) is not None:
            yield scale
    weights = torch.ones(len(columns), dtype=torch.float64)
    values = torch.stack(centred, 1)
    for _ in range(_FITS):
        total = rewards @ weights
        by = advantages(total, groups, "group", "none", True, 0.0)
        scaled = advantages(total, groups, "group", "group", True, 1e-4)
        ratio = torch.where(by != 0, scaled / by, 0.0)[:, None]
        solved = _least(got, (values * ratio)[list(known.at)])
        if not bool(solved.isfinite().all()) or not float(solved.abs().max()):
            return
        weights = solved / solved.abs().max()
    if _solved(known, got, (values * ratio)[list(known.at)]) is not None:
        yield "group"


def _least(got: Tensor, columns: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.lstsq(columns, got[:, None], driver="gelsd").solution[:, 0]
    return solution


def _solved(known: Reading, got: Tensor, columns: Tensor) -> Tensor | None:
    """Weights of the columns that give ``got``, where more distinct rows agree than it takes."""
    distinct = torch.unique(columns, dim=0)
    if int((distinct != 0).any(1).sum()) <= int(torch.linalg.matrix_rank(columns)) + 1:
        return None
    weights = _least(got, columns)
    off = float((got - columns @ weights).abs().max())
    return weights if off <= known.limit * float(got.abs().max()) else None


def wrong_accounts(known: Reading) -> Iterator[Account]:
    """Every known mistake that gives the weights, most telling first."""
    total, at = known.rewarded.total, list(known.at)
    sound = list(_sound_values(known))
    for (values, scale), divisor in product(sound, ("sequence", "uniform")):
        factor = _factor(known, divisor, values)
        if factor is not None and factor < 0:
            yield Account("group", scale, divisor, factor, Reproduction("negated", "negated"))
    for base, groups in _wrong_groups(known.rewarded):
        for scale, divisor in product(("group", "batch", "none"), ("sequence", "uniform")):
            values = advantages(total, groups, base, scale, True, 1e-4)
            factor = _factor(known, divisor, values)
            if factor is not None and factor > 0:
                yield Account(base if base != "group" else "other groups", scale, divisor, factor)
    # with two rows that differ, every order is a sign
    if int((known.term.weights != 0).sum()) < 3 or sorted(known.at) != list(range(len(total))):
        return
    order = torch.tensor(known.at).argsort()
    for (values, scale), divisor in product(sound, ("sequence", "uniform")):
        got = known.divided(divisor)
        norm = float(values[at].norm())
        if not norm or not float(got.norm()):
            continue
        factor = float(got.norm()) / norm
        # in the order of generation, in which a trainer has them
        for made in reproductions(values, got[order] / factor, known.limit, axes=("rows",)):
            swapped = made.values.get("items", ()) if made.name == "swapped" else ()
            if swapped and float(total[swapped[0]]) == float(total[swapped[1]]):
                continue  # the same reward in another group is no sign of an exchange
            if made.name in ("rolled", "swapped", "reversed"):
                yield Account("group", scale, divisor, factor, made)
                break


def _wrong_groups(known: Rewarded) -> Iterator[tuple[str, tuple[object, ...]]]:
    count, sizes = len(known.groups), {known.groups.count(g) for g in known.groups}
    right = set(map(_partition, _groupings(known).values()))
    if len(set(known.groups)) > 1:
        yield "batch", ("",) * count
    for size in sorted({*sizes, *(n for n in range(2, count) if count % n == 0)}, reverse=True):
        rows = tuple(at // size for at in range(count))
        every = tuple(at % max(1, count // size) for at in range(count))
        turned = known.groups[1:] + known.groups[:1]
        for groups in (turned, rows, every):
            if _partition(groups) not in right and len(set(groups)) > 1:
                yield "group", groups
    yield "nothing", ("",) * count


def _partition(groups: Sequence[object]) -> tuple[int, ...]:
    numbers: dict[object, int] = {}
    return tuple(numbers.setdefault(group, len(numbers)) for group in groups)


def against_rewards(known: Reading) -> tuple[int, int] | None:
    """Two completions of one prompt, the first with the higher reward and pushed down while the
    other is pushed up: no divisor and no scale does that. With several reward functions, of equal
    rewards. ``None`` where there are none."""
    rewards, weights = known.rewarded.rewards, known.term.weights
    least = known.limit * float(weights.abs().max())
    for one, other in product(range(len(known.rows)), repeat=2):
        first, second = known.at[one], known.at[other]
        if known.rewarded.groups[first] != known.rewarded.groups[second]:
            continue
        gap = rewards[first] - rewards[second]
        apart = float(weights[one]) > least and float(weights[other]) < -least
        if apart and (not gap.any() or (len(gap) == 1 and float(gap[0]) > 0)):
            return one, other
    return None
