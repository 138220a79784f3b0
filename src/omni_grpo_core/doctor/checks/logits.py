"""Scores: the recorded model's, compared with the reference's on the very same input.

The reference gets the *recorded* embeddings, positions and mask, so earlier faults affect both
sides alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_grpo_core.doctor import rescored
from omni_grpo_core.doctor.checks.completion import generated_rollouts
from omni_grpo_core.doctor.checks.positions import look_rope
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Origin, note_judged, note_missing
from omni_grpo_core.doctor.policy_term import policy_term
from omni_grpo_core.doctor.reproduce import Reproduction, plain, told
from omni_grpo_core.doctor.rollouts import (
    cached_twice,
    completion_ids,
    first_step,
    ids_of,
    joined,
    losses_of,
    same_media,
    temperature_of,
    until_end,
)
from omni_grpo_core.doctor.scored import scored_as_sampled
from omni_grpo_core.doctor.teacher_forced import (
    Replayed,
    diff,
    replay_forward,
    replay_rollout,
    tolerance,
)
from omni_grpo_core.tolerances import Limit
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall

_STRANGE = 1.0
"""Nats a token between a policy that has not moved and its reference: a KL term of 1.7 each."""


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
        return f"{self.mean:.3g} on average, {self.worst:.3g} at worst"


def forward_gap(case: Case, call: ForwardCall) -> Gap | None:
    """A scoring forward compared with the reference; ``None`` where it cannot be replayed."""
    known = replay_forward(case, call)
    if known is None or call.logprobs is None or call.logprobs.shape != known.ids.shape:
        return None
    mask = known.mask & ~call.logprobs.isnan()
    return Gap(*diff(call.logprobs, known.logprobs(), mask), tolerance(call.modes, known.policy))


def rollout_gap(case: Case, call: GenerateCall) -> tuple[Gap, Gap] | None:
    """A rollout's own logprobs compared with the reference: of first tokens, and of all others."""
    known = replay_rollout(case, call)
    if known is None or call.logprobs is None or call.logprobs.shape != known.ids.shape:
        return None
    allowed = tolerance(call.modes, known.policy)
    expected = known.logprobs(temperature_of(call))
    first = torch.zeros_like(known.mask)
    first[:, 0] = True
    at_first = diff(call.logprobs, expected, known.mask & first)
    if call.first_logits is not None and len(call.first_logits) == len(known.ids):
        # the whole vocabulary shows more than the one sampled token
        scores = torch.stack([known.scores(row)[0] for row in range(len(known.ids))])
        at_first = diff(
            call.first_logits.log_softmax(-1),
            scores.log_softmax(-1),
            torch.ones_like(scores, dtype=torch.bool),
        )
    return (
        Gap(*at_first, allowed),
        Gap(*diff(call.logprobs, expected, known.mask & ~first), allowed),
    )


def scoring_agrees(case: Case) -> bool | None:
    """Whether the trainer's scoring forwards agree with the reference: then its weights and kernels
    do too. ``None`` without such a forward."""
    return case.once(_scoring_agrees)


def _scoring_agrees(case: Case) -> bool | None:
    gaps = [forward_gap(case, f) for f in _of_policy(case) if f.error is None]
    agrees = [not gap.wide for gap in gaps if gap is not None]
    return all(agrees) if agrees else None


def _of_policy(case: Case) -> tuple[ForwardCall, ...]:
    """The forwards of the recorded model; all, where it has none."""
    own = tuple(call for call in case.forwards if call.own)
    return own or case.forwards


def look_at_references(case: Case) -> Iterable[Evidence]:
    """Another model that scores without a gradient: a policy is compared with what it began as."""
    if not first_step(case):
        return
    for at, call in enumerate(case.forwards):
        gap = None if call in _of_policy(case) else forward_gap(case, call)
        if gap is None or call.modes.grad_enabled:
            continue
        note_judged(case, "loss")
        if gap.wide:
            yield Evidence(
                "loss",
                "reference-differs",
                f"another model scored the completions without a gradient (forward {at}), and its "
                f"weights are not the checkpoint's: logprobs are {gap} off. A KL pulls towards it",
                values={"mean": gap.mean, "worst": gap.worst},
                severity="breaks" if gap.mean > _STRANGE else "differs",
            )
            return


