"""Whether an engine draws from the distribution that it reports: logprobs may agree to the last
digit and say nothing of a top-k behind them.

Everything here is a matter of chance, and counts where that is below :data:`UNLIKELY`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from omni_grpo_core.engines.requests import Answer
from omni_grpo_core.engines.sides import Sampled, Sides
from omni_grpo_core.pipeline.inputs import Inputs
from omni_grpo_core.types import Disagreement, RowSeen

LARGEST_K = 100
"""The largest top-k that is looked for."""
UNLIKELY = 1e-6
"""Chance of such a sample from the whole distribution at which it counts as another one's."""
DEVIATIONS = 5.5
"""The same for sums over some hundred tokens, in standard deviations: 4.9 if they were normal,
which those with a few very surprising tokens are not quite."""
SURE = math.log(1000)
"""Log of how much likelier one explanation has to make the tokens than another."""
MASS = 1e-4
"""Relative error of a probability that is read from two float32 logprobs."""

WHOLE = "the engine samples from the whole distribution"
ENDED = "completions end where and as they say"
AS_REPORTED = "tokens are drawn as their logprobs say"
APART = "a group's completions are drawn apart"


def malformed(
    sides: Sides, inputs: Inputs, answers: Sequence[Answer], most: int
) -> list[Disagreement]:
    """Whether each completion is whole: a logprob for every token, each of the vocabulary, an eos
    at its end and nowhere else if it says so, and the cap hit if not. ``most``: that cap."""
    eos, many = set(sides.policy.eos_token_ids), len(sides.policy.suppressed)
    found: dict[int, RowSeen] = {}
    for row, answer in enumerate(answers):
        for at, drawn in enumerate(answer.drawn):
            ids = drawn.token_ids
            ended = bool(ids) and ids[-1] in eos
            said = ""
            if len(drawn.logprobs) != len(ids):
                said = f"{len(drawn.logprobs)} logprobs for {len(ids)} tokens"
            elif beyond := [token for token in ids if not 0 <= token < many]:
                said = f"token id {beyond[0]} of a vocabulary of {many}"
            elif eos & set(ids[:-1]):
                said = "an eos before its end"
            elif ended != (drawn.finish_reason == "stop"):
                last = "an eos" if ended else "no eos"
                said = f"finish reason {drawn.finish_reason!r} and {last} at its end"
            elif len(ids) > most or (not ended and len(ids) < most):
                said = f"{len(ids)} tokens without an eos where {most} were asked for"
            if said and row not in found:
                name = inputs.samples[row].sample_id
                sentence = f"{name}: completion {at} has {said}"
                found[row] = RowSeen(row, sentence, {"sample": name, "completion": at, "ids": ids})
    rows = tuple(found.values())
    return [Disagreement("completion", ENDED, rows[0].sentence, rows=rows)] if rows else []


def repeated(sides: Sides, sampled: Sampled) -> Disagreement | None:
    """Whether a prompt's completions are copies of each other."""
    told = torch.where(sampled.tokens.mask, sampled.tokens.logprobs, 0.0).double()
    # to the trainer or to the engine, whichever finds them likelier: its weights may be others
    likelier = torch.maximum(told.sum(1), (told - sampled.gap).sum(1))
    chances = likelier.view(len(sampled.answers), -1).tolist()
    found = []
    for row, (answer, logprobs) in enumerate(zip(sampled.answers, chances, strict=True)):
        pairs = list(combinations(range(len(answer.drawn)), 2))
        alike = [
            pair
            for pair in pairs
            if answer.drawn[pair[0]].token_ids == answer.drawn[pair[1]].token_ids
            and logprobs[pair[0]] < math.log(UNLIKELY / len(pairs))
        ]
        if alike:
            name = sampled.inputs.samples[row].sample_id
            one, other = alike[0]
            chance = math.exp(logprobs[one])
            found.append(
                RowSeen(
                    row,
                    f"{name}: completions {one} and {other} are the same, of which the chance is "
                    f"{chance:.2g}",
                    {"sample": name, "pairs": alike, "chance": chance},
                )
            )
    if not found:
        return None
    return Disagreement("completion", APART, found[0].sentence, rows=tuple(found))


def truncation(sides: Sides, sampled: Sampled) -> Disagreement | None:
    """Whether only the first tokens of the distribution are drawn, with logprobs that know of it
    or not."""
    logprobs, drawn, told = _distribution(sides, sampled)
    own = logprobs.gather(1, drawn)
    above = logprobs > own
    ranks = 1 + above.sum(1)
    nucleus = float(torch.where(above, logprobs.exp(), 0.0).sum(1).max())
    ordered = logprobs.sort(-1, descending=True).values
    before = ordered.exp().cumsum(-1) - ordered.exp()
    k = int(ranks.max())
    # by how much the best temperature makes the tokens likelier (Rao's score test)
    warmth = _surprise(logprobs, drawn) ** 2 / 2
    ways = [(f"the first {k}", ordered[:, k - 1])] if k <= LARGEST_K else []
    inside = torch.where(before <= nucleus, ordered, torch.inf).amin(-1)
    ways.append((f"the first {nucleus:.2f} of the probability", inside))
    for what, least in ways:
        kept = logprobs.masked_fill(logprobs < least[:, None], -torch.inf)
        gain = -float(kept.logsumexp(-1).sum())
        if gain < -math.log(UNLIKELY):
            continue
        if not sides.agree(sampled.gap, sampled.tokens):
            if _over_a_prefix(before, (own[:, 0] - told).exp()):
                return _cut(sampled, what, ranks, known=True, proved=True)
        elif warmth < gain + SURE:
            return _cut(sampled, what, ranks, known=False, proved=warmth < gain - SURE)
    return None


