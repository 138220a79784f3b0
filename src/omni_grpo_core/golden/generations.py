"""Are the completions still the same, and is the model as certain of them?

Two greedy completions may diverge at a near tie through rounding alone. So at the first differing
token each side's token must be among the other side's top tokens and the margin between them small;
from there on their contexts differ and they cannot be compared, so the rest is judged on the
golden's own tokens, scored teacher-forced (``scoring``). A sampled token can flip through rounding
alone where its draw lies at the edge of its slice of the distribution.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.golden.rebuild import Lost, rebuild
from omni_grpo_core.golden.results import Generation, Tokens, Verdict
from omni_grpo_core.pipeline.stages import Scored
from omni_grpo_core.rewards.degenerate import degenerate
from omni_grpo_core.tolerances import MARGIN_LOST, NEAR_TIE, Tolerance, distance
from omni_grpo_core.trace.divergence import Difference
from omni_grpo_core.trace.integers import Decode
from omni_grpo_core.trace.leaves import Leaf
from omni_grpo_core.types import Completion


@dataclass(frozen=True, slots=True)
class Margins:
    """How certain the model is of the golden's completion.

    ``drift``: largest |Δ logprob| of its tokens. ``at``: the token that lost most of its margin,
    ``was`` and ``now``: its margin over the likeliest other token, in nats. ``held``: every token
    is still the likeliest, and none lost more than a tenth of its margin.
    """

    drift: float
    at: int
    was: float
    now: float
    held: bool


def scored_of(leaves: Mapping[str, Leaf]) -> tuple[Scored, ...]:
    """The values of a golden of ``scoring``.

    Raises :class:`~omni_grpo_core.golden.rebuild.Lost` where its numbers are inconsistent.
    """
    found = rebuild(leaves)
    if not isinstance(found, tuple) or not all(map(_is_scored, found)):
        raise Lost("self")
    return tuple(Scored(**parts) for parts in found)


def _is_scored(parts: Any) -> bool:
    if not isinstance(parts, dict) or parts.keys() != {field.name for field in fields(Scored)}:
        return False
    ids, tops, own = parts["top_ids"], parts["top_logprobs"], parts["logprobs"]
    return (
        isinstance(ids, Tensor)
        and ids.ndim == 2
        and not ids.is_floating_point()
        and all(isinstance(side, tuple) for side in (tops, own))
        and all(isinstance(number, float) for number in (*tops, *own))
        and (len(tops), len(own)) == (ids.numel(), len(ids))
    )


def decoder(policy: Policy) -> Decode:
    """The policy's decoder, which skips ids outside any vocabulary: a golden may hold some."""
    return lambda ids: policy.decode([token for token in ids if 0 <= token < 1 << 32])


def margins(was: Scored, now: Scored, ids: Sequence[int]) -> Margins:
    """``ids``: the golden's tokens (C); both sides scored them."""
    before, after = _tops(was), _tops(now)
    drift = max(
        (distance(a, b) for a, b in zip(was.logprobs, now.logprobs, strict=True)), default=0.0
    )
    steps = []
    for at, token in enumerate(ids):
        old = _lead(token, was.logprobs[at], before[at])
        new = _lead(token, now.logprobs[at], after[at])
        lost = (old - new) / (MARGIN_LOST * (1 + abs(old)))
        steps.append((math.inf if math.isnan(lost) else lost, at, old, new))
    lost, at, old, new = max(steps, default=(0.0, 0, 0.0, 0.0))
    flipped = any(new <= 0 < old for _, _, old, new in steps)
    return Margins(drift, at, old, new, held=lost <= 1 and not flipped)


def _tops(scored: Scored) -> list[dict[int, float]]:
    """Token -> logprob, at each step."""
    width = scored.top_ids.shape[1] if scored.top_ids.ndim == 2 else 0
    return [
        dict(zip(ids, scored.top_logprobs[at * width : (at + 1) * width], strict=True))
        for at, ids in enumerate(scored.top_ids.tolist())
    ]


def _lead(token: int, logprob: float, top: Mapping[int, float]) -> float:
    """Margin of ``token`` over the likeliest other one."""
    return logprob - max((value for other, value in top.items() if other != token), default=-99.0)


