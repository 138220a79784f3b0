"""The same tokens scored twice with the same weights: the second forward should be equal."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import torch

from omni_grpo_core.doctor.edge_rows import positions_of
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged
from omni_grpo_core.doctor.rollouts import Completion, same_media
from omni_grpo_core.doctor.scored import Scored, scored_of
from omni_grpo_core.doctor.teacher_forced import tolerance
from omni_grpo_core.tolerances import Limit

_NATS = 0.1
"""Mean distance from which ratios are off by a tenth."""


def look_at_repeated(case: Case) -> Iterable[Evidence]:
    """Weights only change in the optimizer's step, which ends a recorded step."""
    if not all(step.outcome == "stepped" for step in case.steps) or not case.steps:
        return
    by_completion: dict[Completion, list[Scored]] = {}
    for one in scored_of(case):
        by_completion.setdefault(one.completion, []).append(one)
    for twice in by_completion.values():
        for first, second in combinations(twice, 2):
            if _precision(first) != _precision(second) or not same_media(first.row, second.row):
                continue
            note_judged(case, "logits")
            mean = float((first.logprobs - second.logprobs).abs().mean())
            if mean > _allowed(first, second).mean:
                yield _evidence(first, second, mean)
                return


def _precision(one: Scored) -> tuple[str, str | None]:
    return one.forward.modes.dtype, one.forward.modes.autocast


def _allowed(first: Scored, second: Scored) -> Limit:
    return max(
        (tolerance(one.forward.modes) for one in (first, second)), key=lambda limit: limit.mean
    )


def _evidence(first: Scored, second: Scored, mean: float) -> Evidence:
    training = [one.forward.modes.training for one in (first, second)]
    mode = {
        (False, True): "the first ran in eval mode, the second in train mode",
        (True, False): "the first ran in train mode, the second in eval mode",
        (True, True): "both ran in train mode",
        (False, False): "both ran in eval mode",
    }[training[0], training[1]]
    dropout = max(one.forward.modes.dropout for one in (first, second))
    mode += f", with dropout of {dropout:g}" if dropout else ""
    here, there = (positions_of(one.forward, one.row.at, one.row) for one in (first, second))
    moved = here is not None and there is not None and not torch.equal(here, there)
    if moved:
        mode += "; their position ids differ"
    return Evidence(
        "logits",
        "second-forward-differs",
        f"two forwards of the same tokens and media with the same weights give logprobs that "
        f"differ by {mean:.3g} on average; {mode}",
        values={"mean": mean, "dropout": dropout, "moved": moved},
        severity="breaks" if mean > _NATS else "differs",
    )


LOOKS: tuple[Look, ...] = (look_at_repeated,)
