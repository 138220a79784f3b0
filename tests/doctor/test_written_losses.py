"""Losses as people write them, on the tiny checkpoint: sound ones pass, mistakes are found.

A loss is one expression in tensors (N, C) of a micro-batch: ``new``, ``old``, ``reference``,
``mask`` and ``advantages`` (N, 1). Nothing of it is noted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from written_loop import GROUP, LONGEST, Written, WrittenLoop

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.doctor.diagnose import diagnose
from omni_grpo_core.doctor.evidence import Case

pytestmark = pytest.mark.slow


@dataclass
class Known:
    """What a loss is made of."""

    new: Tensor
    old: Tensor
    reference: Tensor
    mask: Tensor
    advantages: Tensor
    distribution: Tensor
    reference_distribution: Tensor

    @property
    def ratio(self) -> Tensor:
        return (self.new - self.old).exp()

    def mean(self, tokens: Tensor) -> Tensor:
        return (tokens * self.mask).sum() / self.mask.sum()

    def of_sequences(self, tokens: Tensor) -> Tensor:
        return ((tokens * self.mask).sum(1) / self.mask.sum(1)).mean()


Loss = Callable[[Known], Tensor]
Advantages = Callable[[Tensor, Known], Tensor]


def normed(rewards: Tensor, _: Any = None) -> Tensor:
    groups = rewards.view(-1, GROUP)
    return (
        (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    ).flatten()


def centred(rewards: Tensor, _: Any = None) -> Tensor:
    groups = rewards.view(-1, GROUP)
    return (groups - groups.mean(1, keepdim=True)).flatten()


@dataclass(frozen=True)
class Recipe:
    loss: Loss
    advantages: Advantages = normed
    how: Written = field(default_factory=Written)


class RecipeLoop(WrittenLoop):
    def __init__(self, policy: Policy, recipe: Recipe) -> None:
        super().__init__(policy, recipe.how)
        self.recipe = recipe

    def advantages(self, rewards: Tensor) -> Tensor:
        return rewards

    def step(self, step: int) -> None:
        one = self.rollout(5 * step + 1)
        with torch.no_grad():
            old, _ = self.scores(self.model, one)
            reference, whole = (
                self.scores(self.reference, one) if self.how.beta else (old, old[..., None])
            )
        for _ in range(self.how.updates):
            new, every = self.scores(self.model, one)
            own = new.detach() if self.how.updates == 1 else old
            known = Known(new, own, reference, one.mask.float(), one.advantages, every, whole)
            known.advantages = self.recipe.advantages(one.advantages, known)
            if known.advantages.dim() == 1:
                known.advantages = known.advantages[:, None]
            self.recipe.loss(known).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()


# --------------------------------------------------------------------------- sound


def clipped(low: float = 0.2, high: float = 0.2) -> Callable[[Known], Tensor]:
    def tokens(known: Known) -> Tensor:
        one = known.ratio * known.advantages
        return -torch.min(one, known.ratio.clamp(1 - low, 1 + high) * known.advantages)

    return tokens


def plain(known: Known) -> Tensor:
    return known.mean(clipped()(known))


def k1(known: Known) -> Tensor:
    return known.new - known.reference


def k2(known: Known) -> Tensor:
    return (known.new - known.reference).square() / 2


def k3(known: Known) -> Tensor:
    away = known.reference - known.new
    return away.exp() - away - 1


def with_kl(kl: Callable[[Known], Tensor], beta: float = 0.04) -> Loss:
    return lambda known: known.mean(clipped()(known) + beta * kl(known))


def gspo(known: Known) -> Tensor:
    away = ((known.new - known.old) * known.mask).sum(1) / known.mask.sum(1)
    ratio, advantages = away.exp(), known.advantages[:, 0]
    return -torch.min(ratio * advantages, ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantages).mean()


def gspo_of_tokens(known: Known) -> Tensor:
    """Its gradient per token: sg[s] * p / sg[p]."""
    away = ((known.new - known.old) * known.mask).sum(1, keepdim=True) / known.mask.sum(1, True)
    ratio = (away.detach() + known.new - known.new.detach()).exp()
    one = ratio * known.advantages
    return known.of_sequences(-torch.min(one, ratio.clamp(0.8, 1.2) * known.advantages))


def cispo(known: Known) -> Tensor:
    return known.mean(-known.ratio.clamp(max=1.28).detach() * known.advantages * known.new)


def dual(known: Known) -> Tensor:
    one = -known.ratio * known.advantages
    two = torch.max(one, -known.ratio.clamp(0.8, 1.2) * known.advantages)
    bound = torch.min(two, -3.0 * known.advantages)
    return known.mean(torch.where(known.advantages < 0, bound, two))


def reinforce(known: Known) -> Tensor:
    return known.mean(-known.advantages * known.new)


def full_kl(known: Known) -> Tensor:
    kl = (known.distribution.exp() * (known.distribution - known.reference_distribution)).sum(-1)
    return known.mean(clipped()(known) + 0.04 * kl)


def entropic(known: Known) -> Tensor:
    entropy = -(known.distribution.exp() * known.distribution).sum(-1)
    return known.mean(clipped()(known) - 0.005 * entropy)


def leave_one_out(rewards: Tensor, _: Any = None) -> Tensor:
    groups = rewards.view(-1, GROUP)
    return (groups - (groups.sum(1, keepdim=True) - groups) / (GROUP - 1)).flatten()


def of_batch(rewards: Tensor, _: Any = None) -> Tensor:
    values = centred(rewards)
    return values / (values.std() + 1e-8)


def shorter(rewards: Tensor, known: Known) -> Tensor:
    return normed(rewards - 0.01 * known.mask.sum(1))


def kl_in_rewards(rewards: Tensor, known: Known) -> Tensor:
    away = ((known.old - known.reference) * known.mask).sum(1)
    return normed(rewards - 0.05 * away)


def whitened(rewards: Tensor, known: Known) -> Tensor:
    values = centred(rewards)[:, None].expand_as(known.mask)
    mean = known.mean(values)
    return (values - mean) / (known.mean((values - mean).square()) + 1e-8).sqrt()


def discounted(rewards: Tensor, known: Known) -> Tensor:
    left = known.mask.flip(1).cumsum(1).flip(1) - 1
    return normed(rewards)[:, None] * 0.99**left


def ended_alone(known: Known) -> Tensor:
    """DAPO's overlong filtering, with its higher clip."""
    live = known.mask * (known.mask.sum(1, keepdim=True) < LONGEST)
    return (clipped(0.2, 0.28)(known) * live).sum() / live.sum().clamp(min=1)


