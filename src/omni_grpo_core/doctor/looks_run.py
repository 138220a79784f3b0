"""From one recorded step to the next: what should have gone on, and began anew."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch

from omni_grpo_core.doctor.evidence import Case, Evidence, Look
from omni_grpo_core.doctor.turns import Turn, completion_ids, ids_of, turns, until_end

BEFORE = "before"
"""Under this key of a case's memo stands the case of the step before, if it was recorded."""

_SURPRISE = 30.0
"""Nats: the same completions drawn twice by chance happen once in 1e13 runs."""


def in_order(cases: Iterable[Case]) -> None:
    """Tell each case which step came before it. ``cases``: consecutive steps of one process."""
    for earlier, later in pairwise(cases):
        later.memo[BEFORE] = earlier


def look_at_restart(case: Case) -> Iterable[Evidence]:
    """The same rows and the same random numbers as in the step before."""
    before = case.memo.get(BEFORE)
    if not isinstance(before, Case):
        return
    for earlier, later in zip(turns(before), turns(case), strict=False):
        same = _same_rows(earlier, later)
        surprise, equal, count = _same_draws(earlier, later)
        if same is False or surprise < _SURPRISE:
            continue
        yield Evidence(
            "gradient",
            "began-anew",
            f"{equal} of {count} completions are the same as in the step before"
            + (", on the same rows in the same order" if same else "")
            + f"; by chance that happens once in 1e{surprise / 2.303:.0f} runs: random state and "
            "place in the data were set back",
            values={"equal": equal, "completions": count, "rows": same},
        )
        return


def _same_rows(earlier: Turn, later: Turn) -> bool | None:
    if earlier.samples is None or later.samples is None:
        return None
    return list(earlier.samples.rows) == list(later.samples.rows)


def _same_draws(earlier: Turn, later: Turn) -> tuple[float, int, int]:
    """(how surprising the equal completions are, in nats; how many are equal; of how many)."""
    first, second = earlier.generated, later.generated
    if first is None or second is None or second.logprobs is None:
        return 0.0, 0, 0
    ids, others = completion_ids(second), completion_ids(first)
    if ids is None or others is None or len(ids) != len(others):
        return 0.0, 0, 0
    if not second.config.get("do_sample", False):
        return 0.0, 0, len(ids)
    width = min(ids.shape[1], others.shape[1])
    kept = until_end(ids, ids_of(second.config.get("eos_token_id")))[:, :width]
    surprise, equal = 0.0, 0
    for row in range(len(ids)):
        same = (ids[row, :width] == others[row, :width]) | ~kept[row]
        # a common beginning counts as well: after one other token draws go other ways
        common = kept[row] & (torch.cumprod(same.long(), 0) == 1)
        # of all beginnings that could be the same, this many more would do
        own = -float(second.logprobs[row, :width][common].sum())
        surprise += max(own - 1.0, 0.0)
        equal += int(bool(same.all()))
    return surprise, equal, len(ids)


def look_at_counters(case: Case) -> Iterable[Evidence]:
    """A trainer's own step counter and learning rate, which go back only when state was lost."""
    before = case.memo.get(BEFORE)
    if not isinstance(before, Case):
        return
    for earlier, later in zip(before.steps, case.steps, strict=False):
        for name in ("global_step", "step"):
            was, now = earlier.settings.get(name), later.settings.get(name)
            if isinstance(was, int) and isinstance(now, int) and now < was:
                yield Evidence(
                    "gradient",
                    "counter-back",
                    f"{name} went from {was} back to {now} in consecutive steps",
                    values={"name": name, "was": was, "now": now},
                )


LOOKS: tuple[Look, ...] = (look_at_restart, look_at_counters)
