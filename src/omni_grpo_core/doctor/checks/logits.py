"""Scores: what the recorded model made of an input, against the reference on the very same input.

The reference gets the embeddings, positions and mask that were *recorded*, so whatever was wrong
before stays wrong on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_grpo_core.doctor.checks.completion import generated_rollouts
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, say_missing
from omni_grpo_core.doctor.rollouts import completion_ids, first_step, ids_of, learned, until_end
from omni_grpo_core.doctor.teacher_forced import (
    Taught,
    apart,
    rescored,
    taught,
    tolerance,
)
from omni_grpo_core.tolerances import Limit
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall


@dataclass(frozen=True, slots=True)
class Gap:
    """How far recorded logprobs are from the reference's: ``mean`` and ``worst`` over tokens."""

    mean: float
    worst: float
    allowed: Limit

    @property
    def wide(self) -> bool:
        return self.mean > self.allowed.mean or self.worst > self.allowed.worst

    def __str__(self) -> str:
        return f"{self.mean:.3g} in the mean, {self.worst:.3g} at worst"


def forward_gap(case: Case, call: ForwardCall) -> Gap | None:
    """A scoring forward against the reference; ``None`` where it cannot be replayed."""
    known = rescored(case, call)
    if known is None or call.logprobs is None or call.logprobs.shape != known.ids.shape:
        return None
    mask = known.mask & ~call.logprobs.isnan()
    return Gap(*apart(call.logprobs, known.logprobs(), mask), tolerance(call.modes, known.policy))


def rollout_gap(case: Case, call: GenerateCall) -> tuple[Gap, Gap] | None:
    """A rollout's own logprobs against the reference: of its first tokens, and of all others."""
    known = taught(case, call)
    if known is None or call.logprobs is None or call.logprobs.shape != known.ids.shape:
        return None
    allowed = tolerance(call.modes, known.policy)
    expected = known.logprobs(temperature_of(call))
    first = torch.zeros_like(known.mask)
    first[:, 0] = True
    at_first = apart(call.logprobs, expected, known.mask & first)
    if call.first_logits is not None and len(call.first_logits) == len(known.ids):
        # all of the vocabulary tells more than the one token that was sampled
        scores = torch.stack([known.scores(row)[0] for row in range(len(known.ids))])
        at_first = apart(
            call.first_logits.log_softmax(-1),
            scores.log_softmax(-1),
            torch.ones_like(scores, dtype=torch.bool),
        )
    return (
        Gap(*at_first, allowed),
        Gap(*apart(call.logprobs, expected, known.mask & ~first), allowed),
    )


def temperature_of(call: GenerateCall) -> float:
    """What the scores were divided by; greedy decoding divides by nothing."""
    sampling = bool(call.config.get("do_sample", False))
    return float(call.config.get("temperature") or 1.0) if sampling else 1.0


def scoring_agrees(case: Case) -> bool | None:
    """Whether the trainer's scoring forwards are the reference's: then its weights and kernels are,
    too. ``None`` where there are none to ask."""
    return case.once(_scoring_agrees)


def _scoring_agrees(case: Case) -> bool | None:
    gaps = [forward_gap(case, f) for f in case.forwards if f.error is None]
    told = [not gap.wide for gap in gaps if gap is not None]
    return all(told) if told else None


def look_at_forwards(case: Case) -> Iterable[Evidence]:
    """Scoring forwards on the weights that were loaded. Later, training has moved them."""
    if not first_step(case):
        return
    for at, call in enumerate(case.forwards):
        gap = forward_gap(case, call)
        if gap is None or not gap.wide:
            continue
        alone = _alone(case, call)
        yield Evidence(
            "logits",
            "scoring-differs",
            f"scoring forward {at}: logprobs of its own tokens are off by {gap} from the "
            f"reference on the same embeddings and positions (rounding allows "
            f"{gap.allowed.mean:g} and {gap.allowed.worst:g}){alone}",
            values={"mean": gap.mean, "worst": gap.worst, "rows": len(call.inputs["input_ids"])},
        )


def _alone(case: Case, call: ForwardCall) -> str:
    """Which rows are off: those that are padded, all but the first, or all."""
    known = rescored(case, call)
    if known is None or call.logprobs is None:
        return ""
    allowed = tolerance(call.modes, known.policy)
    expected = known.logprobs()
    off = [
        row
        for row in range(len(expected))
        if apart(call.logprobs[row], expected[row], known.mask[row])[0] > allowed.mean
    ]
    return f"; rows {', '.join(map(str, off))} of {len(expected)}" if off else ""


def look_at_rollouts(case: Case) -> Iterable[Evidence]:
    """A rollout's own logprobs, which tell whether generate is the model that is trained."""
    for rollout_at, (_, call) in enumerate(generated_rollouts(case)):
        gaps = rollout_gap(case, call)
        if gaps is None or _padded_right(call):
            continue  # behind padding, decoding and a forward over all tokens count differently
        first, later = gaps
        agrees = scoring_agrees(case)
        values = {
            "first_mean": first.mean, "first_worst": first.worst,
            "later_mean": later.mean, "later_worst": later.worst,
            "scoring_agrees": agrees, "turn": rollout_at,
        }  # fmt: skip
        if not first_step(case):
            yield from _moved(case, first, later, values)
        elif first.wide and agrees is not False:
            yield Evidence(
                "completion",
                "other-weights",
                f"generate's logprobs of what it sampled are off by {first} at the first token "
                "already, on the recorded prompt"
                + (", while the scoring forward is right" if agrees else "")
                + ": it runs on other weights than those that are trained",
                values=values,
            )
        elif first.wide:
            yield Evidence(
                "logits",
                "prompt-scores-differ",
                f"scores after the prompt are off by {first} from the reference on the same "
                "embeddings and positions, in generate and in the scoring forward alike",
                values=values,
            )
        elif later.wide and 0 in call.cached:
            yield Evidence(
                "completion",
                "tokens-out-of-context",
                f"from the second token on, generate's logprobs are off by {later} from what the "
                "same model gives with the prompt and the history before it",
                values={**values, **_impossible(case, call)},
            )
        elif later.wide:
            yield Evidence(
                "logits",
                "cache-differs",
                f"the first token's score is right, later ones are off by {later} from a forward "
                "over the whole sequence: decoding with the cache is not the same model",
                values=values,
            )


