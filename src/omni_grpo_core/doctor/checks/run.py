"""From one recorded step to the next: state that should have continued but restarted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from omni_grpo_core.doctor.evidence import Case, Evidence, Look
from omni_grpo_core.doctor.rollouts import (
    RolloutRecord,
    completion_ids,
    ids_of,
    rollouts,
    until_end,
)

_CHANCE, _CHANCE_ON_SAME_ROWS = 1e-9, 0.02
"""How rare a coincidence must be. Several rows repeated in the same order are one already, although
a data set of one batch repeats at every step."""


def in_order(cases: Iterable[Case]) -> tuple[Case, ...]:
    """Each case with the last earlier step that had a rollout. ``cases``: steps in order, rank by
    rank."""
    before: Case | None = None
    found = []
    for case in cases:
        if before is not None and _number(before) < _number(case):
            case = replace(case, before=before)
        if rollouts(case):
            before = case
        found.append(case)
    return tuple(found)


def _number(case: Case) -> int:
    return max((step.step for step in case.steps), default=-1)


def look_at_restart(case: Case) -> Iterable[Evidence]:
    """The same rows and the same random numbers as in the step before."""
    before = case.before
    if before is None:
        return
    for earlier, later in zip(rollouts(before), rollouts(case), strict=False):
        same = _same_rows(earlier, later)
        several = later.samples is not None and len(later.samples.rows) > 1
        chance, equal, count = _same_draws(earlier, later)
        if same is False or chance > (_CHANCE_ON_SAME_ROWS if same and several else _CHANCE):
            continue
        yield Evidence(
            "gradient",
            "began-anew",
            f"{equal} of {count} completions are the same as in the step before, and others share "
            "their beginning"
            + (", on the same rows in the same order" if same else "")
            + f"; by chance this happens once in {1 / max(chance, 1e-300):,.0f} runs: random state "
            "and position in the data were reset",
            values={"equal": equal, "completions": count, "rows": same},
        )
        return


def _same_rows(earlier: RolloutRecord, later: RolloutRecord) -> bool | None:
    if earlier.samples is None or later.samples is None:
        return None
    return list(earlier.samples.rows) == list(later.samples.rows)


def _same_draws(earlier: RolloutRecord, later: RolloutRecord) -> tuple[float, int, int]:
    """(probability that two rollouts are this much alike, equal completions, completions).

    The probability that a second sample shares a beginning of probability p is at most p, so the
    sum of -log p over n rows is at most Gamma(n)-distributed.
    """
    first, second = earlier.generated, later.generated
    if first is None or second is None or second.logprobs is None:
        return 1.0, 0, 0
    ids, others = completion_ids(second), completion_ids(first)
    if ids is None or others is None or len(ids) != len(others):
        return 1.0, 0, 0
    if not second.config.get("do_sample", False):
        return 1.0, 0, len(ids)
    width = min(ids.shape[1], others.shape[1])
    kept = until_end(ids, ids_of(second.config.get("eos_token_id")))[:, :width]
    total, equal = 0.0, 0
    for row in range(len(ids)):
        same = (ids[row, :width] == others[row, :width]) | ~kept[row]
        common = kept[row] & (torch.cumprod(same.long(), 0) == 1)
        total -= float(second.logprobs[row, :width][common].sum())
        equal += int(bool(same.all()))
    return _gamma_tail(len(ids), total), equal, len(ids)


def _gamma_tail(rows: int, total: float) -> float:
    """Probability that a sum of ``rows`` exponential variables of mean 1 is at least ``total``.

    >>> round(_gamma_tail(1, 2.0), 4), round(_gamma_tail(2, 2.0), 4)
    (0.1353, 0.406)
    """
    term, found = math.exp(-total), 0.0
    for k in range(rows):
        found += term
        term *= total / (k + 1)
    return min(found, 1.0)


def look_at_counters(case: Case) -> Iterable[Evidence]:
    """A trainer's own step counter, which decreases only when state was lost."""
    before = case.before
    if before is None:
        return
    for earlier, later in zip(before.steps, case.steps, strict=False):
        for name in ("global_step", "step"):
            was, now = earlier.settings.get(name), later.settings.get(name)
            if isinstance(was, int) and isinstance(now, int) and now < was:
                yield Evidence(
                    "gradient",
                    "counter-back",
                    f"{name} went back from {was} to {now} in consecutive steps",
                    values={"name": name, "was": was, "now": now},
                )


LOOKS: tuple[Look, ...] = (look_at_restart, look_at_counters)
