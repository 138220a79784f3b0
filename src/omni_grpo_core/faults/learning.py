"""Faults between rewards and the optimizer: advantages, the loss, the step."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from omni_grpo_core.faults.fault import FaultRegistry, Manager, instead_of, result_of
from omni_grpo_core.faults.seams import Loop, Rolled, StepOutcome
from omni_grpo_core.recorder.hooks import patched
from omni_grpo_core.trace.calls import AdvantageSeen

faults = FaultRegistry()
Logged = tuple[Tensor, dict[str, float]]
"""A loss, (N, C), and the metrics logged with it."""

AGAIN = {"iterations": 2, "learning_rate": 5e-3}
"""The second update on a rollout: only then do ratios leave 1 and clipping and KL act."""
PARTIAL = {"partial": True}
HELD = {"beta": 0.1, **AGAIN}
ONE_SIGN = "at the gradient, the advantage's sign and the loss's are one"


# --------------------------------------------------------------------------- advantage


@faults.add("adv.group-mixed", "rewards.view(-1, G) after filtering")
@result_of("group_ids")
def group_mixed(loop: Loop, ids: list[str]) -> list[str]:
    """Groups are formed by row order after a row was dropped: every group holds a completion of the
    next one."""
    return [*ids[1:], *ids[:1]] if len(ids) > len(loop.config.rows) else ids


@faults.add("adv.zero-variance", "reward_weights read by name")
def zero_variance(loop: Loop) -> Manager:
    """Every reward has weight 0 because no name in the configuration matches: all groups are
    constant, the loss is 0 and nothing is raised."""
    return patched(loop, reward_weights=[0.0 for _ in loop.reward_weights])


# two lines alone see the weights of a sum of all rewards, which is GRPO
@faults.add(
    "adv.partial-unused",
    "HumanOmniV2: the judge's advantage from the wrong tensor",
    needs=PARTIAL,
    noted=True,
)
@instead_of("advantages")
def partial_unused(loop: Loop, before: Callable[..., AdvantageSeen], *given: Any) -> AdvantageSeen:
    """The partial reward's advantage is computed but left out of the tensor that the loss uses."""
    seen, mask = before(*given), given[-1]
    base = loop.normalise(seen.rewards, seen.group_ids)
    return replace(seen, advantages=base[:, None] * mask)


# nor is it anything else than GDPO's sum of rewards that were normalised one by one
@faults.add("adv.span-mask", "HumanOmniV2's tag masks", needs=PARTIAL, noted=True)
@instead_of("partial_spans")
def span_mask(loop: Loop, before: object, ids: Tensor, mask: Tensor) -> Tensor:
    """The closing tag is searched for by hard-coded ids and not found; argmax returns 0, and the
    partial reward acts on all tokens."""
    return mask.clone()


@faults.add("adv.broadcast", "trainers tested with one completion")
@result_of("rollout")
def broadcast(loop: Loop, rolled: list[Rolled]) -> list[Rolled]:
    """Advantages of shape (N,) are multiplied with token losses of shape (N, C) without a new axis:
    tokens get other rows' advantages, and only N = 1 is right."""
    for one in rolled:
        rows, columns = one.ids.shape
        if one.advantages.dim() == 1:
            one.advantages = one.advantages.repeat(columns).view(rows, columns)
    return rolled


# REINFORCE with the batch's mean as its baseline, as REINFORCE++'s, where no settings ask for GRPO
@faults.add("adv.batch-scale", "REINFORCE code reused for GRPO", silent="differs")
@instead_of("normalise")
def batch_scale(
    loop: Loop, before: Callable[..., Tensor], rewards: Tensor, groups: Sequence[str]
) -> Tensor:
    """Rewards are normalised over the whole batch instead of each group: easy questions are
    rewarded and hard ones punished."""
    return before(rewards, [""] * len(groups))


# --------------------------------------------------------------------------- loss


