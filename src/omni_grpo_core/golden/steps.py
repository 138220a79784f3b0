"""GRPO steps as golden stages: ``completion.1``, ``reward.1``, … ``gradient.1``, ``completion.2``.

Every stage of a step is fed with what the golden holds of the stage before it (completions,
rewards, advantages), so that each is judged alone; what it makes itself is what is compared. The
optimizer is plain SGD: Adam divides by the size of a gradient, which makes a step of rounding
noise. The policy is sampled hot, so that one that is sure of itself still has something to learn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Protocol, TypedDict, TypeVar

import torch
from torch import Tensor

from omni_grpo_core.core.completions import pad_completions
from omni_grpo_core.core.forward import completion_logits, sampling_logprobs
from omni_grpo_core.core.policy import Policy, generating
from omni_grpo_core.core.rollout import draw_distance, draws, rollout
from omni_grpo_core.golden.generations import first_difference
from omni_grpo_core.golden.suite import Case
from omni_grpo_core.losses import LossConfig
from omni_grpo_core.losses.advantages import group_advantages
from omni_grpo_core.pipeline.inputs import score
from omni_grpo_core.pipeline.stages import GRAPH, REWARDS, Context, Values
from omni_grpo_core.training.step import (
    Alone,
    MicroBatch,
    Scorer,
    StepPlan,
    make_micro_batches,
    optimize,
)
from omni_grpo_core.types import Batch, Rollout, Score

T = TypeVar("T")
GROUP = 4
TEMPERATURE = 2.0
MOST_TOKENS = 32
LEARNING_RATE = 0.05
PLAN = StepPlan(
    LossConfig(beta=0.04, epsilon_low=0.2, epsilon_high=0.2),
    None,
    iterations=2,
    max_grad_norm=1.0,
    gradient_checkpointing=False,
)
STEP_STAGES = ("completion", "reward", "advantage", "loss", "gradient")
_UNKEPT = {"library", "sampled"}
_SPOKEN = {"scoring", "completion", "parsed", "reward"}
"""About what is said; a case with GRPO steps has those of its steps instead."""
DrawDistances = tuple[float | None, ...]
"""Of each completion, see :attr:`~omni_grpo_core.golden.generations.Sides.draw_distance`; ``None``
where no token differs, or one side had ended and drew nothing."""


class Golden(Protocol):
    """The golden's value of a stage; the fresh one where there is none."""

    def __call__(self, stage: str, fresh: T) -> T: ...


class StepAdvantages(TypedDict):
    """What a golden holds of a step's advantages, (N,) each."""

    values: tuple[float, ...]
    usable: Tensor


def stages_of(steps: int) -> tuple[str, ...]:
    """The pass's stages that a case with so many GRPO steps has goldens of.

    >>> "scoring" in stages_of(0), "scoring" in stages_of(1), "library" in stages_of(0)
    (True, False, False)
    """
    return tuple(name for name in GRAPH if name not in _UNKEPT | (_SPOKEN if steps else set()))


def step_names(steps: int) -> tuple[str, ...]:
    """
    >>> step_names(1)
    ('completion.1', 'reward.1', 'advantage.1', 'loss.1', 'gradient.1')
    """
    return tuple(f"{stage}.{n}" for n in range(1, steps + 1) for stage in STEP_STAGES)


def golden_stages(case: Case) -> tuple[str, ...]:
    """Names of all goldens of a case."""
    return (*stages_of(case.steps), *step_names(case.steps))


