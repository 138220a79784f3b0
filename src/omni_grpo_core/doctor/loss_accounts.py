"""How rewards became the loss's weights: one table of hypotheses, each with one number to fit.

The advantages of a hypothesis, times one factor and by one divisor, are the weights or are not. The
sound ones come first, then recipes that work and differ, then mistakes. What an order of rows
explains is a proof only where few orders could have: of arrangements of the same numbers there must
be many more than were tried.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

import torch
from torch import Tensor

from omni_grpo_core.doctor.loss_reading import EXACT, Divisor, Reading, Rewarded

Kind = Literal["sound", "bare", "best", "better", "batch-mean", "other-groups", "order"]
_EPSILONS = (1e-4, 1e-8)
"""Added to a deviation by common trainers."""
_FITS = 50
"""Rounds of fitting weights of rewards to advantages scaled by the deviation of their sum."""
LEAST_CHANCE = 0.05
"""Of orders tried by arrangements possible: above it one that fits may do so by chance."""
_MOST = 64
"""Completions of which other orders are tried."""


@dataclass(frozen=True, slots=True, eq=False)
class Hypothesis:
    """One way to have computed advantages, ``values`` (P,). ``scale``: what they were divided by:
    the deviation of the ``"group"`` or ``"batch"``, or ``"none"``. ``said``: how, for a sentence.
    ``name``: of an order, as a reproduction's. ``chance``: that it fits by chance, where many of
    its kind were tried."""

    kind: Kind
    scale: str
    values: Tensor
    said: str = ""
    name: str = ""
    chance: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Account:
    """A hypothesis that gives the weights: minus them, times the divisor, are ``factor`` times its
    values; NaN where weights of the rewards were fitted."""

    by: Hypothesis
    divisor: Divisor
    factor: float

    @property
    def scale(self) -> str:
        return self.by.scale


def advantages(
    total: Tensor,
    groups: Sequence[object],
    base: str = "group",
    scale: str = "group",
    unbiased: bool = True,
    epsilon: float = 1e-4,
) -> Tensor:
    """(..., P) of total rewards, (..., P). ``base``: the mean of the ``"group"`` or ``"batch"``, or
    ``"nothing"``. 0 in a group of equal rewards or of one.

    >>> advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]).double(), "aabb", scale="none").tolist()
    [-1.0, 1.0, 0.0, 0.0]
    """
    one_hot = torch.nn.functional.one_hot(torch.tensor(partition(groups))).to(total)
    sizes = one_hot.sum(0)
    mean = (total @ one_hot / sizes) @ one_hot.T
    centred = total - mean
    squares = centred.square() @ one_hot
    flat = (squares / sizes).sqrt() @ one_hot.T <= 1e-6 * (1 + mean.abs())
    values = centred if base == "group" else total
    if base == "batch":
        values = total - total.mean(-1, keepdim=True)
    if scale == "group":
        deviation = (squares / (sizes - int(unbiased)).clamp(min=1)).sqrt() @ one_hot.T
        values = values / (deviation + epsilon)
    elif scale == "batch":
        values = values / (total.std(-1, unbiased=unbiased, keepdim=True) + epsilon)
    return torch.where(flat, 0.0, values) if base == "group" else values


def partition(groups: Sequence[object]) -> tuple[int, ...]:
    """
    >>> partition("bab")
    (0, 1, 0)
    """
    numbers: dict[object, int] = {}
    return tuple(numbers.setdefault(group, len(numbers)) for group in groups)


# --------------------------------------------------------------------------- the table


def _groupings(known: Rewarded) -> list[tuple[int, ...]]:
    """Completions of one prompt; where a step asks it again, those of one generate, or parts of one
    size, in order or in turn; where that makes groups of one size, those of equal words, as one of
    them got other media."""
    words = partition([one.prompt.ids for one in known.completions])
    ways = [partition(known.groups), partition([*zip(known.groups, known.calls, strict=True)])]
    ways += _drawn_again(ways[0])
    if len({*Counter(words).values()}) == 1 < len({*Counter(ways[0]).values()}):
        ways.append(words)
    return list(dict.fromkeys(ways))


def _drawn_again(prompts: Sequence[int]) -> list[tuple[int, ...]]:
    """Groups of one size, each of one prompt, where a batch may have drawn a prompt several times.

    >>> _drawn_again([0, 0, 0, 0, 1, 1])
    [(0, 0, 1, 1, 2, 2), (0, 1, 0, 1, 2, 2)]
    """
    counts = Counter(prompts)
    nth = [prompts[:at].count(prompt) for at, prompt in enumerate(prompts)]
    sizes = [n for n in range(2, max(counts.values())) if not any(c % n for c in counts.values())]
    found = []
    for size in sizes:
        pairs = [*zip(prompts, nth, strict=True)]
        found.append(partition([(one, at // size) for one, at in pairs]))
        found.append(partition([(one, at % (counts[one] // size)) for one, at in pairs]))
    return found


def _sound(known: Rewarded) -> Iterator[Hypothesis]:
    for groups in _groupings(known):
        for scale, unbiased, epsilon in product(("group", "batch"), (True, False), _EPSILONS):
            values = advantages(known.total, groups, "group", scale, unbiased, epsilon)
            yield Hypothesis("sound", scale, values)
        plain, apart = (advantages(known.total, groups, scale=s) for s in ("none", "group"))
        yield Hypothesis("sound", "none", plain)
        # divided once more, by their own deviation in the whole batch
        yield Hypothesis("sound", "batch", plain / (plain.std() + _EPSILONS[-1]))
        yield Hypothesis("sound", "group", apart / (apart.std() + _EPSILONS[-1]))


def _recipes(known: Rewarded) -> Iterator[Hypothesis]:
    """Without a mean; only the best of each group."""
    groups = partition(known.groups)
    for scale in ("none", "group"):
        values = advantages(known.total, groups, "nothing", scale)
        yield Hypothesis("bare", scale, values, "nothing: no mean is subtracted")
    best = torch.zeros_like(known.total)
    for name in {*groups}:
        own = torch.tensor([group == name for group in groups])
        top = own & (known.total == known.total[own].max())
        if int(top.sum()) == 1 < int(own.sum()):
            best[top] = 1.0
    yield Hypothesis("best", "none", best, "1 for the best of each group and 0 for all others")


def _mistakes(known: Rewarded) -> Iterator[Hypothesis]:
    right = _groupings(known)
    if len({*known.groups}) > 1:
        for scale in ("none", "group"):
            values = advantages(known.total, right[0], "batch", scale)
            said = "the mean of the whole batch instead of their group's"
            yield Hypothesis("batch-mean", scale, values, said)
    for one in _sound(known):
        for values, said in (
            ((one.values > 0).double(), "1 where a reward is above the mean of its group, else 0"),
            (one.values.clamp(min=0), "0 where a reward is below the mean of its group"),
        ):
            yield Hypothesis("better", one.scale, values, said, chance=chance(values > 0, 1))
    others = list(_wrong_groups(known, right))
    for groups, scale in product(others, ("group", "none")):
        values = advantages(known.total, groups, scale=scale)
        said = "the mean of other groups than their prompt's"
        by_chance = chance(values, len(others))
        yield Hypothesis("other-groups", scale, values, said, chance=by_chance)


def _wrong_groups(
    known: Rewarded, right: Sequence[tuple[int, ...]]
) -> Iterator[tuple[object, ...]]:
    """By row order: blocks of a size that rows were dropped from or added to, every n-th row, the
    right ones moved by some rows."""
    tried = {*right}
    count, own = len(known.groups), known.groups
    sizes = {*Counter(own).values(), *(n for n in range(2, count) if count % n == 0)}
    for size in sorted(sizes, reverse=True):
        ways: list[tuple[object, ...]] = [
            tuple(at // size for at in range(count)),
            tuple(at % max(1, count // size) for at in range(count)),
        ]
        ways += [own[k:] + own[:k] for by in range(1, size) for k in (by, -by)]
        for groups in ways:
            if partition(groups) not in tried and len({*groups}) > 1:
                tried.add(partition(groups))
                yield groups


def _sequences(known: Reading) -> dict[str, list[Tensor]]:
    """Places of the rewarded in the blocks in which a loop may have had them: in the order of
    generation, then in that of the loss."""
    count, groups = len(known.rewarded.groups), torch.tensor(partition(known.rewarded.groups))
    found = {
        "": [torch.arange(count)],
        " within every group": [(groups == n).nonzero().flatten() for n in range(max(groups) + 1)],
    }
    if sorted(known.at) == list(range(count)):
        at, parts = torch.tensor(known.at), torch.tensor([row.part for row in known.rows])
        found[" in the order of the loss"] = [at]
        found[" within every micro-batch"] = [at[parts == n] for n in known.parts]
    return found


def _orders(known: Reading) -> Iterator[tuple[str, str, Tensor]]:
    """Name, words and places of rows in another order."""
    count = len(known.rewarded.groups)
    for where, blocks in _sequences(known).items():
        longest = max(map(len, blocks))
        for by in range(1, longest):
            near = by if by <= longest // 2 else by - longest
            rolled = _placed(blocks, [block.roll(by) for block in blocks])
            yield "rolled", f"rolled by {near} rows{where}", rolled
        reverse = _placed(blocks, [block.flip(0) for block in blocks])
        yield "reversed", f"in reverse order{where}", reverse
    groups = _sequences(known)[" within every group"]
    if len({len(own) for own in groups}) == 1 and 1 < len(groups) < count:
        table = torch.stack(groups)
        yield "reversed", "with the groups in reverse order", _placed(groups, groups[::-1])
        said = "with the rows of groups taken in turn"
        yield "transposed", said, table.T.flatten()
        yield "transposed", said, table.T.flatten().argsort()
    for one, other in combinations(range(count), 2):
        places = torch.arange(count)
        places[[one, other]] = places[[other, one]]
        yield "items-swapped", f"with rows {one} and {other} swapped", places


def _placed(blocks: Sequence[Tensor], taken: Sequence[Tensor]) -> Tensor:
    """Places, with those of each block taken from elsewhere."""
    places = torch.empty(sum(map(len, blocks)), dtype=torch.long)
    places[torch.cat([*blocks])] = torch.cat([*taken])
    return places


def _reordered(known: Reading) -> Iterator[Hypothesis]:
    paid = known.rewarded
    if len(paid.groups) > _MOST:
        return
    names, words, orders = zip(*_orders(known), strict=True)
    places = torch.stack(orders)
    for groups, scale in product(_groupings(paid), ("group", "none")):
        right = advantages(paid.total, groups, scale=scale)
        earlier = advantages(paid.total[places], groups, scale=scale)
        made = torch.cat([right[places], earlier])
        # the same numbers in the same places are no other order
        other = (made - right).abs().amax(1) > 1e-6 * right.abs().max()
        distinct: dict[tuple[float, ...], int] = {}
        for n in other.nonzero().flatten().tolist():
            distinct.setdefault(tuple(made[n].round(decimals=6).tolist()), n)
        tried = Counter(names[n % len(names)] for n in distinct.values())
        for n in distinct.values():
            name, said = names[n % len(names)], words[n % len(names)]
            said += "" if n < len(names) else ", the rewards before they were compared"
            yield Hypothesis("order", scale, made[n], said, name, chance(right, tried[name]))


def chance(values: Tensor, tried: int) -> float:
    """That one of so many arrangements of these numbers is any given one.

    >>> round(chance(torch.tensor([0.0, 0.0, 1.0, 1.0]), tried=3), 3)
    0.5
    """
    # what a fit could not tell apart counts as equal
    ordered = values.double().sort().values
    steps = ordered.diff() > 2 * EXACT * float(ordered.abs().max())
    counts = Counter([0, *steps.cumsum(0).tolist()])
    ways = math.lgamma(len(values) + 1) - sum(math.lgamma(n + 1) for n in counts.values())
    return min(1.0, tried * math.exp(-ways))


# --------------------------------------------------------------------------- what fits


def sound_accounts(known: Reading) -> list[Account]:
    """Every sound way to have computed the advantages of summed rewards that gives the weights."""
    return [one for one in _fitting(known, _sound(known.rewarded)) if one.factor > 0]


def sound_values(known: Rewarded) -> list[Tensor]:
    """Advantages, (P,), that a sound loop may have made of the rewards."""
    return [one.values for one in _sound(known)]


def recipes(known: Reading) -> list[Account]:
    """Every way that works and is another recipe."""
    if not enough(known):
        return []
    return [one for one in _fitting(known, _recipes(known.rewarded)) if one.factor > 0]


def mistakes(known: Reading) -> list[Account]:
    """Every known mistake that gives the weights, in the order of the table."""
    if not enough(known):
        return []
    found = [one for one in _fitting(known, _sound(known.rewarded)) if one.factor < 0]
    return found + [one for one in _fitting(known, _mistakes(known.rewarded)) if one.factor > 0]


def enough(known: Reading) -> bool:
    """Whether so many rows have a weight that a factor to fit leaves something to be wrong about;
    of a part of a rollout, more, as it tells nothing of the groups."""
    live = int((known.term.weights != 0).sum())
    return live >= (3 if is_whole(known) else 4)


def is_whole(known: Reading) -> bool:
    """Whether every rewarded completion is among the rows."""
    return len({*known.at}) == len(known.rewarded.completions)


def orders(known: Reading) -> list[Account]:
    """Every other order of rows that gives the weights."""
    # with two rows that differ, every order is a sign
    if not enough(known):
        return []
    return [one for one in _fitting(known, _reordered(known)) if one.factor > 0]


def _fitting(known: Reading, hypotheses: Iterable[Hypothesis]) -> list[Account]:
    table = list(hypotheses)
    if not table:
        return []
    want = torch.stack([one.values for one in table])[:, list(known.at)]
    found = []
    for divisor in known.divisors:
        got = known.divided(divisor)
        # weights that hardly differ are near those of any account that is no comparison
        size = got.abs().max() if table[0].kind == "sound" else got.max() - got.min()
        limit = known.limit * float(size / got.abs().max())
        factors = multiples(got, want, limit, known.alike)
        found += [Account(table[n], divisor, f) for n, f in enumerate(factors) if f]
    return found


def multiples(got: Tensor, want: Tensor, limit: float, alike: Sequence[Tensor] = ()) -> list[float]:
    """For each row of ``want`` (H, R) the factor by which it is ``got`` (R,), up to ``limit`` of
    the largest; 0 where it is not. Numbers at places that are ``alike`` may be exchanged.

    >>> multiples(torch.tensor([2.0, -4.0]), torch.tensor([[1.0, -2.0], [1.0, 1.0]]), 1e-6)
    [2.0, 0.0]
    """
    found = torch.zeros(len(want), dtype=torch.float64)
    if not bool(got.isfinite().all()) or not bool(got.any()):
        return found.tolist()
    for sign in (1, -1):
        given, made = got.double().clone(), want.double().clone()
        for places in alike:
            given[places] = given[places].sort().values
            made[:, places] = made[:, places].sort(-1, descending=sign < 0).values
        factor = (made @ given) / made.square().sum(-1).clamp(min=1e-300)
        off = (given - factor[:, None] * made).abs().amax(-1)
        fits = (off <= limit * given.abs().max()) & (factor * sign > 0)
        found = torch.where(fits & (found == 0), factor, found)
    return found.tolist()


# --------------------------------------------------------------------------- weighted rewards


def weighted_accounts(known: Reading) -> list[Account]:
    """Sound ways with rewards weighted by what fits, where there are several and rows to spare."""
    if known.rewarded.rewards.shape[1] < 2:
        return []
    return [
        Account(Hypothesis("sound", scale, known.rewarded.total), divisor, math.nan)
        for groups in _groupings(known.rewarded)
        for divisor in known.divisors
        for scale in weighted_scales(
            known.divided(divisor), known.rewarded.rewards, groups, known.limit, known.at
        )
    ]


def weighted_scales(
    got: Tensor,
    rewards: Tensor,
    groups: Sequence[object],
    limit: float,
    at: Sequence[int] | None = None,
) -> Iterator[str]:
    """Scales at which some weights of the rewards (P, F) give ``got``, the advantages of the rows
    ``at`` (of all) up to one factor, with rows to spare."""
    own = list(range(len(rewards)) if at is None else at)
    centred = advantages(rewards.T, groups, scale="none").T
    apart = advantages(rewards.T, groups).T
    for scale, made in (("none", centred), ("group", apart)):
        if _solved(got, made[own], limit):
            yield scale
    weights = torch.ones(rewards.shape[1], dtype=torch.float64)
    for _ in range(_FITS):
        total = rewards @ weights
        by = advantages(total, groups, scale="none")
        ratio = torch.where(by != 0, advantages(total, groups) / by, 0.0)[:, None]
        solved = _least(got, (centred * ratio)[own])
        if not bool(solved.isfinite().all()) or not float(solved.abs().max()):
            return
        weights = solved / solved.abs().max()
    if _solved(got, (centred * ratio)[own], limit):
        yield "group"


def _least(got: Tensor, columns: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.lstsq(columns, got[:, None], driver="gelsd").solution[:, 0]
    return solution


def _solved(got: Tensor, columns: Tensor, limit: float) -> bool:
    """Whether weights of the columns give ``got``, where more distinct rows agree than it takes."""
    distinct = torch.unique(columns, dim=0)
    if int((distinct != 0).any(1).sum()) <= int(torch.linalg.matrix_rank(columns)) + 1:
        return False
    off = float((got - columns @ _least(got, columns)).abs().max())
    return off <= limit * float(got.abs().max())
