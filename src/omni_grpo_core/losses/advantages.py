"""Rewards to advantages, by explicit group id.

    A_i = (r_i - mean(group of i)) / (std + 1e-4)

(GRPO, arXiv 2402.03300, section 4.1.2; without the division: Dr. GRPO, arXiv 2503.20783.) ``std``
is unbiased, over the group (``"group"``) or over all scored rewards of the batch (``"batch"``);
``"none"`` divides by 1. Pass the rewards of all ranks together: a group may be spread over ranks,
and a batch always is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from omni_grpo_core.errors import ConfigError, RewardError
from omni_grpo_core.losses import Scale
from omni_grpo_core.tolerances import equal_rewards

__all__ = [
    "Advantages",
    "GroupStats",
    "GroupStatus",
    "Scale",
    "gdpo_advantages",
    "group_advantages",
]

GroupStatus = Literal["live", "zero-variance", "too-few"]

STD_EPSILON = 1e-4
"""Added to every standard deviation, as TRL does."""


@dataclass(frozen=True, slots=True)
class GroupStats:
    """One group. ``mean`` and ``std`` (unbiased) are those of its scored rewards, ``None`` if there
    are too few. ``live``: has a signal. ``zero-variance``: all scored rewards equal, every
    advantage exactly 0. ``too-few``: fewer than two scored rows, so nothing to compare."""

    group_id: Hashable
    scored: int
    unscored: int
    mean: float | None
    std: float | None
    status: GroupStatus


@dataclass(frozen=True, slots=True, eq=False)
class Advantages:
    """``values``: float64, (N,), in the order of the rewards; 0 where ``usable`` is False.
    ``usable``: bool, (N,): the row was scored, and so was another of its group. ``informative``:
    bool, (N,): usable, and its group is live. ``groups``: in order of first appearance.

    To leave out unscored rows, apply ``usable`` to the loss mask and the totals; to leave out
    zero-variance groups as well (DAPO's dynamic sampling, arXiv 2503.14476), ``informative``.
    """

    values: Tensor
    usable: Tensor
    informative: Tensor
    groups: tuple[GroupStats, ...]


def group_advantages(
    rewards: Sequence[float | None], group_ids: Sequence[Hashable], scale: Scale
) -> Advantages:
    """Advantages of N completions. ``rewards[i]`` is ``None`` if completion i is unscored: it does
    not count in mean and std, not even as 0.

    Raises ``ConfigError`` for an unknown scale, ``RewardError`` for lengths that differ and for a
    non-finite reward.

    Two groups of three by hand: (0, 1, 2) has mean 1, std 1; (4, None, 6) has mean 5, std sqrt 2.

    >>> found = group_advantages([0, 1, 2, 4, None, 6], ["p", "p", "p", "q", "q", "q"], "none")
    >>> found.values.tolist(), found.usable.tolist()
    ([-1.0, 0.0, 1.0, -1.0, 0.0, 1.0], [True, True, True, True, False, True])
    >>> scaled = group_advantages([0, 1, 2, 4, None, 6], ["p", "p", "p", "q", "q", "q"], "group")
    >>> [round(value * (std + 1e-4), 9) for value, std in zip(scaled.values.tolist(),
    ...     [1, 1, 1, 2 ** 0.5, 1, 2 ** 0.5])]
    [-1.0, 0.0, 1.0, -1.0, 0.0, 1.0]
    """
    _check(rewards, group_ids, scale)
    members: dict[Hashable, list[int]] = {}
    for row, group_id in enumerate(group_ids):
        members.setdefault(group_id, []).append(row)
    groups = tuple(
        _stats(group_id, [rewards[row] for row in members[group_id]]) for group_id in members
    )
    divisors = _divisors(rewards, groups, scale)

    values = torch.zeros(len(rewards), dtype=torch.float64)
    usable = torch.zeros(len(rewards), dtype=torch.bool)
    informative = torch.zeros(len(rewards), dtype=torch.bool)
    for group, divisor in zip(groups, divisors, strict=True):
        for row in members[group.group_id]:
            reward = rewards[row]
            if reward is None or group.mean is None:
                continue
            usable[row] = True
            if group.status == "live":
                informative[row] = True
                values[row] = (reward - group.mean) / divisor
    return Advantages(values, usable, informative, groups)


def gdpo_advantages(
    rewards: Mapping[str, Sequence[float | None]],
    weights: Mapping[str, float],
    group_ids: Sequence[Hashable],
) -> Advantages:
    """Advantages of N completions from several rewards, each compared within its groups before they
    are added up, so that none drowns in another of larger spread.

        S_i = sum_k weight_k (r_ki - mean(group of i)) / (std_k + 1e-4)
        A_i = (S_i - mean(S)) / (std(S) + 1e-4)

    (GDPO, arXiv 2601.05242, eq. 4 to 6.) ``mean(S)`` and ``std(S)`` are those of the batch.
    ``rewards`` and ``weights``: by the reward's name; ``None``: unscored. A completion is usable if
    any reward compares it. ``groups``: of ``S``. Raises as :func:`group_advantages`.

    Two rewards of one group by hand: the first says 1/sqrt 2 and -1/sqrt 2; the second says the
    opposite, although it is ten times as wide. With weight 2 the first decides: S is 1/sqrt 2 and
    -1/sqrt 2, whose deviation is 1.

    >>> rewards, weights = {"right": [1, 0], "short": [0, 10]}, {"right": 2, "short": 1}
    >>> found = gdpo_advantages(rewards, weights, ["p", "p"])
    >>> [round(value, 3) for value in found.values.tolist()]
    [0.707, -0.707]
    """
    parts = {name: group_advantages(own, group_ids, "group") for name, own in rewards.items()}
    none = torch.zeros(len(group_ids), dtype=torch.float64)
    total = sum((weights[name] * part.values for name, part in parts.items()), none)
    sums = [
        float(value) if any(own[row] is not None for own in rewards.values()) else None
        for row, value in enumerate(total)
    ]
    scored = torch.tensor([value is not None for value in sums])
    mean = total[scored].mean() if scored.any() else 0.0
    spread = total[scored].std() if int(scored.sum()) > 1 else 0.0
    usable, informative = (
        torch.stack([getattr(part, name) for part in parts.values()]).any(0)
        for name in ("usable", "informative")
    )
    # equal rewards leave an advantage of exactly 0, not one of the mean's rounding
    values = torch.where(informative, (total - mean) / (spread + STD_EPSILON), 0.0)
    groups = group_advantages(sums, group_ids, "none").groups
    return Advantages(values, usable, informative, groups)


def _stats(group_id: Hashable, rewards: Sequence[float | None]) -> GroupStats:
    scored = [float(reward) for reward in rewards if reward is not None]
    unscored = len(rewards) - len(scored)
    if len(scored) < 2:
        return GroupStats(group_id, len(scored), unscored, None, None, "too-few")
    # dividing by STD_EPSILON would turn rounding into a signal
    flat = equal_rewards(scored)
    return GroupStats(
        group_id,
        len(scored),
        unscored,
        statistics.fmean(scored),
        statistics.stdev(scored),
        "zero-variance" if flat else "live",
    )


def _divisors(
    rewards: Sequence[float | None], groups: Sequence[GroupStats], scale: Scale
) -> list[float]:
    if scale == "none":
        return [1.0] * len(groups)
    if scale == "group":
        return [(group.std or 0.0) + STD_EPSILON for group in groups]
    scored = [float(reward) for reward in rewards if reward is not None]
    spread = statistics.stdev(scored) if len(scored) > 1 else 0.0
    return [spread + STD_EPSILON] * len(groups)


def _check(rewards: Sequence[float | None], group_ids: Sequence[Hashable], scale: Scale) -> None:
    if scale not in get_args(Scale):
        raise ConfigError(
            "advantage scale", got=repr(scale), want=f"one of {get_args(Scale)}", fix="correct it"
        )
    if len(rewards) != len(group_ids):
        raise RewardError(
            "rewards",
            got=f"{len(rewards)} rewards for {len(group_ids)} group ids",
            want="one reward per completion",
            fix="return None for what could not be scored instead of leaving it out",
        )
    for row, (reward, group_id) in enumerate(zip(rewards, group_ids, strict=True)):
        if reward is not None and not math.isfinite(reward):
            raise RewardError(
                f"reward {row}, group {group_id!r}",
                got=str(reward),
                want="a finite number, or None for unscored",
                fix="find the reward that divides by zero or overflows",
            )
