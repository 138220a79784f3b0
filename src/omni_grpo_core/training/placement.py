"""Which completions of a step each process samples, scores and learns from."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """One process's part of a step: the completions ``completions`` of each of the prompts
    ``prompts``, both counted within the step. ``most``: of one prompt on any process."""

    prompts: range
    completions: range
    most: int


def share_of(prompts: int, group_size: int, world: int, rank: int) -> Share:
    """Whole groups, equally many on each process, where that is possible; else each group is split
    as evenly as it can be over as few processes as do not leave any without work.

    On four processes, eight groups, two groups of four, and one group of seven:

    >>> [tuple(share_of(8, 4, 4, rank).prompts) for rank in range(4)]
    [(0, 1), (2, 3), (4, 5), (6, 7)]
    >>> [(*share_of(2, 4, 4, rank).prompts, share_of(2, 4, 4, rank).completions)
    ...  for rank in range(4)]
    [(0, range(0, 2)), (0, range(2, 4)), (1, range(0, 2)), (1, range(2, 4))]
    >>> [len(share_of(1, 7, 4, rank).completions) for rank in range(4)]
    [1, 2, 2, 2]
    """
    teams = math.gcd(prompts, world)
    members = world // teams
    team, place = divmod(rank, members)
    each = prompts // teams
    first, last = (group_size * at // members for at in (place, place + 1))
    return Share(
        range(team * each, (team + 1) * each), range(first, last), -(-group_size // members)
    )


def fewest(prompts: int, world: int) -> int:
    """The smallest group that leaves no process without a completion.

    >>> fewest(1, 4), fewest(6, 4), fewest(8, 4)
    (4, 2, 1)
    """
    return world // math.gcd(prompts, world)
