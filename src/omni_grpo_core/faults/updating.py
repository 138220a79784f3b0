"""Faults of the advantage, the loss and the step that change only what is learnt from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from omni_grpo_core.faults.fault import FaultRegistry, Manager, instead_of, result_of
from omni_grpo_core.faults.learning import HELD, ONE_SIGN, Logged
from omni_grpo_core.faults.model import text_model
from omni_grpo_core.faults.seams import Loop, Rolled
from omni_grpo_core.recorder.hooks import patched
from omni_grpo_core.trace.calls import AdvantageSeen

faults = FaultRegistry()
LAYER = 1
"""The layer that faults of a single one act on."""

# --------------------------------------------------------------------------- advantage


@faults.add(
    "adv.negated",
    "costs taken for rewards",
    also=("loss.sign",),
    accepted={"loss": ONE_SIGN},
)
@result_of("advantages")
def negated(loop: Loop, seen: AdvantageSeen) -> AdvantageSeen:
    """The mean minus the reward is taken for the reward minus the mean: what is rewarded becomes
    less likely."""
    return replace(seen, advantages=-seen.advantages)


@faults.add("adv.clipped", "best-of-n code reused for GRPO")
@result_of("advantages")
def clipped(loop: Loop, seen: AdvantageSeen) -> AdvantageSeen:
    """Only whether a completion is better than the mean counts, as 1 or 0: nothing is ever made
    less likely."""
    return replace(seen, advantages=(seen.advantages > 0).float())


@faults.add(
    "adv.batch-deviation",
    "scale_rewards='batch', REINFORCE++ and Lite PPO: a recipe of its own",
    severity="differs",
)
@instead_of("normalise")
def batch_deviation(
    loop: Loop, before: Callable[..., Tensor], rewards: Tensor, groups: Sequence[str]
) -> Tensor:
    """Rewards are centred by group and divided by the deviation of the whole batch."""
    own = before(rewards, groups)
    centred = torch.stack([_centred(rewards, groups, place) for place in range(len(groups))])
    return torch.where(own != 0, centred / (rewards.std() + 1e-4), own)


def _centred(rewards: Tensor, groups: Sequence[str], place: int) -> Tensor:
    members = torch.tensor([group == groups[place] for group in groups])
    return rewards[place] - rewards[members].mean()


# --------------------------------------------------------------------------- loss


@faults.add("loss.early", "labels shifted where the logits already are", also=("loss.shift",))
@instead_of("completion_logits")
def early(loop: Loop, before: object, logits: Tensor, length: int) -> Tensor:
    """Each token is scored by the logits one column too early, which predict the token before."""
    return logits[:, -length - 2 : -2]


@faults.add(
    "loss.eos-left-out",
    "masks of ids != eos",
    severity="differs",
    also=("loss.tokens-left-out",),
)
@instead_of("loss_mask")
def eos_left_out(loop: Loop, before: Callable[[Rolled], Tensor], rolled: Rolled) -> Tensor:
    """The token that ends a completion is not in the loss: when to stop is not learnt."""
    return before(rolled) & ~torch.isin(rolled.ids, torch.tensor(loop.eos))


@faults.add("loss.entropy-bonus", "PPO code reused for GRPO", severity="differs")
def entropy_bonus(loop: Loop) -> Manager:
    """The entropy of every token is added to the objective, from a default that nobody set."""
    log_softmax, token_loss = loop.log_softmax, loop.token_loss
    entropies: list[Tensor] = []

    def noted(logits: Tensor) -> Tensor:
        made = log_softmax(logits)
        if made.requires_grad:
            finite = made.masked_fill(made == -torch.inf, 0.0)
            entropies.append(-(finite.exp() * finite).sum(-1))
        return made

    def with_bonus(logprobs: Tensor, rolled: Rolled) -> Logged:
        loss, metrics = token_loss(logprobs, rolled)
        loss = loss - 0.05 * torch.cat(entropies)
        entropies.clear()
        return loss, metrics

    return loop.replaced(log_softmax=noted, token_loss=with_bonus)


@faults.add(
    "loss.kl-forgotten",
    "losses copied from a recipe without a reference",
    needs=HELD,
    also=("loss.kl-left-out",),
)
@instead_of("token_loss")
def kl_forgotten(
    loop: Loop, before: Callable[..., Logged], logprobs: Tensor, rolled: Rolled
) -> Logged:
    """Logprobs of a reference are computed and the KL term is configured, but not in the loss."""
    return before(logprobs, replace(rolled, reference=None))


@faults.add(
    "loss.reference-is-policy",
    "sync_ref_model with every step, or a reference that shares its weights",
    needs={"beta": 0.1},
    steps=2,
)
@instead_of("reference_logprobs")
def reference_is_policy(loop: Loop, before: Callable[[Rolled], Tensor], rolled: Rolled) -> Tensor:
    """The reference gets the policy's weights before every step: the KL term is always 0."""
    loop.reference.load_state_dict(loop.thinker.state_dict())
    return before(rolled)


@faults.add(
    "loss.undivided",
    "loops that call backward for every micro-batch",
    needs={"accumulation": 2},
    also=("step.accumulation",),
    accepted={"gradient": "the same gradient, seen one call later"},
)
@result_of("reduce")
def undivided(loop: Loop, loss: Tensor) -> Tensor:
    """The loss of every micro-batch is backpropagated whole instead of its share: steps are as many
    times too large as there are micro-batches."""
    return loss * loop.config.accumulation


