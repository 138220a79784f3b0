"""Why an engine's logprobs are not the trainer's: each cause is tried out, none is guessed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omni_grpo_core.core.forward import completion_logits
from omni_grpo_core.core.policy import generating
from omni_grpo_core.engines.ids import Disagreement
from omni_grpo_core.engines.sides import Sampled, Sides
from omni_grpo_core.pipeline.ablation import blanked
from omni_grpo_core.types import MODALITIES, Modality

LARGEST_K = 100
"""The largest top-k that is looked for."""
EXPLAINED = 1e-3
"""A cause is one if with it no logprob is off by more than this share of what was seen. Logprobs of
tokens that are drawn hot lie 40 below 0 at temperature 1, where float32 resolves 4e-6."""
UNLIKELY = 1e-6
"""Chance of so narrow a sample from the whole distribution at which it counts as cut."""


def explain(sides: Sides, sampled: Sampled, seed: int) -> Disagreement:
    """The cause that reproduces the engine's logprobs; by elimination, where none does."""
    at, tokens = sampled.temperature, sampled.tokens
    worst = float(sampled.gap.abs().max())
    seen = f"logprobs are up to {worst:.3g} nats off ({sides.lane.worst:g} allowed)"
    found = _reordered(sides, sampled)
    if found is not None:
        return found
    if at != 1 and _reproduces(sampled, sides.gap(sampled.inputs, tokens, 1.0)):
        return Disagreement(
            "completion",
            "logprobs are at the sampling temperature",
            f"{seen} at temperature {at:g}, and equal at 1: the engine reports them before the "
            "temperature (vLLM: logprobs_mode='processed_logprobs')",
        )
    for name, state in sides.others.items():
        with state():
            gap = sides.gap(sampled.inputs, tokens, at)
        if _reproduces(sampled, gap):
            return Disagreement("policy", name, f"{seen}, and equal to those without it")
    rows = sampled.inputs.batch.rows
    by_row = sampled.gap.abs().amax(1).view(len(rows), -1).amax(1).tolist()
    bad = [i for i, gap in enumerate(by_row) if gap > sides.lane.worst]
    seen += f" in {', '.join(rows[i].sample_id for i in bad[:3])}" if bad else ", on average"
    for modality in MODALITIES:
        if bad and all(any(s.modality == modality for s in rows[i].spans) for i in bad):
            lost = _features(sides, sampled, modality, bad, seed)
            if lost is not None:
                return Disagreement("media", lost, seen)
    return Disagreement(
        "policy",
        "the engine has the trainer's weights",
        f"{seen}, whatever the rows hold: other weights, or kernels that compute otherwise",
    )


def _reproduces(sampled: Sampled, gap: Tensor) -> bool:
    """Whether under another assumption the logprobs are off by no more than rounding."""
    worst = float(sampled.gap.abs().max())
    return bool(gap.abs().max() <= EXPLAINED * worst)


def _reordered(sides: Sides, sampled: Sampled) -> Disagreement | None:
    """Whether every completion is one of some row, but not all of their own."""
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
    limit = max(sides.lane.worst, EXPLAINED * float(sampled.gap.abs().max()))
    fits = distance[own, everyone] <= limit
    nearest = torch.where(fits, own, distance.argmin(0))
    if bool(fits.all()) or bool((distance.amin(0) > limit).any()):
        return None
    at = int((nearest != own).nonzero()[0])
    grouped = nearest.view(count, group)
    whole = bool((grouped == grouped[:, :1]).all())
    return Disagreement(
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


def _features(
    sides: Sides, sampled: Sampled, modality: Modality, rows: list[int], seed: int
) -> str | None:
    """What is wrong with a modality that all bad ``rows`` have; ``None``: it is not to blame."""
    length = sampled.tokens.ids.shape[1]
    flat = sides.changed(sampled.inputs, rows, lambda media: blanked(media, modality))
    answers = sides.ask(flat, seed, sampled.temperature, length)
    if [one.drawn for one in answers] == [sampled.answers[i].drawn for i in rows]:
        return f"{modality} reaches the engine"
    again = sides.read(flat, answers, sampled.temperature, length)
    if sides.agree(again.gap, again.tokens):
        return f"{modality} has the batch's content in the engine"
    return None


@torch.no_grad()
def truncation(sides: Sides, sampled: Sampled) -> Disagreement | None:
    """Whether only the first tokens of the distribution are drawn, with logprobs that know of it
    or not."""
    policy, mask, ids = sides.policy, sampled.tokens.mask, sampled.tokens.ids
    with generating(policy.model):
        logits = completion_logits(policy, sampled.inputs.batch, ids, mask.to(torch.int64))
    allowed = logits.float().masked_fill(policy.suppressed, -torch.inf).cpu()[mask]
    logprobs = (allowed.double() / sampled.temperature).log_softmax(-1)
    drawn = logprobs.gather(1, ids[mask][:, None])
    above = logprobs > drawn
    k = 1 + int(above.sum(1).max())
    if k <= LARGEST_K:
        kept = logprobs.topk(k, -1).values.logsumexp(-1)
        if float(kept.sum()) < math.log(UNLIKELY):
            gap = sampled.tokens.logprobs[mask] - (drawn[:, 0] - kept)
            return _cut(f"the first {k}", len(ids[mask]), bool(gap.abs().max() < sides.lane.worst))
    nucleus = float(torch.where(above, logprobs.exp(), 0.0).sum(1).max())
    if float(_inside(logprobs, nucleus).log().sum()) < math.log(UNLIKELY):
        return _cut(f"the first {nucleus:.2f} of the probability", len(ids[mask]), False)
    return None


def _inside(logprobs: Tensor, nucleus: float) -> Tensor:
    """Probability of the tokens that have at most ``nucleus`` before them.

    >>> _inside(torch.tensor([[0.5, 0.25, 0.25]]).log(), 0.5).tolist()
    [0.75]
    """
    sorted_ = logprobs.exp().sort(-1, descending=True).values
    return torch.where(sorted_.cumsum(-1) - sorted_ <= nucleus, sorted_, 0.0).sum(-1)


def _cut(what: str, tokens: int, known: bool) -> Disagreement:
    return Disagreement(
        "completion",
        "the engine samples from the whole distribution",
        f"all {tokens} tokens are among {what}, which happens by chance once in a million times; "
        f"the logprobs {'know' if known else 'do not know'} of it: a top-k or top-p, perhaps of "
        "the checkpoint's generation config",
    )