def scoring_differences(
    was: Sequence[Scored],
    now: Sequence[Scored],
    completions: Sequence[Completion],
    tolerance: Tolerance,
) -> list[Difference]:
    """At most one difference per completion: the token whose logprob moved most."""
    found = []
    for index, (old, new, completion) in enumerate(zip(was, now, completions, strict=True)):
        if len(old.logprobs) != len(new.logprobs):
            lengths = f"{len(new.logprobs)} tokens scored, was {len(old.logprobs)}"
            sentence = f"completion {index}: {lengths}"
            found.append(Difference(f"[{index}]", "differs", sentence, index))
            continue
        before, after = _tops(old), _tops(new)
        pairs = [
            (at, a, b)
            for at in range(len(old.logprobs))
            for a, b in [
                (old.logprobs[at], new.logprobs[at]),
                *((before[at][t], after[at][t]) for t in before[at] if t in after[at]),
            ]
        ]
        apart = [distance(a, b) for _, a, b in pairs]
        if not any(apart):
            continue
        most, mean = max(apart), sum(apart) / len(apart)
        at, a, b = pairs[apart.index(most)]
        margin = margins(old, new, completion.token_ids)
        near = all(tolerance.allows(x, y) for _, x, y in pairs)
        sentence = (
            f"completion {index}: a logprob at token {at} is {b:.6g}, was {a:.6g}, max |Δ| "
            f"{most:.3g}, mean |Δ| {mean:.3g}; margins {'held' if margin.held else 'did not hold'}"
            f" (token {margin.at}: {margin.was:.3g} → {margin.now:.3g} nats)"
        )
        found.append(
            Difference(
                f"[{index}]", "within" if near else "differs", sentence, index, (at,), most, mean
            )
        )
    return found


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """
    >>> first_difference([1, 2, 3], [1, 2]), first_difference([1], [1])
    (2, None)
    """
    if tuple(a) == tuple(b):
        return None
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


@dataclass(frozen=True, slots=True, eq=False)
class Sides:
    """One completion on both sides, with each side's scores of the *golden's* tokens where they
    are stored (greedy completions). ``draw_distance`` (sampled ones): the greatest distance, in
    probability, of the first differing token's draw from either token's slice now."""

    was: Completion
    now: Completion
    was_scored: Scored | None = None
    now_scored: Scored | None = None
    draw_distance: float | None = None


def classify_generation(
    policy: Policy, sides: Sides, tolerance: Tolerance, drifted: bool
) -> Generation:
    """``drifted``: whether logits moved beyond tolerance, so that a draw may lie farther from its
    slice."""
    was, now = sides.was, sides.now
    at = first_difference(was.token_ids, now.token_ids)
    margin = None
    if sides.was_scored is not None and sides.now_scored is not None:
        margin = margins(sides.was_scored, sides.now_scored, was.token_ids)
    # a sampled completion may be truncated where another was not
    golden = None if sides.was_scored is None else was
    garbage = garbage_of(policy, now, golden) if now.token_ids != was.token_ids else ()
    base: dict[str, Any] = {
        "sample_id": was.group_id,
        "index": was.index,
        "was": tokens_of(policy, was.token_ids),
        "now": tokens_of(policy, now.token_ids),
        "was_finish": was.finish_reason,
        "now_finish": now.finish_reason,
        "first": at,
        "drift": None if margin is None else margin.drift,
        "garbage": "; ".join(garbage),
    }
    if garbage:
        return Generation(verdict="degenerate", sentence=base["garbage"], **base)
    if at is None:
        verdict, sentence = _same_tokens(was, now, margin, tolerance)
        return Generation(verdict=verdict, sentence=sentence, **base)
    words = _words(policy, was, now, at)
    if sides.was_scored is not None and sides.now_scored is not None and margin is not None:
        before, after = _tops(sides.was_scored), _tops(sides.now_scored)
        return _greedy_difference(words, at, (before, after), margin, base)
    verdict, why = _sampled_difference(sides, at, None if drifted else tolerance)
    return Generation(verdict=verdict, sentence=f"sampled: {words}{why}", **base)


