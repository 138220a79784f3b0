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

from omni_grpo_core.engines.misplaced import other_positions
from omni_grpo_core.engines.reports import ALLOWED, EXPLAINED, Tried, reported
from omni_grpo_core.engines.rounding import rounding
from omni_grpo_core.engines.sides import Sampled, Sides
from omni_grpo_core.pipeline.ablation import blanked
from omni_grpo_core.types import MODALITIES, Disagreement, Modality

ROUNDINGS = 4
"""A cause is one too if no logprob is off by more than this many times what rounding does. Between
vLLM 0.32 and transformers it was at most 2.7 times, over twelve policies from the shipped one to
ones that amplify rounding 30-fold."""


def explain(sides: Sides, sampled: Sampled, seed: int, cut: Disagreement | None) -> Disagreement:
    """The cause that reproduces the engine's logprobs best; by elimination, where none does.
    ``cut``: what :func:`~omni_grpo_core.engines.draws.truncation` found."""
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
    tried = [*reported(sides, sampled, seen), *_others(sides, sampled, seen)]
    tried += [*_placed(sides, sampled, seen), *_reordered(sides, sampled, limit)]
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


def _by_row(sampled: Sampled, gap: Tensor) -> list[float]:
    found: list[float] = gap.amax(1).view(len(sampled.inputs.batch.rows), -1).amax(1).tolist()
    return found


def _others(sides: Sides, sampled: Sampled, seen: str) -> Iterator[Tried]:
    """The policy in other states."""
    for name, state in sides.others.items():
        with state():
            gap = sides.gap(sampled.inputs, sampled.tokens, sampled.temperature)
        equal = Disagreement("policy", name, f"{seen}, and equal to those without it")
        yield float(gap.abs().max()), equal


def _placed(sides: Sides, sampled: Sampled, seen: str) -> Iterator[Tried]:
    """Other positions of the same ids."""
    for what, where in other_positions(sides.policy, sampled.inputs.batch):
        gap = sides.gap(sampled.inputs, sampled.tokens, sampled.temperature, where)
        placed = Disagreement(
            "positions", "the engine places media as the batch does", f"{seen}, and equal {what}"
        )
        yield float(gap.abs().max()), placed


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