def look_at_forwards(case: Case) -> Iterable[Evidence]:
    """Scoring forwards on the loaded weights; later steps have changed them."""
    if not first_step(case):
        return
    own = _of_policy(case)
    for at, call in enumerate(case.forwards):
        gap = forward_gap(case, call) if call in own else None
        if gap is None:
            continue
        note_judged(case, "logits")
        if not gap.wide:
            continue
        found = rescored.scoring(case, call)
        what = f"scoring forward {at}: its logprobs"
        said = (
            told(f"{what} are the reference's", found)
            if found
            else f"{what} differ from the reference's on the same embeddings and positions by "
            f"{gap} (rounding explains {gap.allowed.mean:g} and {gap.allowed.worst:g})"
        )
        drop = call.modes.dropout
        acts = f"; dropout of {drop:g} acted in it" if drop else ""
        yield Evidence(
            "logits",
            "scoring-differs",
            said + _alone(case, call) + acts,
            origin=_origin(case),
            values={
                "mean": gap.mean, "worst": gap.worst, "rows": len(call.inputs["input_ids"]),
                "dropout": drop, "right_without": drop and _right_without_dropout(case),
                **plain(found),
            },
        )  # fmt: skip


def _right_without_dropout(case: Case) -> bool:
    """Whether a call in which no dropout acted has the reference's scores."""
    without = [forward_gap(case, call) for call in case.forwards if not call.modes.dropout]
    for call in case.generated:
        if not call.modes.dropout and (gaps := rollout_gap(case, call)):
            without.append(gaps[0])
    return any(gap is not None and not gap.wide for gap in without)


def _origin(case: Case) -> Origin:
    """A model that rotates other parts of its heads gives other scores for that reason alone."""
    return "inherited" if any(look_rope(case)) else "added"


def _alone(case: Case, call: ForwardCall) -> str:
    """Which rows differ: the padded ones, all but the first, or all."""
    known = replay_forward(case, call)
    if known is None or call.logprobs is None:
        return ""
    allowed = tolerance(call.modes, known.policy)
    expected = known.logprobs()
    off = [
        row
        for row in range(len(expected))
        if diff(call.logprobs[row], expected[row], known.mask[row])[0] > allowed.mean
    ]
    return f"; rows {', '.join(map(str, off))} of {len(expected)}" if off else ""


def look_at_rollouts(case: Case) -> Iterable[Evidence]:
    """A rollout's own logprobs, which show whether generate uses the model being trained."""
    for rollout_at, (_, call) in enumerate(generated_rollouts(case)):
        if not call.own:
            yield from _of_a_copy(case, call)
            continue
        gaps = rollout_gap(case, call)
        if gaps is None or _padded_right(call):
            continue  # after padding, decoding and a forward over all tokens count differently
        first, later = gaps
        note_judged(case, "logits", "completion")
        agrees = scoring_agrees(case)
        values = {
            "first_mean": first.mean, "first_worst": first.worst,
            "later_mean": later.mean, "later_worst": later.worst,
            "scoring_agrees": agrees, "turn": rollout_at, "alike": _as_scored(case, call),
        }  # fmt: skip
        if not first_step(case):
            yield from _moved(case, call, first, later, values)
        elif first.wide and agrees is not False:
            yield Evidence(
                "completion",
                "other-weights",
                f"generate's logprobs of its own samples are off by {first} already at the first "
                "token after the recorded prompt"
                + (", while the scoring forward is right" if agrees else "")
                + ": it does not use the weights being trained",
                values=values,
            )
        elif first.wide:
            yield Evidence(
                "logits",
                "prompt-scores-differ",
                f"scores after the prompt differ from the reference's on the same embeddings and "
                f"positions by {first}, in generate and in the scoring forward alike",
                origin=_origin(case),
                values={**values, **plain(_of_prompt(case, call))},
            )
        elif later.wide and (0 in call.cached or cached_twice(call)):
            yield Evidence(
                "completion",
                "tokens-out-of-context",
                f"from the second token on, generate's logprobs differ by {later} from what the "
                "same model gives with prompt and history",
                values={**values, **_impossible(case, call)},
            )
        elif later.wide:
            yield Evidence(
                "logits",
                "cache-differs",
                f"the first token's score is right, later ones differ by {later} from a forward "
                "over the whole sequence: decoding with the cache gives different scores",
                values=values,
            )