@faults.add("loss.shift", "hand-written log-probabilities")
@instead_of("completion_logits")
def shift(loop: Loop, before: object, logits: Tensor, length: int) -> Tensor:
    """Logits and labels are off by one: each token is scored by the logits after it."""
    return logits[:, -length:]


@faults.add("loss.prompt-included", "labels made from the whole sequence")
@instead_of("learn")
def prompt_included(loop: Loop, before: Callable[..., float], one: Rolled, *more: Any) -> float:
    """The prompt's tokens are included in the loss."""
    inputs = loop.scoring_inputs(one)
    ids, mask = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:].bool()
    with loop.replaced(
        scoring_inputs=lambda _: inputs,
        completion_logits=lambda logits, length: logits[:, :-1],
        log_softmax=lambda logits: (logits.float() / loop.config.temperature).log_softmax(-1),
    ):
        return before(replace(one, ids=ids, mask=mask, old=None, reference=None), *more)


# where a loop sets logprobs behind the end to 0, their tokens count in the divisor alone
@faults.add("loss.after-eos", "masks made from the cap", also=("loss.padded-mean",))
@result_of("loss_mask")
def after_eos(loop: Loop, mask: Tensor) -> Tensor:
    """Tokens after the end of a completion are included in the loss."""
    return torch.ones_like(mask)


@faults.add(
    "loss.normaliser",
    "TRL issues on gradient accumulation",
    needs={"accumulation": 2, "loss_type": "dapo"},
    silent="differs",  # exactly TRL's bnpo
)
@instead_of("reduce")
def normaliser(
    loop: Loop, before: object, per_token: Tensor, mask: Tensor, rolled: Sequence[Rolled]
) -> Tensor:
    """The token mean is taken per micro-batch: the loss depends on how a step is split."""
    return (per_token * mask).sum() / mask.sum() / len(rolled)


@faults.add("loss.clip-side", "TRL before it counted by side", needs=AGAIN, noted=True)
@instead_of("clipped")
def clip_side(
    loop: Loop, before: Callable[..., Tensor], ratio: Tensor, advantages: Tensor
) -> Tensor:
    """The logged clip ratio counts tokens that are not clipped: below the range with a positive
    advantage, above it with a negative one."""
    return before(ratio, -advantages)


@faults.add("loss.kl-sign", "hand-written losses", needs=HELD)
@instead_of("token_loss")
def kl_sign(loop: Loop, before: Callable[..., Logged], logprobs: Tensor, rolled: Rolled) -> Logged:
    """The KL term is subtracted from a loss that is minimised: the policy is pushed away from its
    reference."""
    loss, metrics = before(logprobs, rolled)
    if rolled.reference is not None:
        loss = loss - 2 * loop.config.beta * loop.kl(logprobs, rolled.reference)
    return loss, metrics


@faults.add("loss.hidden-beta", "open-r1-multimodal's beta", needs=HELD, noted=True)
@result_of("settings")
def hidden_beta(loop: Loop, settings: dict[str, Any]) -> dict[str, Any]:
    """The loss has a KL term although the settings have beta 0: an inner function has its own
    default."""
    return {**settings, "beta": 0.0}


# in the mean of means of the grpo loss a group's advantages cancel, and 0 has no sign
@faults.add(
    "loss.sign",
    "hand-written losses",
    needs={"loss_type": "dapo"},
    also=("adv.negated",),
    accepted={"advantage": ONE_SIGN},
)
@result_of("token_loss")
def sign(loop: Loop, logged: Logged) -> Logged:
    """The loss has the sign of the objective: rewarded completions become less likely."""
    loss, metrics = logged
    return -loss, metrics


@faults.add("loss.old-recomputed", "open-r1-multimodal with num_iterations above 1", needs=AGAIN)
@instead_of("learn")
def old_recomputed(loop: Loop, before: Callable[..., float], one: Rolled, *more: Any) -> float:
    """On a second pass over a rollout the current logprobs are used as the old ones: the ratio is
    always 1 and nothing is ever clipped."""
    return before(replace(one, old=None), *more)