@faults.add(
    "loss.padded-mean",
    "(loss * mask).mean() in loops that accumulate",
    needs={"accumulation": 2, "loss_type": "dapo"},
    silent="differs",  # exactly dr_grpo's where completions are padded to the cap
    also=("loss.normaliser",),
)
@instead_of("reduce")
def padded_mean(
    loop: Loop, before: object, per_token: Tensor, mask: Tensor, rolled: Sequence[Rolled]
) -> Tensor:
    """The masked loss of each micro-batch is averaged over all of its places, padding included: the
    mean of the step is a mean of means, and one long completion makes the others of its
    micro-batch count less."""
    return (per_token * mask).mean() / len(rolled)


# --------------------------------------------------------------------------- the model


@faults.add("logits.dropout", "attention_dropout or lora_dropout left on")
@contextmanager
def dropout(loop: Loop) -> Iterator[None]:
    """Dropout acts while completions are scored: scoring twice gives two answers, and ratios are
    noise."""
    with ExitStack() as stack:
        for module in text_model(loop).modules():
            if isinstance(getattr(module, "attention_dropout", None), float):
                stack.enter_context(patched(module, attention_dropout=0.2))
        yield


@faults.add(
    "gen.adapter-off",
    "rollout engines that load the base model only",
    needs={"lora": True, "learning_rate": 5e-2},
    steps=2,
    also=("gen.weights-stale",),
)
@instead_of("call_generate")
def adapter_off(
    loop: Loop, before: Callable[[dict[str, Any]], Tensor], keywords: dict[str, Any]
) -> Tensor:
    """Completions are sampled with the adapters off: the policy that learns never speaks."""
    with loop.model.disable_adapter():
        return before(keywords)


@faults.add(
    "logits.adapter-off",
    "a disable_adapter block that is closed one line too late",
    needs={"lora": True, "iterations": 2, "learning_rate": 5e-2},
    steps=2,
    accepted={"loss": "old logprobs are an input of the loss"},
)
@instead_of("logprobs")
def scored_without_adapter(
    loop: Loop, before: Callable[..., Tensor], model: Any, rolled: Rolled
) -> Tensor:
    """The logprobs before the update are those of the model without its adapters: once these have
    learnt, ratios compare the policy with its base, and are clipped from the start."""
    if torch.is_grad_enabled():
        return before(model, rolled)
    with loop.model.disable_adapter():
        return before(model, rolled)


@faults.add(
    "gen.copy-stale",
    "a copy of the model for generation that is never synced",
    needs={"learning_rate": 5e-3},
    steps=2,
    also=("gen.weights-stale",),
)
def copy_stale(loop: Loop) -> Manager:
    """Completions are sampled by a copy of the model made at the start: with every step they come
    from an older policy."""
    before, first = loop.call_generate, copy.deepcopy(loop.model).eval()

    def generate(keywords: dict[str, Any]) -> Tensor:
        with patched(loop, model=first):
            return before(keywords)

    return loop.replaced(call_generate=generate)


# --------------------------------------------------------------------------- the step


def _layer(loop: Loop) -> list[nn.Parameter]:
    return [p for p in text_model(loop).layers[LAYER].parameters() if p.grad is not None]


@faults.add("step.gradient-zeroed", "a hook of an earlier experiment")
@instead_of("update")
def gradient_zeroed(loop: Loop, before: Callable[[], None]) -> None:
    """The gradient of one layer is zeroed between backward and the optimizer's step."""
    for parameter in _layer(loop):
        parameter.grad.zero_()  # type: ignore[union-attr]
    before()


@faults.add("step.gradient-scaled", "layer-wise rates by a gradient hook")
@instead_of("update")
def gradient_scaled(loop: Loop, before: Callable[[], None]) -> None:
    """The gradient of one layer is multiplied by 10 between backward and the optimizer's step."""
    for parameter in _layer(loop):
        parameter.grad.mul_(10.0)  # type: ignore[union-attr]
    before()


def _rates(loop: Loop, groups: Sequence[dict[str, Any]]) -> AbstractContextManager[None]:
    return patched(loop, optimizer=torch.optim.AdamW(list(groups), lr=loop.config.learning_rate))


@faults.add("step.rate-zero", "warm-up ratios above 1, schedulers that have ended")
def rate_zero(loop: Loop) -> Manager:
    """The learning rate is 0: the loss is logged, gradients flow, and nothing changes."""
    return _rates(loop, [{"params": [p for p in loop.model.parameters() if p.requires_grad],
                          "lr": 0.0}])  # fmt: skip


@faults.add("step.group-rate-zero", "parameter groups by name patterns", also=("step.rate-zero",))
def group_rate_zero(loop: Loop) -> Manager:
    """One parameter group has learning rate 0: its layer never changes."""
    held = set(text_model(loop).layers[LAYER].parameters())
    learned = [p for p in loop.model.parameters() if p.requires_grad]
    return _rates(
        loop,
        [
            {"params": [p for p in learned if p not in held]},
            {"params": [p for p in learned if p in held], "lr": 0.0},
        ],
    )


@faults.add("step.not-zeroed", "zero_grad under a condition that is never met", steps=2)
@instead_of("update")
def not_zeroed(loop: Loop, before: Callable[[], None]) -> None:
    """Gradients are not zeroed after a step: each step repeats all earlier ones."""
    held = [(p, p.grad.clone()) for p in loop.model.parameters() if p.grad is not None]
    before()
    for parameter, gradient in held:
        parameter.grad = gradient
