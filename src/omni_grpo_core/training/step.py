"""One optimizer step on micro-batches of a rollout: totals first, then backward and update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from omni_grpo_core.core.dialect import modes_restored, switch_checkpointing
from omni_grpo_core.core.forward import completion_logits
from omni_grpo_core.core.observers import observed
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.losses import LossConfig, RolloutCorrection
from omni_grpo_core.losses.logprobs import ScoredTokens, completion_logprobs
from omni_grpo_core.losses.metrics import Mean, Metrics, loss_metrics
from omni_grpo_core.losses.policy_loss import Totals, policy_loss, rollout_weights
from omni_grpo_core.losses.shapes import NotFiniteError
from omni_grpo_core.training.determinism import deterministic
from omni_grpo_core.training.exhausted import Stage
from omni_grpo_core.training.host_gradients import HostGradients
from omni_grpo_core.training.micro_batches import MicroBatch
from omni_grpo_core.training.sharding import zero_of_weights
from omni_grpo_core.types import Batch

T = TypeVar("T")


class Distributed(Protocol):
    """Collectives over a run's processes; each must call the same ones in the same order."""

    @property
    def world(self) -> int: ...

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""

    def agree(self, action: Callable[[], T], *, main_only: bool = False) -> T:
        """What ``action`` returns on the main process. Each process calls it or, with
        ``main_only``, only that one; all wait for one another. An error from input or machine on
        one is raised on all, so that none is left waiting."""

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, in rank order."""

    def sum(self, numbers: Tensor) -> Tensor:
        """Elementwise sum over all processes, int64."""

    def backward(self, loss: Tensor) -> None: ...

    def unsynced(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Gradients of backward passes inside stay on this process until one outside."""

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        """Scale the gradients to ``max_norm`` at most; returns their norm before."""


class SingleProcess:
    """One process, plain torch."""

    world = 1
    main = True

    def agree(self, action: Callable[[], T], *, main_only: bool = False) -> T:
        return action()

    def gather(self, items: Sequence[T]) -> list[T]:
        return list(items)

    def sum(self, numbers: Tensor) -> Tensor:
        return numbers

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def unsynced(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))


class Scores(Protocol):
    """A scoring forward: logprobs and entropy of completions, (N, C) each, G consecutive ones per
    row of ``batch``. ``ids``: int64, (N, C), right-padded; ``mask``: bool, (N, C)."""

    def __call__(
        self, batch: Batch, ids: Tensor, mask: Tensor, *, temperature: float
    ) -> ScoredTokens: ...


@observed("scoring")
def plain_scores(
    policy: Policy, batch: Batch, ids: Tensor, mask: Tensor, *, temperature: float
) -> ScoredTokens:
    """:class:`Scores` with a row for each completion, its prompt included."""
    logits = completion_logits(policy, batch, ids, mask.to(torch.int64))
    return completion_logprobs(
        logits,
        ids.to(policy.device),
        mask.to(policy.device),
        temperature=temperature,
        suppressed=policy.suppressed,
    )