# --------------------------------------------------------------------------- step


@faults.add("step.detached", "answers to 'element 0 of tensors does not require grad'")
@instead_of("backward")
def detached(loop: Loop, before: Callable[[Tensor], None], loss: Tensor) -> None:
    """The loss was detached, and requires_grad_() silenced the error: backward runs and reaches no
    parameter."""
    before(loss.detach().requires_grad_())


@faults.add("step.frozen-wrong", "freeze_vision_modules on renamed modules")
@contextmanager
def frozen_wrong(loop: Loop) -> Iterator[None]:
    """The text model is frozen and the towers are trained: modules were frozen by the wrong
    prefix."""
    before = {p: p.requires_grad for p in loop.model.parameters()}
    for name, parameter in loop.model.named_parameters():
        parameter.requires_grad_("visual." in name or "audio_tower." in name)
    try:
        with patched(loop, optimizer=loop.make_optimizer()):
            yield
    finally:
        for parameter, learns in before.items():
            parameter.requires_grad_(learns)


@faults.add("step.not-updated", "optimizers made before prepare()")
@contextmanager
def not_updated(loop: Loop) -> Iterator[None]:
    """The optimizer was created before the model was wrapped or moved and holds other parameters:
    the loss is logged, but the model never changes."""
    earlier = copy.deepcopy(loop.model)
    held = [p for p in earlier.parameters() if p.requires_grad]
    for parameter in held:
        parameter.grad = torch.zeros_like(parameter)
    with patched(loop, optimizer=torch.optim.AdamW(held, lr=loop.config.learning_rate)):
        yield


@faults.add("step.accumulation", "accumulation set in two places", needs={"accumulation": 2})
def accumulation(loop: Loop) -> Manager:
    """The loss is divided by four micro-batches, but the optimizer steps after two."""
    reduce, settings = loop.reduce, loop.settings
    return loop.replaced(
        reduce=lambda per_token, mask, rolled: reduce(per_token, mask, rolled) / 2,
        settings=lambda: {**settings(), "gradient_accumulation_steps": 4},
    )


@faults.add("step.resume", "checkpoints without optimizer and sampler", steps=2)
@result_of("step")
def resume(loop: Loop, outcome: StepOutcome) -> StepOutcome:
    """A resumed run starts over: optimizer state, random state and position in the data are lost,
    and the same rows are trained on again."""
    loop.steps_done = 0
    loop.optimizer = loop.make_optimizer()
    return outcome


@faults.add(
    "step.reentrant-checkpointing",
    "PEFT and transformers issues: None of the inputs have requires_grad=True",
    needs={"lora": True, "checkpointing": True},
)
@contextmanager
def reentrant_checkpointing(loop: Loop) -> Iterator[None]:
    """With adapters, frozen embeddings and re-entrant checkpointing, no input of a block requires a
    gradient: there are no gradients, and only a warning."""
    before = loop.backward

    def backward(loss: Tensor) -> None:
        # trainers continue when the loss has no gradient at all; torch would raise
        if loss.requires_grad:
            before(loss)

    reentrant = partial(checkpoint, use_reentrant=True)
    with ExitStack() as stack:
        stack.enter_context(loop.replaced(backward=backward))
        for module in loop.thinker.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                stack.enter_context(patched(module, _gradient_checkpointing_func=reentrant))
            # recent versions sometimes hook the embeddings so that inputs require gradients
            if module._forward_hooks:
                stack.enter_context(patched(module, _forward_hooks=OrderedDict()))
        yield


@faults.add("step.nan-gradient", "0 times infinity behind a mask")
@result_of("log_softmax")
def nan_gradient(loop: Loop, logprobs: Tensor) -> Tensor:
    """An entropy that is only logged includes the minus infinity of suppressed tokens: the loss is
    finite, but every gradient is NaN."""
    entropy = -(logprobs.exp() * logprobs).nansum(-1, keepdim=True)
    return logprobs + 0 * entropy
