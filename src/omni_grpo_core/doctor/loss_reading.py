"""What a loss's weights are weights of: completions with their rewards; nothing is handed over.

The weight of a completion is minus its advantage by a divisor: its length and the number of
completions (a mean of sequence means), its micro-batch's tokens (a mean over each), or one number
for all (a mean over the step's tokens, or a constant). So the weights times a divisor are the
advantages up to one factor. :mod:`~omni_grpo_core.doctor.loss_accounts` tries what they could be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.loss_rows import TrainedRow, trained_rows
from omni_grpo_core.doctor.policy_term import PolicyTerm, policy_term
from omni_grpo_core.doctor.rollouts import Completion, joined

EXACT, ROUNDED = 2e-3, 2e-2
"""Largest misfit of a row's weight, by the largest: in float32 what trainers add to a deviation
before dividing by it (1e-4 of about 0.3); otherwise what 16 bits leave of it (2**-8), in a mean of
tokens and at a temperature that is itself read."""
Divisor = Literal["sequence", "uniform", "part", "places"]
"""The length of a completion; one number for all; the tokens of a micro-batch, or all its places,
padding included."""


@dataclass(frozen=True, slots=True, eq=False)
class Rewarded:
    """The P completions that advantages were computed over, in the order of their generation.
    ``rewards``: float64 (P, F), 0 where a function returned None. ``groups``: by prompt, (P,).
    ``calls``: of generate, (P,). ``names``: of the functions, (F,)."""

    completions: tuple[Completion, ...]
    rewards: Tensor
    groups: tuple[int, ...]
    calls: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def total(self) -> Tensor:
        """(P,): the sum of the functions' rewards."""
        return self.rewards.sum(1)


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """Weights of R rows with rewards. ``at``: each row's place among the rewarded. ``limit``:
    misfit allowed."""

    rows: tuple[TrainedRow, ...]
    rewarded: Rewarded
    at: tuple[int, ...]
    term: PolicyTerm
    limit: float

    @property
    def lengths(self) -> Tensor:
        """float64 (R,): tokens that count; those up to the eos where a row has no weight, where
        clipping has taken some of them out, or where only a KL gives them any."""
        whole = [float(row.end - self.term.eos_left_out) for row in self.rows]
        if self.term.ratio == "none" and self.term.kl is None:
            counted = [float(row.counted.sum()) for row in self.rows]
            whole = [own or all_ for own, all_ in zip(counted, whole, strict=True)]
        return torch.tensor(whole, dtype=torch.float64)

    @property
    def parts(self) -> dict[int, float]:
        """Tokens of each micro-batch, by number."""
        found: dict[int, float] = {}
        for row, length in zip(self.rows, self.lengths.tolist(), strict=True):
            found[row.part] = found.get(row.part, 0.0) + length
        return found

    @property
    def places(self) -> dict[int, float]:
        """Places of each micro-batch, padding included, by number."""
        found: dict[int, float] = {}
        for row in self.rows:
            found[row.part] = found.get(row.part, 0.0) + row.width
        return found

    @property
    def divisors(self) -> tuple[Divisor, ...]:
        """Those that are not the same one here."""
        found: list[Divisor] = ["sequence", "uniform"]
        found += ["part"] * (len({*self.parts.values()}) > 1)
        found += ["places"] * (len({*self.places.values()}) > 1)
        return tuple(found)

    def divided(self, divisor: Divisor) -> Tensor:
        """(R,): the advantages up to one factor, if this is the divisor."""
        if divisor in ("part", "places"):
            by = self.parts if divisor == "part" else self.places
            return -self.term.weights * torch.tensor([by[row.part] for row in self.rows])
        return -self.term.weights * (self.lengths if divisor == "sequence" else 1.0)

    def of_rows(self, kept: Tensor) -> Reading:
        """The same of some of the rows; ``kept``: bool (R,)."""
        places = kept.nonzero().flatten().tolist()
        return replace(
            self,
            rows=tuple(self.rows[n] for n in places),
            at=tuple(self.at[n] for n in places),
            term=replace(self.term, weights=self.term.weights[places]),
        )

    @property
    def alike(self) -> list[Tensor]:
        """Places of rows of equal content: which of them has which weight cannot be told."""
        by_content: dict[object, list[int]] = {}
        for place, at in enumerate(self.at):
            one = self.rewarded.completions[at]
            by_content.setdefault((one.group, one.sampled), []).append(place)
        return [torch.tensor(places) for places in by_content.values() if len(places) > 1]


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
        tuple(names),
    )


def _number(value: float | None) -> float:
    return 0.0 if value is None or not math.isfinite(value) else float(value)


def against_rewards(known: Reading) -> tuple[int, int] | None:
    """Two completions of one prompt, the first with the higher reward, by no function a lower one,
    and raised less, or lowered more, than the other by any divisor; or of equal rewards. ``None``
    where there are none; completions without a weight may be masked or clipped."""
    rewards, weights = known.rewarded.rewards, known.term.weights
    raised = [known.divided(divisor) for divisor in known.divisors]
    least = [known.limit * float(by.abs().max()) for by in raised]
    for one in range(len(known.rows)):
        for other in range(len(known.rows)):
            first, second = known.at[one], known.at[other]
            if known.rewarded.groups[first] != known.rewarded.groups[second]:
                continue
            gap = rewards[first] - rewards[second]
            apart = (
                bool(weights[one])
                and bool(weights[other])
                and all(
                    float(by[other] - by[one]) > 2 * limit
                    for by, limit in zip(raised, least, strict=True)
                )
            )
            if apart and bool((gap >= 0).all()):
                return one, other
    return None


def consistent(known: Reading) -> Divisor | None:
    """The divisor by which completions of one prompt with equal rewards have equal advantages."""
    for divisor in known.divisors:
        raised = known.divided(divisor)
        seen: dict[object, list[float]] = {}
        for at, by in zip(known.at, raised.tolist(), strict=True):
            rewards = tuple(known.rewarded.rewards[at].tolist())
            seen.setdefault((known.rewarded.groups[at], rewards), []).append(by)
        if max(max(own) - min(own) for own in seen.values()) <= _alike(known, raised):
            return divisor
    return None


def blind_to_rewards(known: Reading) -> bool:
    """Whether what a function pays makes no difference: of each one that pays completions of one
    prompt otherwise, some two get one advantage, not 0, although the one earns more than their mean
    and the other less, and no other function pays it more in return."""
    rewards = known.rewarded.rewards[list(known.at)]
    groups = torch.tensor([known.rewarded.groups[at] for at in known.at])
    one_group = groups[:, None] == groups
    mean = torch.stack([rewards[own].mean(0) for own in one_group])
    more = (rewards[:, None] >= rewards).all(-1) & one_group
    live = known.term.weights != 0
    tied = torch.zeros_like(one_group)
    for raised in map(known.divided, known.divisors):
        tied |= (raised[:, None] - raised).abs() <= _alike(known, raised)
    tied &= more & live[:, None] & live
    above, below = rewards > mean, rewards < mean
    pays = (above.any(0)).nonzero().flatten().tolist()
    return bool(pays) and all(
        bool((tied & above[:, None, n] & below[None, :, n]).any()) for n in pays
    )


def _alike(known: Reading, raised: Tensor) -> float:
    return known.limit * float(raised.abs().max())
