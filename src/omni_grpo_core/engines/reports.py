"""What an engine may report in place of the logprobs of what it drew, each tried on the trainer's
own scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from omni_grpo_core.engines.sides import Sampled, Sides
from omni_grpo_core.types import Disagreement

EXPLAINED = 1e-3
"""A cause is one if with it no logprob is off by more than this share of what was seen. Logprobs of
tokens that are drawn hot lie 40 below 0 at temperature 1, where float32 resolves 4e-6."""
TEMPERATURES = (0.05, 20.0)
"""Between which the temperature of reported logprobs is looked for."""
PENALTIES = (0.5, 2.0)
"""Between which a repetition penalty is."""

ALLOWED = "the engine draws from the allowed ids"
OF_THE_TOKENS = "logprobs are those of the drawn tokens"
PENALTY = "no token is penalised"

Tried = tuple[float, Disagreement]
"""What an assumption leaves of the difference, nats at worst, and what it would mean."""


def reported(sides: Sides, sampled: Sampled, seen: str) -> Iterator[Tried]:
    """Every assumption; ``seen``: how far the logprobs are off, in words."""
    scores, drawn, told = sides.scores(sampled)
    allowed = scores.masked_fill(sides.policy.suppressed.cpu(), -torch.inf)
    yield from _otherwise_scored(
        sampled, seen, {"the allowed ids": allowed, "all ids": scores}, drawn, told
    )
    yield _penalised(sampled, seen, allowed, drawn, told)
    yield from _of_other_tokens(sampled, seen)


def _otherwise_scored(
    sampled: Sampled, seen: str, over: dict[str, Tensor], drawn: Tensor, told: Tensor
) -> Iterator[Tried]:
    """Logprobs at another temperature, or of all ids, or both: vLLM's ``raw_logprobs``, which it
    takes before the temperature and before it masks ids."""
    for ids, logits in over.items():
        at = _temperature(logits, drawn, told)
        name = "logprobs are at the sampling temperature"
        if math.isclose(at, sampled.temperature, rel_tol=EXPLAINED):
            name = ALLOWED
        detail = (
            f"{seen} at temperature {sampled.temperature:g}, and equal at {at:.4g} over {ids}: "
            "the engine reports others than it should draw from (vLLM: "
            "logprobs_mode='processed_logprobs')"
        )
        left = float((_logprobs(logits, drawn, at) - told).abs().max())
        yield left, Disagreement("completion", name, detail)


def _penalised(sampled: Sampled, seen: str, logits: Tensor, drawn: Tensor, told: Tensor) -> Tried:
    """A repetition penalty (arXiv 1909.05858, section 4.1): logits of ids that stand in prompt or
    completion before are divided by it where they are positive, else multiplied."""
    before = _standing_before(sampled, logits.shape[1])

    def found(penalty: float, some: slice = slice(None)) -> Tensor:
        one = logits[some]
        lowered = torch.where(one > 0, one / penalty, one * penalty)
        changed = torch.where(before[some], lowered, one)
        return _logprobs(changed, drawn[some], sampled.temperature) - told[some]

    some = slice(None, None, 1 + len(drawn) // 64)
    low, high = map(math.log, PENALTIES)
    at = math.exp(_best(lambda log: float(found(math.exp(log), some).square().sum()), low, high))
    detail = f"{seen}, and equal to those under a repetition penalty of {at:.4g}"
    return float(found(at).abs().max()), Disagreement("completion", PENALTY, detail)


def _standing_before(sampled: Sampled, vocabulary: int) -> Tensor:
    """(tokens, V), bool: the ids that stand in a token's prompt or completion before it."""
    size, rows = len(sampled.gap) // len(sampled.answers), []
    for number, (ids, mask) in enumerate(zip(sampled.tokens.ids, sampled.tokens.mask, strict=True)):
        before = torch.zeros(vocabulary, dtype=torch.bool)
        before[list(sampled.answers[number // size].prompt_ids)] = True
        for token in ids[mask].tolist():
            rows.append(before.clone())
            before[token] = True
    return torch.stack(rows)


def _of_other_tokens(sampled: Sampled, seen: str) -> Iterator[Tried]:
    """A multiple of each token's own logprob: another sign, another base, 0; or its neighbour's."""
    mask, told = sampled.tokens.mask, sampled.tokens.logprobs.double()
    own = torch.where(mask, told - sampled.gap, 0.0)
    told = torch.where(mask, told, 0.0)
    times = float((told * own).sum() / own.square().sum().clamp(min=1e-12))
    scaled = f"{seen}, and equal to {times:.4g} times the trainer's (0.4343: logarithms to base 10)"
    yield float((told - times * own).abs().max()), Disagreement("completion", OF_THE_TOKENS, scaled)
    both = mask[:, 1:] & mask[:, :-1]
    for way, off in (
        ("after", told[:, :-1] - own[:, 1:]),
        ("before", told[:, 1:] - own[:, :-1]),
    ):
        if both.any():
            moved = Disagreement(
                "completion", OF_THE_TOKENS, f"{seen}, and equal to those of the token {way} each"
            )
            yield float(off[both].abs().max()), moved


def _logprobs(logits: Tensor, drawn: Tensor, temperature: float) -> Tensor:
    """Float64, (tokens,)."""
    scaled = logits.double() / temperature
    return scaled.gather(1, drawn)[:, 0] - scaled.logsumexp(-1)


def _temperature(logits: Tensor, drawn: Tensor, told: Tensor) -> float:
    """The one at which the tokens' logprobs are nearest to what was ``told``.

    >>> logits, drawn = torch.tensor([[0.0, 1.0], [0.0, 3.0]]), torch.tensor([[0], [1]])
    >>> round(_temperature(logits, drawn, _logprobs(logits, drawn, 0.7)), 6)
    0.7
    """
    some = slice(None, None, 1 + len(drawn) // 64)

    def off(at: float) -> float:
        found = _logprobs(logits[some], drawn[some], math.exp(at))
        return float((found - told[some]).square().sum())

    return math.exp(_best(off, *map(math.log, TEMPERATURES)))


def _best(off: Callable[[float], float], low: float, high: float) -> float:
    """Where ``off`` is least; the range shrinks to a sixteenth eight times: 1e-9 of it."""
    for _ in range(8):
        step = (high - low) / 32
        best = min((low + step * i for i in range(33)), key=off)
        low, high = best - step, best + step
    return (low + high) / 2