AGAIN = Written(updates=3, rate=4e-3)  # so fast that a fifth of the tokens are clipped
HELD = Written(beta=0.04)
HELD_AGAIN = Written(beta=0.04, updates=3, rate=4e-3)
SOUND = {
    "grpo": Recipe(lambda k: k.of_sequences(clipped()(k))),
    "dr_grpo": Recipe(lambda k: (clipped()(k) * k.mask).sum() / (8 * LONGEST), centred),
    "grpo again": Recipe(lambda k: k.of_sequences(clipped()(k)), how=AGAIN),
    "dapo again": Recipe(lambda k: k.mean(clipped(0.2, 0.28)(k)), how=AGAIN),
    "narrow clip again": Recipe(lambda k: k.mean(clipped(0.05, 0.07)(k)), how=AGAIN),
    "overlong": Recipe(ended_alone),
    "gspo again": Recipe(gspo, how=AGAIN),
    "gspo of tokens again": Recipe(gspo_of_tokens, how=AGAIN),
    "cispo again": Recipe(cispo, how=AGAIN),
    "dual clip again": Recipe(dual, how=AGAIN),
    "reinforce": Recipe(reinforce),
    "leave one out": Recipe(reinforce, leave_one_out),
    "reinforce++ baseline": Recipe(plain, of_batch),
    "whitened": Recipe(plain, whitened),
    "discounted": Recipe(reinforce, discounted),
    "length penalty": Recipe(plain, shorter),
    "k1": Recipe(with_kl(k1), how=HELD),
    # on its own samples its gradient is 0 on average, whatever its sign
    "k1 subtracted": Recipe(with_kl(k1, -0.04), how=HELD),
    "k2": Recipe(with_kl(k2), how=HELD),
    "k3": Recipe(with_kl(k3), how=HELD),
    "k3 again": Recipe(with_kl(k3), how=HELD_AGAIN),
    "full kl": Recipe(full_kl, how=HELD),
    "kl in rewards": Recipe(plain, kl_in_rewards, HELD),
    "entropy": Recipe(entropic),
    "entropy again": Recipe(entropic, how=AGAIN),
    "entropy and kl": Recipe(lambda k: entropic(k) + k.mean(0.04 * k3(k)), how=HELD),
    "summed": Recipe(lambda k: (clipped()(k) * k.mask).sum()),
    "bounded": Recipe(plain, lambda rewards, _: normed(rewards).clamp(-1, 1)),
}  # fmt: skip


