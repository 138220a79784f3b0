"""Faults between rewards and the optimizer: advantages, the loss, the step."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from omni_grpo_core.faults.fault import FaultRegistry
from omni_grpo_core.faults.fixtures import Drawn
from omni_grpo_core.faults.reference_loop import Notebook, ReferenceLoop, Rolled, StepOutcome
from omni_grpo_core.recorder.hooks import patched
from omni_grpo_core.trace.calls import AdvantageSeen

shelf = FaultRegistry()
Manager = AbstractContextManager[None]

AGAIN = {"iterations": 2, "learning_rate": 5e-3}
"""Ratios leave 1, and clipping and KL begin, with the second update on a rollout."""
PARTIAL = {"partial": True}
HELD = {"beta": 0.1, **AGAIN}


# --------------------------------------------------------------------------- advantage


@shelf.add(
    "adv.group-mixed",
    "Groups are formed by row order after a row was dropped: every group holds a completion of "
    "its neighbour.",
    "rewards.view(-1, G) after filtering",
)
def group_mixed(loop: ReferenceLoop) -> Manager:
    before = loop.group_ids

    def group_ids(drawn: list[Drawn]) -> list[str]:
        ids = before(drawn)
        return [*ids[1:], *ids[:1]] if len(ids) > len(loop.config.rows) else ids

    return loop.replaced(group_ids=group_ids)


@shelf.add(
    "adv.zero-variance",
    "Every reward has weight 0, because the names in the configuration match none: all groups are "
    "constant, the loss is 0 and nothing is raised.",
    "reward_weights read by name",
)
def zero_variance(loop: ReferenceLoop) -> Manager:
    return patched(loop, reward_weights=[0.0 for _ in loop.reward_weights])


@shelf.add(
    "adv.partial-unused",
    "The partial reward's advantage is computed and then left out of the tensor that goes into "
    "the loss.",
    "HumanOmniV2: the judge's advantage from the wrong tensor",
    needs=PARTIAL,
)
def partial_unused(loop: ReferenceLoop) -> Manager:
    before = loop.advantages

    def advantages(rewards: Tensor, drawn: list[Drawn], ids: Tensor, mask: Tensor) -> AdvantageSeen:
        seen = before(rewards, drawn, ids, mask)
        base = loop.normalise(seen.rewards, seen.group_ids)
        return replace(seen, advantages=base[:, None] * mask)

    return loop.replaced(advantages=advantages)


@shelf.add(
    "adv.span-mask",
    "The closing tag is looked for by hard-coded ids and not found; argmax gives 0, and the "
    "partial reward acts on all tokens from the first on.",
    "HumanOmniV2's tag masks",
    needs=PARTIAL,
)
def span_mask(loop: ReferenceLoop) -> Manager:
    return loop.replaced(partial_spans=lambda ids, mask: mask.clone())


@shelf.add(
    "adv.broadcast",
    "Advantages of shape (N,) meet token losses of shape (N, C) without an axis of their own: "
    "tokens get other rows' advantages, and only N = 1 comes out right.",
    "trainers tested with one completion",
)
def broadcast(loop: ReferenceLoop) -> Manager:
    before = loop.rollout

    def rollout(micro: int, notebook: Notebook | None) -> Rolled:
        rolled = before(micro, notebook)
        rows, columns = rolled.ids.shape
        if rolled.advantages.dim() == 1:
            rolled.advantages = rolled.advantages.repeat(columns).view(rows, columns)
        return rolled

    return loop.replaced(rollout=rollout)


@shelf.add(
    "adv.batch-scale",
    "Rewards are compared with the mean and deviation of the whole batch where groups are asked "
    "for: easy questions are rewarded, hard ones punished.",
    "REINFORCE code reused for GRPO",
)
def batch_scale(loop: ReferenceLoop) -> Manager:
    before = loop.normalise
    return loop.replaced(normalise=lambda rewards, groups: before(rewards, [""] * len(groups)))


# --------------------------------------------------------------------------- loss


@shelf.add(
    "loss.shift",
    "Logits and labels are off by one: each token is scored by the logits after it.",
    "hand-written log-probabilities",
)
def shift(loop: ReferenceLoop) -> Manager:
    return loop.replaced(completion_logits=lambda logits, length: logits[:, -length:])


@shelf.add(
    "loss.prompt-included",
    "The prompt's tokens are in the loss as well.",
    "labels made from the whole sequence",
)
def prompt_included(loop: ReferenceLoop) -> Manager:
    before, scoring = loop.learn, loop.scoring_inputs

    def learn(one: Rolled, rolled: Sequence[Rolled], notebook: Notebook | None) -> float:
        told = scoring(one)
        ids, mask = told["input_ids"][:, 1:], told["attention_mask"][:, 1:].bool()
        with loop.replaced(
            scoring_inputs=lambda _: told,
            completion_logits=lambda logits, length: logits[:, :-1],
            log_softmax=lambda logits: (logits.float() / loop.config.temperature).log_softmax(-1),
        ):
            return before(replace(one, ids=ids, mask=mask), rolled, notebook)

    return loop.replaced(learn=learn)


@shelf.add(
    "loss.after-eos",
    "Tokens after the end of a completion are in the loss.",
    "masks made from the cap",
)
def after_eos(loop: ReferenceLoop) -> Manager:
    return loop.replaced(loss_mask=lambda rolled: torch.ones_like(rolled.mask))


@shelf.add(
    "loss.normaliser",
    "The token mean is taken over each micro-batch: the loss depends on how a step is cut up.",
    "TRL issues on gradient accumulation",
    needs={"accumulation": 2, "loss_type": "dapo"},
)
def normaliser(loop: ReferenceLoop) -> Manager:
    def reduce(per_token: Tensor, mask: Tensor, rolled: Sequence[Rolled]) -> Tensor:
        return (per_token * mask).sum() / mask.sum() / len(rolled)

    return loop.replaced(reduce=reduce)


def _told(
    loop: ReferenceLoop, change: Callable[[Tensor, dict[str, float], Tensor, Rolled], Any]
) -> Manager:
    before = loop.token_loss

    def token_loss(logprobs: Tensor, rolled: Rolled) -> tuple[Tensor, dict[str, float]]:
        loss, metrics = before(logprobs, rolled)
        changed: tuple[Tensor, dict[str, float]] = change(loss, metrics, logprobs, rolled)
        return changed

    return loop.replaced(token_loss=token_loss)


@shelf.add(
    "loss.clip-side",
    "The clip ratio that is logged counts the tokens that are not clipped: below the range where "
    "the advantage is positive, above it where it is negative.",
    "TRL before it counted by side",
    needs=AGAIN,
)
def clip_side(loop: ReferenceLoop) -> Manager:
    def other_side(
        loss: Tensor, metrics: dict[str, float], logprobs: Tensor, rolled: Rolled
    ) -> Any:
        old = logprobs.detach() if rolled.old is None else rolled.old
        ratio = torch.exp(logprobs.detach() - old)
        advantages = rolled.advantages
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        low, high = 1 - loop.config.epsilon, 1 + loop.config.epsilon
        counted = ((ratio < low) & (advantages > 0)) | ((ratio > high) & (advantages < 0))
        share = float((counted & rolled.mask).sum() / rolled.mask.sum())
        return loss, {**metrics, "clip_ratio": share}

    return _told(loop, other_side)


@shelf.add(
    "loss.kl-sign",
    "The KL term is subtracted from a loss that is minimised: the policy is driven away from its "
    "reference.",
    "hand-written losses",
    needs=HELD,
)
def kl_sign(loop: ReferenceLoop) -> Manager:
    def subtracted(
        loss: Tensor, metrics: dict[str, float], logprobs: Tensor, rolled: Rolled
    ) -> Any:
        if rolled.reference is None:
            return loss, metrics
        return loss - 2 * loop.config.beta * loop.kl(logprobs, rolled.reference), metrics

    return _told(loop, subtracted)


@shelf.add(
    "loss.hidden-beta",
    "A KL term is in the loss although the settings say beta 0: the default of an inner function.",
    "open-r1-multimodal's beta",
    needs=HELD,
)
def hidden_beta(loop: ReferenceLoop) -> Manager:
    before = loop.settings
    return loop.replaced(settings=lambda: {**before(), "beta": 0.0})


@shelf.add(
    "loss.sign",
    "The loss has the sign of the objective: what was rewarded is made rarer.",
    "hand-written losses",
    # in grpo's mean of means the advantages of a group cancel, and 0 has no sign
    needs={"loss_type": "dapo"},
)
def sign(loop: ReferenceLoop) -> Manager:
    def negated(loss: Tensor, metrics: dict[str, float], logprobs: Tensor, rolled: Rolled) -> Any:
        return -loss, metrics

    return _told(loop, negated)


@shelf.add(
    "loss.old-recomputed",
    "On a second pass over a rollout the old log-probabilities are the current ones: the ratio is "
    "always 1 and nothing is ever clipped.",
    "open-r1-multimodal with num_iterations above 1",
    needs=AGAIN,
)
def old_recomputed(loop: ReferenceLoop) -> Manager:
    before = loop.learn

    def learn(one: Rolled, rolled: Sequence[Rolled], notebook: Notebook | None) -> float:
        return before(replace(one, old=None), rolled, notebook)

    return loop.replaced(learn=learn)


# --------------------------------------------------------------------------- step


@shelf.add(
    "step.detached",
    "The loss was detached on the way, and requires_grad_() made the error go away: backward runs "
    "and reaches nothing.",
    "answers to 'element 0 of tensors does not require grad'",
)
def detached(loop: ReferenceLoop) -> Manager:
    before = loop.backward
    return loop.replaced(backward=lambda loss: before(loss.detach().requires_grad_()))


@shelf.add(
    "step.frozen-wrong",
    "The text model is frozen and the towers are trained: the freezing went by the wrong prefix.",
    "freeze_vision_modules on renamed modules",
)
@contextmanager
def frozen_wrong(loop: ReferenceLoop) -> Iterator[None]:
    before = {p: p.requires_grad for p in loop.model.parameters()}
    for name, parameter in loop.model.named_parameters():
        parameter.requires_grad_("visual." in name or "audio_tower." in name)
    try:
        with patched(loop, optimizer=loop.make_optimizer()):
            yield
    finally:
        for parameter, learns in before.items():
            parameter.requires_grad_(learns)


@shelf.add(
    "step.not-updated",
    "The optimizer was made before the model was wrapped or moved and holds other parameters: "
    "the loss is logged, the model never changes.",
    "optimizers made before prepare()",
)
@contextmanager
def not_updated(loop: ReferenceLoop) -> Iterator[None]:
    earlier = copy.deepcopy(loop.model)
    held = [p for p in earlier.parameters() if p.requires_grad]
    for parameter in held:
        parameter.grad = torch.zeros_like(parameter)
    with patched(loop, optimizer=torch.optim.AdamW(held, lr=loop.config.learning_rate)):
        yield


@shelf.add(
    "step.accumulation",
    "The loss is divided for four micro-batches, and the optimizer steps after two.",
    "accumulation set in two places",
    needs={"accumulation": 2},
)
def accumulation(loop: ReferenceLoop) -> Manager:
    reduce, settings = loop.reduce, loop.settings
    return loop.replaced(
        reduce=lambda per_token, mask, rolled: reduce(per_token, mask, rolled) / 2,
        settings=lambda: {**settings(), "gradient_accumulation_steps": 4},
    )


@shelf.add(
    "step.resume",
    "A resumed run begins anew: optimizer state, random state and place in the data are lost, and "
    "the same rows are trained on again.",
    "checkpoints without optimizer and sampler",
    steps=2,
)
def resume(loop: ReferenceLoop) -> Manager:
    before = loop.step

    def step(notebook: Notebook | None = None) -> StepOutcome:
        outcome = before(notebook)
        loop.steps_done = 0
        loop.optimizer = loop.make_optimizer()
        return outcome

    return loop.replaced(step=step)


@shelf.add(
    "step.reentrant-checkpointing",
    "Adapters, frozen embeddings and re-entrant checkpointing: no input of a block requires a "
    "gradient, so none comes out, with a warning only.",
    "PEFT and transformers issues: None of the inputs have requires_grad=True",
    needs={"lora": True, "checkpointing": True},
)
@contextmanager
def reentrant_checkpointing(loop: ReferenceLoop) -> Iterator[None]:
    before = loop.backward

    def backward(loss: Tensor) -> None:
        # trainers go on where the loss has no gradient at all; torch would raise
        if loss.requires_grad:
            before(loss)

    reentrant = partial(checkpoint, use_reentrant=True)
    with ExitStack() as stack:
        stack.enter_context(loop.replaced(backward=backward))
        for module in loop.thinker.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                stack.enter_context(patched(module, _gradient_checkpointing_func=reentrant))
            # recent versions hook the embeddings, on some ways in, so that inputs require gradients
            if module._forward_hooks:
                stack.enter_context(patched(module, _forward_hooks=OrderedDict()))
        yield


@shelf.add(
    "step.nan-gradient",
    "An entropy that is only logged meets the minus infinity of suppressed tokens: the loss is "
    "finite, every gradient is NaN.",
    "0 times infinity behind a mask",
)
def nan_gradient(loop: ReferenceLoop) -> Manager:
    before = loop.log_softmax

    def log_softmax(logits: Tensor) -> Tensor:
        logprobs = before(logits)
        entropy = -(logprobs.exp() * logprobs).nansum(-1, keepdim=True)
        return logprobs + 0 * entropy

    return loop.replaced(log_softmax=log_softmax)