def _padded_right(call: GenerateCall) -> bool:
    mask = call.inputs.get("attention_mask")
    return mask is not None and not bool(mask[:, -1].all())


def _moved(case: Case, first: Gap, later: Gap, values: Mapping[str, object]) -> Iterable[Evidence]:
    """After the first optimizer step the trainer's weights are no longer the reference's. A rollout
    that still gives the old scores exactly has not been told of the step."""
    gaps = [forward_gap(case, f) for f in case.forwards if f.modes.adapter != "off"]
    told = [gap for gap in gaps if gap is not None]
    if not told:
        say_missing(
            case, "the weights have moved since the checkpoint: scores are not held against it"
        )
        return
    moved = min(gap.mean for gap in told)
    if moved > told[0].allowed.mean and max(first.mean, later.mean) < 0.01 * moved:
        yield Evidence(
            "completion",
            "other-weights",
            f"generate still gives the scores of the checkpoint as it was loaded (off by {later}), "
            f"while the model that is trained has moved by {moved:.3g} a token: the rollout engine "
            "was not given the new weights",
            values={**values, "moved": moved},
        )


def _impossible(case: Case, call: GenerateCall) -> dict[str, float]:
    known = taught(case, call)
    return {} if known is None else {"per_token": float(_sampled(call, known)[known.mask].mean())}


def _sampled(call: GenerateCall, known: Taught) -> Tensor:
    return known.logprobs(temperature_of(call))


def look_at_agreement(case: Case) -> Iterable[Evidence]:
    """Where nothing can be replayed, because embeddings were too large to keep or weights have
    moved: generate's own logprobs against those of the scoring forward, if both are at temperature
    1. That they differ is certain; which of the two is wrong is not."""
    for _, call in generated_rollouts(case):
        if temperature_of(call) != 1.0 or _padded_right(call):
            continue
        if first_step(case) and rollout_gap(case, call) is not None:
            continue
        gap = _agreement(case, call)
        if gap is None or not gap.wide:
            continue
        yield Evidence(
            "completion",
            "scoring-disagrees",
            f"generate and the scoring forward give the sampled tokens logprobs that differ by "
            f"{gap}, with the same weights and the same tokens before them",
            "unknown",
            values={"mean": gap.mean, "worst": gap.worst, "blind": 0 in call.cached},
        )


def _agreement(case: Case, call: GenerateCall) -> Gap | None:
    """The nearest scoring forward on the very same sequences."""
    ids = completion_ids(call)
    if call.sequences is None or call.logprobs is None or ids is None:
        return None
    kept = until_end(ids, ids_of(call.config.get("eos_token_id")))
    gaps = []
    for forward in case.forwards:
        scored = forward.logprobs
        given = forward.inputs.get("input_ids")
        same = given is not None and torch.equal(given.long(), call.sequences.long())
        if scored is None or not same or forward.modes.adapter == "off":
            continue
        scored = scored[:, -ids.shape[1] :]
        mask = kept & ~scored.isnan()
        gaps.append(Gap(*apart(call.logprobs, scored, mask), tolerance(forward.modes)))
    return min(gaps, key=lambda gap: gap.mean, default=None)


def look_at_precision(case: Case) -> Iterable[Evidence]:
    """Logprobs that only 8 bits of mantissa can hold, whatever they are stored in now."""
    for at, one in enumerate(learned(case)):
        logprobs, mask = one.loss.logprobs, one.loss.mask
        if logprobs is None:
            continue
        counted = logprobs if mask is None else logprobs[mask.bool()]
        counted = counted[counted != 0]
        coarse = logprobs.dtype in (torch.bfloat16, torch.float16)
        for dtype in (torch.bfloat16, torch.float16):
            exact = counted.float().to(dtype).float() == counted.float()
            coarse |= len(counted) >= 8 and bool(exact.all())
        if coarse:
            yield Evidence(
                "logits",
                "coarse-logprobs",
                f"loss {at}: all {len(counted)} logprobs are numbers of 16 bits: the log-softmax "
                "was taken in low precision, so the ratio of two of them is off by up to "
                f"{_error(counted):.2g} with nothing changed",
                values={"tokens": len(counted), "dtype": str(logprobs.dtype)},
            )


def _error(logprobs: Tensor) -> float:
    """The largest rounding error of a bfloat16 number of these sizes."""
    return float(logprobs.float().abs().max()) * 2**-8 if len(logprobs) else 0.0


LOOKS: tuple[Look, ...] = (
    look_at_forwards,
    look_at_rollouts,
    look_at_agreement,
    look_at_precision,
)