def seen_in(policy: Policy, recipe: Recipe, folder: Path) -> tuple[tuple[Case, ...], list[Any]]:
    steps = 2 if recipe.how.updates == 1 else 1
    cases = RecipeLoop(policy, recipe).run(folder / "trace", steps)
    return cases, [diagnose(case) for case in cases]


def told(found: list[Any]) -> list[str]:
    return [
        f"{n}: {e.severity} {finding.stage} {e.fact}: {e.sentence} <{proved}>"
        for n, one in enumerate(found)
        for finding in one.findings
        for proved in [[c.cause + "!" * c.proved for c in finding.causes]]
        for e in finding.evidence
    ]


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_loss_is_not_blamed(name: str, policy: Policy, tmp_path: Path) -> None:
    _, found = seen_in(policy, SOUND[name], tmp_path)
    print("\n".join(told(found)), [note for one in found for note in one.missing])
    assert not [line for line in told(found) if ": breaks" in line]


# --------------------------------------------------------------------------- mistakes


def inverted(known: Known) -> Tensor:
    ratio = (known.old - known.new).exp()
    one = ratio * known.advantages
    return known.mean(-torch.min(one, ratio.clamp(0.8, 1.2) * known.advantages))


def exchanged(known: Known) -> Tensor:
    """max where min belongs: what clipping is for is let through, the rest is not."""
    one = known.ratio * known.advantages
    return known.mean(-torch.max(one, known.ratio.clamp(0.8, 1.2) * known.advantages))


def probabilities(known: Known) -> Tensor:
    return known.mean(-known.advantages * known.new.exp())


def ratio_of_logprobs(known: Known) -> Tensor:
    """new / old, where both are logarithms."""
    return known.mean(-known.advantages * known.new / known.old.clamp(max=-1e-6))


def with_old(change: Callable[[Tensor], Tensor]) -> Loss:
    def changed(known: Known) -> Tensor:
        known.old = change(known.old)
        return plain(known)

    return changed


of_other_rows = with_old(lambda old: old.roll(1, 0))


def of_the_reference(known: Known) -> Tensor:
    known.old = known.reference
    return plain(known)


def undetached(known: Known) -> Tensor:
    known.old = known.new
    return known.mean(clipped()(known))


def detached(known: Known) -> Tensor:
    """The ratio's, beside a KL that still reaches the model."""
    return known.mean(-known.ratio.detach() * known.advantages + 0.04 * k3(known))


def masked_late(known: Known) -> Tensor:
    known.mask = known.mask.roll(1, 1)
    return known.mean(clipped()(known))


