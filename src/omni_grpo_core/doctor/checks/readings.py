"""Logprobs in the loss: how they were computed from the forward's scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.doctor.checks.logits import forward_gap, temperature_of
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged
from omni_grpo_core.doctor.rollouts import LossRecord, first_step, ids_of, losses_of
from omni_grpo_core.doctor.teacher_forced import Place, Replayed, diff, replay_forward, tolerance


@dataclass(frozen=True, slots=True)
class _Reading:
    """One way in which a trainer may have computed its logprobs, and its distance from them."""

    temperature: float
    place: Place
    suppressed: bool
    mean: float
    worst: float


def look_at_logprobs(case: Case) -> Iterable[Evidence]:
    """Logprobs in the loss, compared with the scores of their forward."""
    for at, one in enumerate(losses_of(case)):
        readings = _readings(case, one)
        if not readings:
            continue
        forward, call = one.forward, None if one.rollout is None else one.rollout.generated
        known = None if forward is None else replay_forward(case, forward)
        if forward is None or known is None:
            continue
        gap = forward_gap(case, forward)
        if gap is None:
            continue
        # scores that are themselves off are reported for the logits; readings are then less exact
        allowed = tolerance(forward.modes, known.policy).mean + 3 * gap.mean
        note_judged(case, "loss")
        best = min(readings, key=lambda r: r.mean)
        sampled = 1.0 if call is None else temperature_of(call)
        # low precision is reported for the logits: its error is not a different reading
        if best.mean > max(allowed, 0.05):
            yield Evidence(
                "loss",
                "logprobs-differ",
                f"loss {at}: its logprobs differ by {best.mean:.3g} on average from the scores of "
                "its own forward, at any temperature",
                values={"mean": best.mean, "worst": best.worst},
            )
        elif best.place == "at":
            right = min((r for r in readings if r.place == "before"), key=lambda r: r.mean)
            yield Evidence(
                "loss",
                "shifted",
                f"loss {at}: each token's logprob is taken from the scores at its own position, "
                f"which predict the next token (off by {best.mean:.2g}); from the scores before it "
                f"they are off by {right.mean:.3g}",
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
                f"{best.temperature:g}: the loss's logprobs differ by {own:.3g} from those of the "
                "sampled distribution, so the ratio is not 1 on the policy's own samples",
                values={"sampled": sampled, "scored": best.temperature, "mean": own},
            )


def _readings(case: Case, one: LossRecord) -> list[_Reading]:
    if not first_step(case) or one.forward is None or one.loss.logprobs is None:
        return []
    known = replay_forward(case, one.forward)
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
    known: Replayed, given: Tensor, kept: Tensor, temperature: float, held: Sequence[int],
    place: Place,
) -> tuple[float, float]:  # fmt: skip
    made = known.logprobs(temperature, held, place)[:, -given.shape[1] :]
    # a suppressed token that was sampled anyway has no logprob in this reading
    return diff(given, made, kept & torch.isfinite(made))


def _temperatures(settings: Mapping[str, Any]) -> list[float]:
    value = settings.get("temperature")
    return [float(value)] if isinstance(value, int | float) and value > 0 else []


LOOKS: tuple[Look, ...] = (look_at_logprobs,)
