"""Why an engine's logprobs are not the trainer's: each cause is tried out, none is guessed.

Rounding is measured first, then every assumption is asked how much of the difference it leaves
over: the one that leaves least is named, if that is no more than rounding. Only where none
reproduces the engine's numbers, it is looked for what they do not depend on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from omni_grpo_core.core.forward import completion_logits
from omni_grpo_core.core.policy import generating
from omni_grpo_core.engines.rounding import rounding
from omni_grpo_core.engines.sides import Sampled, Sides
from omni_grpo_core.pipeline.ablation import blanked
from omni_grpo_core.types import MODALITIES, Disagreement, Modality, RowSeen

LARGEST_K = 100
"""The largest top-k that is looked for."""
EXPLAINED = 1e-3
"""A cause is one if with it no logprob is off by more than this share of what was seen. Logprobs of
tokens that are drawn hot lie 40 below 0 at temperature 1, where float32 resolves 4e-6."""
ROUNDINGS = 4
"""Or by more than this many times what rounding does. Between vLLM 0.32 and transformers it was at
most 2.7 times, over twelve policies from the shipped one to ones that amplify rounding 30-fold."""
UNLIKELY = 1e-6
"""Chance of so narrow a sample from the whole distribution at which it counts as cut."""
TEMPERATURES = (0.05, 20.0)
"""Between which the temperature of reported logprobs is looked for."""

ALLOWED = "the engine draws from the allowed ids"


def explain(sides: Sides, sampled: Sampled, seed: int, cut: Disagreement | None) -> Disagreement:
    """The cause that reproduces the engine's logprobs best; by elimination, where none does.
    ``cut``: what :func:`truncation` found."""
    strange = _not_finite(sides, sampled)
    if strange is not None:
        return strange
    gap, lane = sampled.gap.abs(), sides.lane
    worst, noise = float(gap.max()), rounding(sides, sampled)
    limit = max(EXPLAINED * worst, ROUNDINGS * noise)
    seen = f"logprobs are up to {worst:.3g} nats off ({lane.worst:g} allowed)"
    if worst <= ROUNDINGS * noise:
        return Disagreement(
            "logits",
            "the engine scores as the trainer does",
            f"{seen}, which is rounding: the trainer's own move by up to {noise:.2g} where each "
            "layer's output is changed by its precision",
        )
    tried = [*_reported(sides, sampled, seen), *_others(sides, sampled, seen)]
    tried += _reordered(sides, sampled, limit)
    left, best = min(tried, key=lambda one: one[0])
    if left <= limit:
        return best
    if cut is not None:
        return cut
    rows = sampled.inputs.batch.rows
    bad = [i for i, off in enumerate(_by_row(sampled, gap)) if off > lane.worst]
    if bad:
        seen += f" in {', '.join(rows[i].sample_id for i in bad[:3])}"
    for modality in MODALITIES:
        if bad and all(any(s.modality == modality for s in rows[i].spans) for i in bad):
            lost = _features(sides, sampled, modality, bad, seed, limit)
            if lost is not None:
                return Disagreement("media", lost, seen)
    return Disagreement(
        "policy",
        "the engine has the trainer's weights",
        f"{seen}, with every assumption that was tried: other weights, or an engine that computes "
        "otherwise",
        proved=False,
    )


def _not_finite(sides: Sides, sampled: Sampled) -> Disagreement | None:
    tokens = sampled.tokens
    bad = sampled.gap.isfinite().logical_not().nonzero().tolist()
    if not bad:
        return None
    row, place = bad[0]
    token, told = int(tokens.ids[row, place]), float(tokens.logprobs[row, place])
    where = f"token {place} of completion {row} is {sides.policy.decode([token])!r}"
    if sides.policy.suppressed[token]:
        return Disagreement("completion", ALLOWED, f"{where}, which is not among them")
    whose = "trainer" if math.isfinite(told) else "engine"
    return Disagreement("logits", "logprobs are finite", f"{where}; the {whose}'s is not")


Tried = tuple[float, Disagreement]
"""What an assumption leaves of the difference, nats at worst, and what it would mean."""


def _by_row(sampled: Sampled, gap: Tensor) -> list[float]:
    found: list[float] = gap.amax(1).view(len(sampled.inputs.batch.rows), -1).amax(1).tolist()
    return found


def _reported(sides: Sides, sampled: Sampled, seen: str) -> Iterator[Tried]:
    """Logprobs at another temperature, or of all ids, or both: vLLM's ``raw_logprobs``, which it
    takes before the temperature and before it masks ids."""
    scores, drawn, told = _scores(sides, sampled)
    allowed = scores.masked_fill(sides.policy.suppressed.cpu(), -torch.inf)
    for logits, ids in ((allowed, "the allowed ids"), (scores, "all ids")):
        at = _temperature(logits, drawn, told)
        left = float((_logprobs(logits, drawn, at) - told).abs().max())
        name = "logprobs are at the sampling temperature"
        if math.isclose(at, sampled.temperature, rel_tol=EXPLAINED):
            name = ALLOWED
        yield (
            left,
            Disagreement(
                "completion",
                name,
                f"{seen} at temperature {sampled.temperature:g}, and equal at {at:.4g} over {ids}: "
                "the engine reports others than it should draw from (vLLM: "
                "logprobs_mode='processed_logprobs')",
            ),
        )


def _others(sides: Sides, sampled: Sampled, seen: str) -> Iterator[Tried]:
    """The policy in other states."""
    for name, state in sides.others.items():
        with state():
            gap = sides.gap(sampled.inputs, sampled.tokens, sampled.temperature)
        equal = Disagreement("policy", name, f"{seen}, and equal to those without it")
        yield float(gap.abs().max()), equal


@torch.no_grad()
def _scores(sides: Sides, sampled: Sampled) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token: the logits that it was drawn from, float32, (tokens, V); its id, (tokens, 1);
    the logprob that the engine reported, float64, (tokens,). On the CPU."""
    tokens = sampled.tokens
    with generating(sides.policy.model):
        logits = completion_logits(
            sides.policy, sampled.inputs.batch, tokens.ids, tokens.mask.to(torch.int64)
        )
    mask = tokens.mask
    return logits.float().cpu()[mask], tokens.ids[mask][:, None], tokens.logprobs[mask]


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

    low, high = map(math.log, TEMPERATURES)
    for _ in range(8):  # a sixteenth of the last range each: 1e-9
        step = (high - low) / 32
        best = min((low + step * i for i in range(33)), key=off)
        low, high = best - step, best + step
    return math.exp((low + high) / 2)