def grpo_steps(
    context: Context,
    values: Values,
    golden: Golden,
    on_draw_distances: Callable[[str, DrawDistances], None],
) -> Iterator[tuple[str, object]]:
    """Stage names and fresh values of the case's steps, in order. The policy is left as it was.

    ``on_draw_distances`` is told of the completions of a step that are not the golden's, under the
    policy that sampled them.
    """
    model = copy.deepcopy(context.policy.model).requires_grad_(True)
    policy = replace(context.policy, model=model)
    frozen = replace(context.policy, model=copy.deepcopy(model).requires_grad_(False).eval())
    scorer, reference = Scorer(policy, TEMPERATURE), Scorer(frozen, TEMPERATURE)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=LEARNING_RATE)
    batch = values["batch"]

    def score_reference(micro: MicroBatch) -> Tensor:
        with torch.no_grad():
            logprobs: Tensor = reference(micro.batch, micro.ids, micro.mask)[0]
        return logprobs

    for n in range(1, context.steps + 1):
        rolled = rollout(
            policy,
            batch,
            group_size=GROUP,
            max_new_tokens=MOST_TOKENS,
            temperature=TEMPERATURE,
            seed=n,
        )
        yield f"completion.{n}", rolled
        fresh, rolled = rolled, golden(f"completion.{n}", rolled)
        if rolled is not fresh:
            on_draw_distances(f"completion.{n}", _draw_distances(policy, batch, rolled, fresh))
        scores = score(REWARDS, values["text"], values["sample"], rolled)
        yield f"reward.{n}", scores
        scores = golden(f"reward.{n}", scores)
        groups = [completion.group_id for completion in rolled.completions]
        found = group_advantages(totals(scores), groups, "group")
        advantages: StepAdvantages = {
            "values": tuple(found.values.tolist()),
            "usable": found.usable,
        }
        yield f"advantage.{n}", advantages
        advantages = golden(f"advantage.{n}", advantages)
        window = make_micro_batches(
            policy,
            batch,
            rolled,
            torch.tensor(advantages["values"], dtype=torch.float64),
            advantages["usable"],
            len(rolled.completions),
        )
        updates = optimize(
            PLAN, Alone(), scorer, model, optimizer, window, reference=score_reference
        )
        tokens = sum(len(completion.token_ids) for completion in rolled.completions)
        yield (
            f"loss.{n}",
            {
                "tokens": tokens,
                **{
                    f"update_{i}": {"loss": update.loss, **told(update.metrics.values())}
                    for i, update in enumerate(updates)
                },
            },
        )
        yield f"gradient.{n}", {"norm": tuple(update.grad_norm for update in updates)}


def _draw_distances(policy: Policy, batch: Batch, was: Rollout, now: Rollout) -> DrawDistances:
    pairs = [
        (a.token_ids, b.token_ids) for a, b in zip(was.completions, now.completions, strict=False)
    ]
    found: list[float | None] = [None] * len(pairs)
    turned = {i: at for i, pair in enumerate(pairs) if (at := first_difference(*pair)) is not None}
    if not turned:
        return tuple(found)
    tokens = pad_completions(was.completions, policy.pad_token_id)
    with torch.no_grad(), generating(policy.model):
        logits = completion_logits(policy, batch, tokens.ids, tokens.mask.to(torch.int64))
        logprobs = sampling_logprobs(policy, logits, was.temperature).cpu()
    uniforms = torch.cat(
        [draws(was.seed, row.sample_id, was.group_size, MOST_TOKENS) for row in batch.rows]
    )
    for i, at in turned.items():
        if at < min(map(len, pairs[i])):
            # up to here both have the same past: the draw must lie by the slices of both tokens
            both = torch.tensor([side[at] for side in pairs[i]])
            found[i] = float(
                draw_distance(logprobs[i, at].expand(2, -1), uniforms[i, at], both).max()
            )
    return tuple(found)


def totals(scores: Mapping[str, Sequence[Score]]) -> list[float | None]:
    """The mean of a completion's rewards; ``None`` where one of them could not be scored.

    >>> totals({"format": [Score(1.0, "")], "accuracy": [Score(0.0, "")]})
    [0.5]
    """
    columns = zip(*scores.values(), strict=True)
    return [
        None if any(s.value is None for s in column) else fmean(float(s.value or 0) for s in column)
        for column in columns
    ]


def told(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Metrics that tell of the step; how far scoring is from sampling is rounding alone."""
    return {name: value for name, value in metrics.items() if not name.startswith("drift")}