def _of_a_copy(case: Case, call: GenerateCall) -> Iterable[Evidence]:
    """A rollout by another instance of the model's class, whose weights should be its own."""
    if call.apart is None:
        note_missing(case, "a copy of the model generates, and its weights have other shapes: "
                     "whether they are the trained ones is unknown")  # fmt: skip
        return
    note_judged(case, "completion")
    if call.apart:
        yield Evidence(
            "completion",
            "other-weights",
            "generate ran on another instance of the model, of whose weights "
            f"{call.apart:.0%} are not those being trained: it did not get the last updates",
            values={"apart": call.apart, "moved": call.apart, "alike": True},
        )


def _of_prompt(case: Case, call: GenerateCall) -> tuple[Reproduction, ...]:
    known = replay_rollout(case, call)
    return () if known is None else rescored.first_scores(call, known)


def _as_scored(case: Case, call: GenerateCall) -> bool:
    """Whether a rollout was made in the modes in which it was scored, but for checkpointing."""
    return any(
        (f.modes.adapter, f.modes.autocast, f.modes.dtype)
        == (call.modes.adapter, call.modes.autocast, call.modes.dtype)
        for f in case.forwards
        if f.own
    )


def _padded_right(call: GenerateCall) -> bool:
    mask = call.inputs.get("attention_mask")
    return mask is not None and not bool(mask[:, -1].all())


def _moved(
    case: Case, call: GenerateCall, first: Gap, later: Gap, values: Mapping[str, object]
) -> Iterable[Evidence]:
    """After the first optimizer step the trainer's weights are no longer the reference's. A rollout
    that still gives exactly the old scores did not get the new weights."""
    # another precision changes scores as an update does
    precision = (call.modes.autocast, call.modes.dtype)
    gaps = [
        forward_gap(case, f)
        for f in case.forwards
        if f.modes.adapter != "off" and (f.modes.autocast, f.modes.dtype) == precision
    ]
    known = [gap.mean for gap in gaps if gap is not None] or _from_rollout(case)
    if not known:
        note_missing(
            case, "the weights have changed since the checkpoint: scores not compared with it"
        )
        return
    moved = min(known)
    if moved > first.allowed.mean and max(first.mean, later.mean) < 0.01 * moved:
        yield Evidence(
            "completion",
            "other-weights",
            f"generate still gives the scores of the loaded checkpoint (off by {later}), while the "
            f"trained model's have changed by {moved:.3g} per token: the rollout engine did not "
            "get the new weights",
            values={**values, "moved": moved},
        )


def _from_rollout(case: Case) -> list[float]:
    """How far the scores of a fused head are from those of each rollout, for the same input."""
    return [
        float((sampled[one.completion.at, : len(one.logprobs)] - one.logprobs).abs().mean())
        for one in scored_as_sampled(case)
        if len(one.logprobs) and same_media(one.completion.prompt, one.row)
        if (sampled := one.completion.call.logprobs) is not None
    ]


def _impossible(case: Case, call: GenerateCall) -> dict[str, float]:
    known = replay_rollout(case, call)
    return {} if known is None else {"per_token": float(_sampled(call, known)[known.mask].mean())}


def _sampled(call: GenerateCall, known: Replayed) -> Tensor:
    return known.logprobs(temperature_of(call))