def _reordered(sides: Sides, sampled: Sampled, limit: float) -> list[Tried]:
    """Every completion is one of some row, but not all of their own."""
    rows, tokens = sampled.inputs.batch.rows, sampled.tokens
    count, group = len(rows), len(sampled.gap) // len(rows)
    under = [
        sides.gap(sides.chosen(sampled.inputs, [row]), tokens, sampled.temperature)
        for row in range(count)
    ]
    distance = torch.stack([gap.abs().amax(1) for gap in under])  # (rows, N)
    everyone = torch.arange(count * group)
    own = everyone // group
    # several rows may fit a completion that is about none of them: its own first
    nearest = torch.where(distance[own, everyone] <= limit, own, distance.argmin(0))
    if bool((nearest == own).all()):
        return []
    at = int((nearest != own).nonzero()[0])
    grouped = nearest.view(count, group)
    whole = bool((grouped == grouped[:, :1]).all())
    found = Disagreement(
        "completion",
        "answers belong to their prompts" if whole else "a group's completions are adjacent",
        f"completion {at} stands at {rows[int(own[at])].sample_id} and scores as one of "
        f"{rows[int(nearest[at])].sample_id}: "
        + (
            "the engine's answers are in another order than its requests"
            if whole
            else "completions come in the order 1 2 1 2 instead of 1 1 2 2"
        ),
    )
    return [(float(distance[nearest, everyone].max()), found)]


