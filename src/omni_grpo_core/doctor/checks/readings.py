"""Logprobs in the loss: by which reading of the forward's scores they came about."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.doctor.checks.logits import forward_gap, temperature_of
from omni_grpo_core.doctor.evidence import Case, Evidence, Look
from omni_grpo_core.doctor.rollouts import Learned, first_step, ids_of, learned
from omni_grpo_core.doctor.teacher_forced import Place, Taught, apart, rescored, tolerance


@dataclass(frozen=True, slots=True)
class _Reading:
    """One way in which a trainer may have come by its logprobs, and how far off that is."""

    temperature: float
    place: Place
    suppressed: bool
    mean: float
    worst: float


def look_at_logprobs(case: Case) -> Iterable[Evidence]:
    """Logprobs in the loss, against the scores of the forward that they were taken from."""
    for at, one in enumerate(learned(case)):
        readings = _readings(case, one)
        if not readings:
            continue
        forward, call = one.forward, None if one.rollout is None else one.rollout.generated
        known = None if forward is None else rescored(case, forward)
        if forward is None or known is None:
            continue
        gap = forward_gap(case, forward)
        if gap is None:
            continue
        # scores that are off themselves are told of the logits; readings are then less sharp
        allowed = tolerance(forward.modes, known.policy).mean + 3 * gap.mean
        best = min(readings, key=lambda r: r.mean)
        sampled = 1.0 if call is None else temperature_of(call)
        # low precision is told of the logits: its error is no other reading
        if best.mean > max(allowed, 0.05):
            yield Evidence(
                "loss",
                "logprobs-differ",
                f"loss {at}: its logprobs are off by {best.mean:.3g} in the mean from the scores "
                "of its own forward, whatever temperature is taken",
                values={"mean": best.mean, "worst": best.worst},
            )
        elif best.place == "at":
            right = min((r for r in readings if r.place == "before"), key=lambda r: r.mean)
            yield Evidence(
                "loss",
                "shifted",
                f"loss {at}: each token's logprob is that of the scores at its own place, which "
                f"predict the next token (off by {best.mean:.2g}); from the scores before it they "
                f"are off by {right.mean:.3g}",
                values={"mean": right.mean, "shifted_mean": best.mean},
            )
        elif (
            call is not None
            and call.config.get("do_sample", False)
            and not math.isclose(best.temperature, sampled, rel_tol=1e-3)
        ):
            own = min(
                (r.mean for r in readings if r.place == "before" and r.temperature == sampled),
                default=math.nan,
            )
            if not own > max(allowed, 3 * best.mean):
                continue
            yield Evidence(
                "completion",
                "temperature-differs",
                f"completions were sampled at temperature {sampled:g} and scored at "
                f"{best.temperature:g}: logprobs of the loss are off by {own:.3g} from those of "
                "the distribution that was sampled, so the ratio is not 1 on the policy's own "
                "samples",
                values={"sampled": sampled, "scored": best.temperature, "mean": own},
            )


def _readings(case: Case, one: Learned) -> list[_Reading]:
    if not first_step(case) or one.forward is None or one.loss.logprobs is None:
        return []
    known = rescored(case, one.forward)
    given, mask = one.loss.logprobs, one.loss.mask
    if known is None or given.ndim != 2 or given.shape[1] > known.ids.shape[1]:
        return []
    if len(given) != len(known.ids):
        return []
    width = given.shape[1]
    kept = known.mask[:, -width:] & (given != 0)
    if mask is not None and mask.shape == given.shape:
        kept &= mask.bool()
    if not bool(kept.any()):
        return []
    call = None if one.rollout is None else one.rollout.generated
    temperatures = {1.0, *_temperatures(one.loss.settings)}
    suppressed: Sequence[int] = ()
    if call is not None:
        temperatures.add(temperature_of(call))
        suppressed = ids_of(call.config.get("suppress_tokens"))
    return [
        _Reading(t, place, bool(held), *_off(known, given, kept, t, held, place))
        for t in sorted(temperatures)
        for held in ((), suppressed)[: 2 if suppressed else 1]
        for place in _PLACES
    ]


_PLACES: tuple[Place, ...] = ("before", "at")


def _off(
    known: Taught, given: Tensor, kept: Tensor, temperature: float, held: Sequence[int],
    place: Place,
) -> tuple[float, float]:  # fmt: skip
    made = known.logprobs(temperature, held, place)[:, -given.shape[1] :]
    # a suppressed token that was sampled all the same has no logprob in this reading
    return apart(given, made, kept & torch.isfinite(made))


def _temperatures(settings: Mapping[str, Any]) -> list[float]:
    value = settings.get("temperature")
    return [float(value)] if isinstance(value, int | float) and value > 0 else []


LOOKS: tuple[Look, ...] = (look_at_logprobs,)