def look_at_agreement(case: Case) -> Iterable[Evidence]:
    """Where nothing can be replayed, because embeddings were too large to keep or weights have
    changed: generate's own logprobs compared with the scoring forward's, if both are at temperature
    1. That they differ is certain; which of the two is wrong is not."""
    for _, call in generated_rollouts(case):
        if temperature_of(call) != 1.0 or _padded_right(call):
            continue
        if first_step(case) and rollout_gap(case, call) is not None:
            continue
        gap = _agreement(case, call)
        if gap is None:
            continue
        note_judged(case, "logits", "completion")
        if not gap.wide:
            continue
        yield Evidence(
            "completion",
            "scoring-disagrees",
            f"generate's and the scoring forward's logprobs of the sampled tokens differ by {gap}, "
            "with the same weights and the same preceding tokens",
            "unknown",
            values={
                "mean": gap.mean,
                "worst": gap.worst,
                "history": 0 not in call.cached and not cached_twice(call),
            },
        )


def _agreement(case: Case, call: GenerateCall) -> Gap | None:
    """The gap to the nearest scoring forward on the very same sequences."""
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
        gaps.append(Gap(*diff(call.logprobs, scored, mask), tolerance(forward.modes)))
    return min(gaps, key=lambda gap: gap.mean, default=None)


def look_at_adapter(case: Case) -> Iterable[Evidence]:
    """Completions are sampled and scored with the adapter, which is off for a reference alone."""
    trained = [f for f in case.forwards if f.own and f.modes.grad_enabled and f.modes.adapter]
    off = [forward for forward in trained if forward.modes.adapter == "off"]
    if trained:
        note_judged(case, "logits")
    if off and len(off) == len(trained):
        yield Evidence(
            "logits",
            "adapter-off",
            f"all {len(off)} scoring forwards with a gradient ran with the adapter off: the scores "
            "in the loss are not those of the policy being trained",
            values={"forwards": len(off)},
        )
        return
    scored = joined(case).scored
    sampled = [c for f in trained if f not in off for c in scored[f] if c is not None]
    without = [c for c in sampled if c.call.modes.adapter == "off"]
    if without and len(without) == len(sampled):
        yield Evidence(
            "completion",
            "sampled-without-adapter",
            f"all {len(without)} completions in the loss were sampled with the adapter off, and "
            "are scored with it on: the policy that learns never speaks",
            values={"completions": len(without)},
        )
    term = policy_term(case)
    if term is not None and term.ratio == "reference":
        yield Evidence(
            "logits",
            "old-without-adapter" if trained else "old-of-reference",
            "the weights in the loss vary along completions as ratios to the reference do: the old "
            "log-probabilities are those of "
            + ("the model without its adapter" if trained else "another model")
            + ", not of the policy that sampled",
            values={"rows": len(term.rows)},
        )


def look_at_precision(case: Case) -> Iterable[Evidence]:
    """Logprobs that all fit a 16-bit format, whatever they are stored in now; where none were
    handed over, the gradient that their log-softmax left at the logits."""
    noted = False
    for at, one in enumerate(losses_of(case)):
        logprobs, mask = one.loss.logprobs, one.loss.mask
        if logprobs is None:
            continue
        noted = True
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
                f"loss {at}: all {len(counted)} logprobs are 16-bit numbers: the log-softmax was "
                "computed in low precision, so the ratio of two of them is off by up to "
                f"{_error(counted):.2g} with equal weights",
                values={"tokens": len(counted), "dtype": str(logprobs.dtype)},
            )
    if not noted and first_step(case):
        yield from _coarse_gradient(case)


def _coarse_gradient(case: Case) -> Iterable[Evidence]:
    for seen in case.gradients:
        if seen.forward >= len(case.forwards):
            continue
        dtype = rescored.low_precision(case, seen, case.forwards[seen.forward])
        if dtype is not None:
            yield Evidence(
                "logits",
                "coarse-logprobs",
                f"the gradient at the logits of scoring forward {seen.forward} is that of a "
                f"log-softmax in {dtype}: logprobs were computed in low precision, so the ratio of "
                "two of them is noise with equal weights",
                values={"dtype": dtype},
            )
            return


def _error(logprobs: Tensor) -> float:
    """The largest rounding error of bfloat16 numbers of this size."""
    return float(logprobs.float().abs().max()) * 2**-8 if len(logprobs) else 0.0


LOOKS: tuple[Look, ...] = (
    look_at_forwards,
    look_at_references,
    look_at_rollouts,
    look_at_agreement,
    look_at_adapter,
    look_at_precision,
)