def _features(
    sides: Sides, sampled: Sampled, modality: Modality, rows: list[int], seed: int, limit: float
) -> str | None:
    """What is wrong with a modality that all bad ``rows`` have; ``None``: it is not to blame."""
    length = sampled.tokens.ids.shape[1]
    flat = sides.changed(sampled.inputs, rows, lambda media: blanked(media, modality))
    answers = sides.ask(flat, seed, sampled.temperature, length)
    if [one.drawn for one in answers] == [sampled.answers[i].drawn for i in rows]:
        return f"{modality} reaches the engine"
    again = sides.read(flat, answers, sampled.temperature, length)
    if float(again.gap.abs().max()) <= limit:
        return f"{modality} has the batch's content in the engine"
    return None


def truncation(sides: Sides, sampled: Sampled) -> Disagreement | None:
    """Whether only the first tokens of the distribution are drawn, with logprobs that know of it
    or not."""
    scores, drawn, told = _scores(sides, sampled)
    allowed = scores.masked_fill(sides.policy.suppressed.cpu(), -torch.inf)
    logprobs = (allowed.double() / sampled.temperature).log_softmax(-1)
    own = logprobs.gather(1, drawn)
    above = logprobs > own
    ranks = 1 + above.sum(1)
    seen, k = _ranks(sampled, ranks), int(ranks.max())
    if k <= LARGEST_K:
        kept = logprobs.topk(k, -1).values.logsumexp(-1)
        if float(kept.sum()) < math.log(UNLIKELY):
            gap = told - (own[:, 0] - kept)
            return _cut(f"the first {k}", seen, bool(gap.abs().max() < sides.lane.worst))
    nucleus = float(torch.where(above, logprobs.exp(), 0.0).sum(1).max())
    if float(_inside(logprobs, nucleus).log().sum()) < math.log(UNLIKELY):
        return _cut(f"the first {nucleus:.2f} of the probability", seen, False)
    return None


def _inside(logprobs: Tensor, nucleus: float) -> Tensor:
    """Probability of the tokens that have at most ``nucleus`` before them.

    >>> _inside(torch.tensor([[0.5, 0.25, 0.25]]).log(), 0.5).tolist()
    [0.75]
    """
    sorted_ = logprobs.exp().sort(-1, descending=True).values
    return torch.where(sorted_.cumsum(-1) - sorted_ <= nucleus, sorted_, 0.0).sum(-1)


def _ranks(sampled: Sampled, ranks: Tensor) -> tuple[RowSeen, ...]:
    """How far down the distribution the tokens of each row were drawn. ``ranks``: of each token
    inside the mask, the likeliest has 1."""
    size = len(sampled.gap) // len(sampled.answers)
    owner = sampled.tokens.mask.nonzero()[:, 0] // size
    found = []
    for row, sample in enumerate(sampled.inputs.samples):
        own = ranks[owner == row]
        worst, count = int(own.max()), len(own)
        name = sample.sample_id
        found.append(
            RowSeen(
                row,
                f"{name}: the least likely of its {count} tokens, drawn at temperature "
                f"{sampled.temperature:g}, has rank {worst}",
                {"sample": name, "tokens": count, "rank": worst},
            )
        )
    return tuple(found)


def _cut(what: str, rows: tuple[RowSeen, ...], known: bool) -> Disagreement:
    return Disagreement(
        "completion",
        "the engine samples from the whole distribution",
        f"all {sum(row.values['tokens'] for row in rows)} tokens are among {what}, which happens "
        "by chance once in a million times; "
        f"the logprobs {'know' if known else 'do not know'} of it: a top-k or top-p, perhaps of "
        "the checkpoint's generation config",
        rows=rows,
    )