class Scorer(nn.Module):
    """Everything a gradient passes through, as one module: towers, text model, head, log-softmax.

    Data-parallel wrappers synchronise only what goes through *their* forward, so the scoring
    forward has to be that of a module. ``scores``: the forward, by default the plain one.
    ``autocast``: what it runs under.
    """

    def __init__(
        self,
        policy: Policy,
        temperature: float,
        scores: Scores | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        self.model = policy.model
        self._scores = scores or partial(plain_scores, policy)
        self._temperature, self._autocast = temperature, autocast

    def forward(self, batch: Batch, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logprobs and entropy, as :class:`Scores` gives them."""
        with self._autocast():
            scored = self._scores(batch, ids, mask, temperature=self._temperature)
        return scored.logprobs + zero_of_weights(self), scored.entropy


@contextmanager
def scoring(model: nn.Module, *, checkpointing: bool) -> Iterator[None]:
    """Eval mode, so that scoring has no dropout that sampling had not; with ``checkpointing`` only
    the checkpointing blocks are in train mode, which transformers requires of them. All is restored
    on exit: no other forward is affected."""
    with modes_restored(model):
        model.eval()
        if checkpointing:
            switch_checkpointing(model, True)
            for module in model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.training = True
        yield


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What one optimizer step did. ``loss`` and ``metrics`` are over all processes; ``grad_norm``
    is before clipping. ``stepped``: whether the weights changed. ``broken``: values from which no
    loss can be computed; the loss is NaN then."""

    loss: float
    grad_norm: float
    metrics: Metrics
    stepped: bool
    broken: tuple[str, ...] = ()

    @property
    def finite(self) -> bool:
        """On all processes: a sum or a norm is finite only if every part of it is."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How a window of micro-batches becomes gradients and updates."""

    loss: LossConfig
    correction: RolloutCorrection | None
    iterations: int
    max_grad_norm: float
    gradient_checkpointing: bool
    full_determinism: bool = False


def optimize(
    plan: StepPlan,
    distributed: Distributed,
    scorer: nn.Module,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    window: Sequence[MicroBatch],
    *,
    reference: Callable[[MicroBatch], Tensor] | None = None,
    may_step: Callable[[Update], bool] = lambda update: True,
    set_rate: Callable[[int], None] = lambda iteration: None,
    stage: Callable[[Stage], AbstractContextManager[Any]] = nullcontext,
    host: HostGradients | None = None,
) -> tuple[Update, ...]:
    """``plan.iterations`` updates on one rollout.

    ``scorer`` is the prepared (wrapped) :class:`Scorer`, ``model`` the thinker inside. ``may_step``
    gets loss, gradient norm and metrics of every update before the weights change and may forbid
    it, which ends the updates; a non-finite one is never made, whatever it returns. ``set_rate`` is
    called with the iteration before its update, ``stage`` around each stage. ``host``: where the
    gradients are, if not on the device; of one process. A step in which no process has a token in
    the loss has no update at all.
    """
    totals = _step_totals(distributed, window)
    if totals.tokens == 0:
        return ()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with stage("reference"):
        reference_logprobs = [None if reference is None else reference(micro) for micro in window]
    old: list[Tensor] = []
    updates = []
    for iteration in range(plan.iterations):
        with stage("update"), deterministic(plan.full_determinism):
            own = _backward(
                plan, distributed, scorer, model, window, totals, old, reference_logprobs
            )
        parts = distributed.gather([own])
        if host is None:
            norm = distributed.clip(parameters, plan.max_grad_norm)
        else:
            norm = float(host.norm())
        update = Update(
            loss=sum(part.loss for part in parts),
            grad_norm=norm,
            metrics=Metrics.sum(part.metrics for part in parts),
            stepped=True,
            broken=tuple(text for part in parts for text in part.broken),
        )
        if not (may_step(update) and update.finite):
            optimizer.zero_grad()
            if host is not None:
                host.drop()
            updates.append(replace(update, stepped=False))
            break
        set_rate(iteration)
        with stage("optimizer"):
            if host is None:
                optimizer.step()
            else:
                host.step(optimizer, plan.max_grad_norm)
        optimizer.zero_grad()
        updates.append(update)
    return tuple(updates)


def _step_totals(distributed: Distributed, window: Sequence[MicroBatch]) -> Totals:
    own = Totals.sum(Totals.of(micro.in_loss) for micro in window)
    sequences, tokens = distributed.sum(torch.tensor([own.sequences, own.tokens])).tolist()
    return Totals(sequences, tokens)


@dataclass(frozen=True, slots=True, eq=False)
class _Share:
    """One process's part of an :class:`Update`."""

    loss: float
    metrics: Metrics
    broken: tuple[str, ...]


def _backward(
    plan: StepPlan,
    distributed: Distributed,
    scorer: nn.Module,
    model: nn.Module,
    window: Sequence[MicroBatch],
    totals: Totals,
    old: list[Tensor],
    reference: Sequence[Tensor | None],
) -> _Share:
    """Gradients of every micro-batch; fills ``old`` the first time. Raises ``ConfigError`` for rows
    that go through frozen towers only.

    Without a loss the gradient is NaN instead of an error: the other processes wait for this one's
    gradients, and the NaN is what stops them all.
    """
    first = not old
    loss = 0.0
    metrics = Metrics({}, {})
    broken = []
    for at, micro in enumerate(window):
        last = at == len(window) - 1
        with (
            nullcontext() if last else distributed.unsynced(scorer),
            scoring(model, checkpointing=plan.gradient_checkpointing),
        ):
            logprobs, entropy = scorer(micro.batch, micro.ids, micro.mask)
            device = logprobs.device
            sampled = micro.rollout_logprobs.to(device)
            mask, in_loss = micro.mask.to(device), micro.in_loss.to(device)
            if first:
                old.append(logprobs.detach())
                metrics += _drift(logprobs, sampled, mask)
            terms = {
                "logprobs": logprobs,
                "old_logprobs": old[at],
                "advantages": micro.advantages.to(device),
                "mask": in_loss,
                "ref_logprobs": reference[at],
            }
            weights = None
            try:
                if plan.correction is not None:
                    weights = rollout_weights(old[at], sampled, in_loss, plan.correction)
                    metrics += _correction(weights, old[at], sampled, in_loss)
                share = policy_loss(
                    plan.loss,
                    totals=totals,
                    rollout_weights=weights,
                    rollout_logprobs=sampled,
                    **terms,
                )
                metrics += loss_metrics(plan.loss, entropy=entropy, **terms)
            except NotFiniteError as error:
                broken.append(f"{error.item}: {error.got}")
                share = logprobs.sum() * math.nan
            if not share.requires_grad:
                raise ConfigError(
                    "freeze",
                    got="a micro-batch from which nothing learns",
                    want="every row to go through something that learns",
                    fix="freeze less, or leave out rows without that modality",
                )
            # data-parallel wrappers average the gradients of their processes: undo it
            distributed.backward(share * distributed.world)
        loss += float(share.detach())
    return _Share(loss, metrics, tuple(broken))


def _drift(logprobs: Tensor, sampled: Tensor, mask: Tensor) -> Metrics:
    """How far the trainer's logprobs are from those recorded in sampling, before any update."""
    gap = torch.where(mask, (logprobs.detach() - sampled).abs(), 0.0)
    mean = Mean(float(gap.sum()), int(mask.sum()))
    return Metrics({"drift": mean}, {"drift_max": float(gap.max())})


def _correction(weights: Tensor, old: Tensor, sampled: Tensor, in_loss: Tensor) -> Metrics:
    """The mean weight; ``mismatch_kl``: of the sampler's distribution to the trainer's, estimated
    by k1."""
    tokens = int(in_loss.sum())
    gap = torch.where(in_loss, sampled - old, 0.0)
    return Metrics(
        {
            "correction": Mean(float(weights[in_loss].sum()), tokens),
            "mismatch_kl": Mean(float(gap.sum()), tokens),
        },
        {},
    )