def otherwise(sides: Sides, sampled: Sampled) -> Disagreement | None:
    """Whether tokens are as likely on average as they should be, the entropy of what they were
    drawn from, and as many of them stood in prompt or completion before."""
    logprobs, drawn, _ = _distribution(sides, sampled)
    off, again = _surprise(logprobs, drawn), _recurring(sampled, logprobs, drawn)
    if max(abs(off), abs(again)) <= DEVIATIONS:
        return None
    if abs(off) > abs(again):
        way = "surprising" if off > 0 else "likely"
        said = f"are on average too {way} by {abs(off):.1f} standard deviations"
    else:
        way = "many" if again > 0 else "few"
        said = f"hold too {way}, by {abs(again):.1f} standard deviations, that stood in prompt or "
        said += "completion before"
    return Disagreement(
        "completion",
        AS_REPORTED,
        f"the {len(drawn)} tokens drawn at temperature {sampled.temperature:g} {said}, and their "
        "logprobs do not know of it: another temperature, or a penalty",
        rows=_rows(sampled, logprobs, drawn),
    )


def _distribution(sides: Sides, sampled: Sampled) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs among the allowed ids, float64, (tokens, V); drawn ids; reported logprobs."""
    scores, drawn, told = sides.scores(sampled)
    allowed = scores.masked_fill(sides.policy.suppressed.cpu(), -torch.inf)
    return (allowed.double() / sampled.temperature).log_softmax(-1), drawn, told


def _surprise(logprobs: Tensor, drawn: Tensor) -> float:
    """How far the sum of -log p of the tokens is from what it should be, in standard deviations;
    0 where nothing is uncertain. ``logprobs``: up to a constant per token.

    >>> even = torch.zeros(4, 2), torch.zeros(4, 1, dtype=torch.int64)
    >>> _surprise(*even)
    0.0
    """
    off = variance = 0.0
    parts = zip(torch.split(logprobs, 64), torch.split(drawn, 64), strict=True)  # V may be large
    for part, token in parts:
        normal = part.log_softmax(-1)
        chance, cost = normal.exp(), -normal.masked_fill(normal == -torch.inf, 0.0)
        mean = (chance * cost).sum(-1)
        off += float((cost.gather(1, token)[:, 0] - mean).sum())
        variance += float(((chance * cost.square()).sum(-1) - mean.square()).sum())
    return off / math.sqrt(variance) if variance > 0 else 0.0


def _recurring(sampled: Sampled, logprobs: Tensor, drawn: Tensor) -> float:
    """How far the number of tokens that occur before them, in prompt or completion, is from what it
    should be, in standard deviations."""
    size, found, spread, at = len(sampled.gap) // len(sampled.answers), 0.0, 0.0, 0
    for number, (ids, mask) in enumerate(zip(sampled.tokens.ids, sampled.tokens.mask, strict=True)):
        before = set(sampled.answers[number // size].prompt_ids)
        for token in ids[mask].tolist():
            chance = float(logprobs[at, sorted(before)].exp().sum())
            found += (token in before) - chance
            spread += max(chance * (1 - chance), 0.0)
            before.add(token)
            at += 1
    return found / math.sqrt(spread) if spread > 0 else 0.0


def _over_a_prefix(before: Tensor, mass: Tensor) -> bool:
    """Whether logprobs were made to add up to 1 over the first tokens. ``before``: probability in
    front of each, sorted, (tokens, V). ``mass``: what they were divided by, (tokens,)."""
    off = (before - mass[:, None]).abs().amin(-1)
    return bool((torch.minimum(off, (1 - mass).abs()) <= MASS * mass).all())


def _rows(sampled: Sampled, logprobs: Tensor, drawn: Tensor) -> tuple[RowSeen, ...]:
    found = []
    for row, sample in enumerate(sampled.inputs.samples):
        own = _owner(sampled) == row
        off, name = _surprise(logprobs[own], drawn[own]), sample.sample_id
        count = int(own.sum())
        found.append(
            RowSeen(
                row,
                f"{name}: its {count} tokens are {off:+.1f} standard deviations from their entropy",
                {"sample": name, "tokens": count, "deviations": off},
            )
        )
    return tuple(found)


def _owner(sampled: Sampled) -> Tensor:
    """The row of every token inside the mask."""
    size = len(sampled.gap) // len(sampled.answers)
    return sampled.tokens.mask.nonzero()[:, 0] // size


def _cut(sampled: Sampled, what: str, ranks: Tensor, *, known: bool, proved: bool) -> Disagreement:
    """``ranks``: of each token inside the mask; the likeliest has 1."""
    rows = []
    for row, sample in enumerate(sampled.inputs.samples):
        own = ranks[_owner(sampled) == row]
        worst, count, name = int(own.max()), len(own), sample.sample_id
        rows.append(
            RowSeen(
                row,
                f"{name}: the least likely of its {count} tokens, drawn at temperature "
                f"{sampled.temperature:g}, has rank {worst}",
                {"sample": name, "tokens": count, "rank": worst},
            )
        )
    return Disagreement(
        "completion",
        WHOLE,
        f"all {len(ranks)} tokens are among {what}, which happens by chance once in a million "
        f"times; the logprobs {'know' if known else 'do not know'} of it: a top-k, top-p or min-p, "
        "perhaps of the checkpoint's generation config",
        proved=proved,
        rows=tuple(rows),
    )