def _same_tokens(
    was: Completion, now: Completion, margin: Margins | None, tolerance: Tolerance
) -> tuple[Verdict, str]:
    pairs = list(zip(was.logprobs, now.logprobs, strict=True))
    if was.finish_reason != now.finish_reason:
        return "harmful", f"finish reason is {now.finish_reason}, was {was.finish_reason}"
    if any(not math.isfinite(b) for _, b in pairs):
        return "degenerate", "a logprob is non-finite"
    if margin is not None and not margin.held:
        return "harmful", (
            f"same tokens but less certain: margin of token {margin.at} "
            f"{margin.was:.3g} → {margin.now:.3g} nats"
        )
    most = max((distance(a, b) for a, b in pairs), default=0.0)
    if not most:
        return "exact", "same tokens, same logprobs"
    if all(tolerance.allows(a, b) for a, b in pairs):
        return "within", f"same tokens, logprobs within {most:.3g}"
    if margin is None and most > NEAR_TIE:
        return "harmful", f"same tokens, but a logprob moved by {most:.3g}"
    return "benign-drift", f"same tokens, logprobs moved by up to {most:.3g}"


def _sampled_difference(sides: Sides, at: int, tolerance: Tolerance | None) -> tuple[Verdict, str]:
    """``tolerance``: ``None`` where logits moved beyond it. An edge of a slice is a sum of
    probabilities, so it moves by no more than the largest |Δ logprob| of the likely tokens."""
    drawn = sides.draw_distance
    limit = NEAR_TIE if tolerance is None else tolerance.atol + tolerance.rtol
    pairs = zip(sides.was.logprobs[:at], sides.now.logprobs[:at], strict=True)
    most = max((distance(a, b) for a, b in pairs), default=0.0)
    if drawn is None or drawn > limit or most > NEAR_TIE:
        far = "" if drawn is None else f"; the draw lies {drawn:.3g} outside its slice"
        return "harmful", far
    near = f"; the draw lies at the edge of its slice ({drawn:.3g} outside)"
    return "benign-drift" if tolerance is None else "within", near


def _greedy_difference(
    words: str,
    at: int,
    tops: tuple[Sequence[Mapping[int, float]], Sequence[Mapping[int, float]]],
    margin: Margins,
    base: Mapping[str, Any],
) -> Generation:
    """``tops``: token -> logprob at each of the golden's tokens, on both sides."""
    was, now = base["was"].ids, base["now"].ids
    if at >= min(len(was), len(now)):
        return Generation(verdict="harmful", sentence=f"{words}: a different length", **base)
    old, new = was[at], now[at]
    before, after = (side[at] for side in tops)
    ranks: dict[str, Any] = {
        "was_rank": list(after).index(old) if old in after else None,
        "now_rank": list(before).index(new) if new in before else None,
        "margin": before[old] - before[new] if old in before and new in before else None,
    }
    lead = after[new] - after[old] if old in after and new in after else math.inf
    gap = ranks["margin"]
    near = gap is not None and gap <= NEAR_TIE and lead <= NEAR_TIE
    # the text after the differing token is not comparable; the golden's must still be as likely
    if near and margin.drift <= NEAR_TIE:
        sentence = f"{words}: a near tie ({gap:.3g} nats)"
        return Generation(verdict="benign-drift", sentence=sentence, **ranks, **base)
    why = "not among the other side's top tokens" if gap is None else f"{gap:.3g} nats apart"
    return Generation(verdict="harmful", sentence=f"{words}: {why}", **ranks, **base)


def garbage_of(policy: Policy, now: Completion, was: Completion | None) -> tuple[str, ...]:
    """Why a completion is degenerate, from its raw ids; empty if it is not."""
    tokenizer = policy.processor.tokenizer
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    found = degenerate(
        now.token_ids,
        now.text,
        finish_reason=now.finish_reason,
        eos_ids=policy.eos_token_ids,
        golden_ended=None if was is None else was.finish_reason == "stop",
        nonfinite=not all(map(math.isfinite, now.logprobs)),
        special_ids=special,
    )
    return found


def tokens_of(policy: Policy, ids: Sequence[int], spans: Any = ()) -> Tokens:
    """Ids with the text of each."""
    decode = decoder(policy)
    known = {token: decode([token]) for token in set(ids)}
    return Tokens(tuple(ids), tuple(known[token] for token in ids), tuple(spans))


def _words(policy: Policy, was: Completion, now: Completion, at: int) -> str:
    def word(ids: Sequence[int]) -> str:
        if at >= len(ids):
            return "absent (it ended)"
        return f"{ids[at]} {json.dumps(decoder(policy)([ids[at]]), ensure_ascii=False)}"

    return f"token {at} is {word(now.token_ids)}, was {word(was.token_ids)}"