def padded(known: Known) -> Tensor:
    return (clipped()(known) * known.mask).mean()


def squared(known: Known) -> Tensor:
    known.advantages = known.advantages * known.advantages
    return known.mean(clipped()(known))


def opposite(kl: Callable[[Known], Tensor]) -> Loss:
    return lambda known: known.mean(clipped()(known) - 0.04 * kl(known))


def of_its_own(known: Known) -> Tensor:
    return known.mean(-(known.new - known.new.detach()).exp() * known.advantages)


def swapped_kl(known: Known) -> Tensor:
    away = known.new - known.reference
    return away.exp() - away - 1


def of_next_rows(rewards: Tensor, _: Known) -> Tensor:
    return normed(rewards).roll(1)


def over_rows(rewards: Tensor, known: Known) -> Tensor:
    """(N,) where (N, 1) belongs: over columns, as far as they go."""
    width = known.mask.shape[1]
    return normed(rewards).repeat(LONGEST)[:width].expand(len(rewards), -1)


MISTAKES = {  # with severity and stage of what is found
    "sign": (Recipe(lambda k: -plain(k)), "breaks advantage"),
    "early column": (Recipe(plain, how=Written(early=1)), "breaks loss"),
    "masked late": (Recipe(masked_late), "breaks loss"),
    "padding": (Recipe(plain, how=Written(padding_counts=True)), "breaks loss"),
    "padded mean": (Recipe(padded), "differs loss"),
    "inverted": (Recipe(inverted), "breaks advantage"),
    "inverted again": (Recipe(inverted, how=AGAIN), "breaks loss"),
    "exchanged again": (Recipe(exchanged, how=AGAIN), "breaks loss"),
    "probabilities": (Recipe(probabilities), "breaks loss"),
    "ratio of logprobs": (Recipe(ratio_of_logprobs), "breaks loss"),
    "old late": (Recipe(with_old(lambda old: old.roll(1, 1))), "breaks loss"),
    "old early": (Recipe(with_old(lambda old: old.roll(-1, 1))), "breaks loss"),
    "old of other rows": (Recipe(of_other_rows), "breaks loss"),
    "old of other rows again": (Recipe(of_other_rows, how=AGAIN), "breaks loss"),
    "old of the reference": (Recipe(of_the_reference, how=HELD), "breaks logits"),
    "old is 0": (Recipe(with_old(torch.zeros_like)), "breaks loss"),
    "undetached": (Recipe(undetached), "breaks loss"),
    # advantages of 0 leave the same, and both are said
    "detached": (Recipe(detached, how=HELD), "breaks advantage"),
    "squared": (Recipe(squared), "breaks advantage"),
    "kl sign": (Recipe(opposite(k3), how=HELD), "breaks loss"),
    "kl sign k2": (Recipe(opposite(k2), how=HELD), "breaks loss"),
    "kl swapped": (Recipe(with_kl(swapped_kl), how=HELD), "differs loss"),
    "kl swapped, negative": (Recipe(opposite(swapped_kl), how=HELD), "breaks loss"),
    "clip of 0 again": (Recipe(lambda k: k.mean(clipped(0.0, 0.0)(k)), how=AGAIN), "breaks loss"),
    "other rows": (Recipe(plain, of_next_rows), "breaks advantage"),
    "over rows": (Recipe(plain, over_rows), "breaks advantage"),
    "eos": (Recipe(plain, how=Written(eos_counts=False)), "differs loss"),
    "raw rewards": (Recipe(plain, lambda r, _: r), "differs advantage"),
    "recomputed again": (Recipe(of_its_own, how=AGAIN), "breaks loss"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name: str, policy: Policy, tmp_path: Path) -> None:
    recipe, stage = MISTAKES[name]
    _, found = seen_in(policy, recipe, tmp_path)
    lines = told(found)
    print("\n".join(lines), [note for one in found for note in one.missing])
    assert [line for line in lines if f": {stage}" in line]
