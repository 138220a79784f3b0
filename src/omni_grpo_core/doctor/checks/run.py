"""From one recorded step to the next: state that should have continued but restarted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile

from omni_grpo_core.doctor.evidence import Case, Evidence, Look
from omni_grpo_core.doctor.rollouts import Completion, joined, rollouts

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
        # where calls of a foreign recording cannot be joined, every look says so
        with suppress(Exception):
            before = case if rollouts(case) else before
        found.append(case)
    return tuple(found)


def _number(case: Case) -> int:
    return max((step.step for step in case.steps), default=-1)


def look_at_restart(case: Case) -> Iterable[Evidence]:
    """The same prompts and the same random numbers as in the step before."""
    if case.before is None:
        return
    earlier, later = (joined(one).completions for one in (case.before, case))
    pairs = list(zip(earlier, later, strict=False))
    alike = all(one.prompt.key == other.prompt.key for one, other in pairs)
    if not pairs or len(earlier) != len(later) or not alike:
        return
    surprise = [_surprise(one, other) for one, other in pairs]
    known = [s for s in surprise if s is not None]
    several = len({one.group for one in later}) > 1
    # a second sample shares a beginning of probability p with probability p at most, so the sum of
    # -log p over n rows is at most Gamma(n)-distributed
    chance = _gamma_tail(len(known), sum(known))
    if len(known) < len(pairs) or chance > (_CHANCE_ON_SAME_ROWS if several else _CHANCE):
        return
    equal = sum(one.sampled == other.sampled for one, other in pairs)
    yield Evidence(
        "gradient",
        "began-anew",
        f"{equal} of {len(pairs)} completions are the same as in the step before, and others share "
        "their beginning, on the same prompts in the same order; by chance this happens once in "
        f"{1 / max(chance, 1e-300):,.0f} runs: random state and position in the data were reset",
        values={"equal": equal, "completions": len(pairs), "rows": alike},
    )


def _surprise(earlier: Completion, later: Completion) -> float | None:
    """-log of the probability of the tokens that two completions share from the first on; ``None``
    where they were not sampled, or their logprobs are unknown."""
    if later.call.logprobs is None or not later.call.config.get("do_sample", False):
        return None
    pairs = zip(earlier.sampled, later.sampled, strict=False)
    shared = list(takewhile(lambda both: both[0] == both[1], pairs))
    return -float(later.call.logprobs[later.at, : len(shared)].sum())


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


def look_at_optimizer(case: Case) -> Iterable[Evidence]:
    """The optimizer's own count of its updates, which begins anew with its moments."""
    before = case.before
    if before is None:
        return
    for earlier, later in zip(before.steps[-1:], case.steps[:1], strict=False):
        was = {layer.name: layer.updates for layer in earlier.layers if layer.updates}
        counted = [layer for layer in later.layers if layer.updates and layer.name in was]
        # a layer without a gradient is not updated: of a batch without its medium, say
        driven = [layer for layer in counted if layer.before is not None]
        lost = [layer for layer in counted if layer.updates < was[layer.name]]
        if all(layer.updates <= was[layer.name] for layer in driven):
            lost = lost or driven
        if lost and later.outcome == "stepped":
            yield Evidence(
                "gradient",
                "optimizer-anew",
                f"the optimizer has updated {lost[0].name} {was[lost[0].name]} times by step "
                f"{earlier.step}, and {lost[0].updates} by step {later.step}: its state, moments "
                "included, was lost",
                values={"was": was[lost[0].name], "now": lost[0].updates, "layers": len(lost)},
            )


LOOKS: tuple[Look, ...] = (look_at_restart, look_at_counters, look_at_optimizer)
