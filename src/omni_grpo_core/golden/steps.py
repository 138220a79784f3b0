"""GRPO steps as golden stages: ``completion.1``, ``reward.1``, … ``gradient.1``, ``completion.2``.

The input of every stage of a step is the golden's value of the stage before it (completions,
rewards, advantages), so that each is judged by itself; its own output is compared. The optimizer
is plain SGD: Adam divides by the size of a gradient, which turns rounding noise into a full step.
Sampling uses a high temperature, so that a policy with sharp distributions still learns.
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
from omni_grpo_core.training.micro_batches import MicroBatch, make_micro_batches
from omni_grpo_core.training.step import Scorer, SingleProcess, StepPlan, optimize
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
_NOT_STORED = {"library", "sampled"}
_FROM_COMPLETIONS = {"scoring", "completion", "parsed", "reward"}
"""A case with GRPO steps has those of its steps instead."""
DrawDistances = tuple[float | None, ...]
"""Per completion, see :attr:`~omni_grpo_core.golden.generations.Sides.draw_distance`; ``None`` if
no token differs, or one side had already ended."""


class Golden(Protocol):
    """The golden's value of a stage; the fresh one if there is none."""

    def __call__(self, stage: str, fresh: T) -> T: ...


class StepAdvantages(TypedDict):
    """What a golden stores of a step's advantages, (N,) each."""

    values: tuple[float, ...]
    usable: Tensor


def stages_of(steps: int) -> tuple[str, ...]:
    """The stages of the pass that a case with this many GRPO steps has goldens of.

    >>> "scoring" in stages_of(0), "scoring" in stages_of(1), "library" in stages_of(0)
    (True, False, False)
    """
    skipped = _NOT_STORED | (_FROM_COMPLETIONS if steps else set())
    return tuple(name for name in GRAPH if name not in skipped)


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
    """Stage names and fresh values of the case's steps, in order. The policy is left unchanged.

    ``on_draw_distances`` is called for a step whose completions differ from the golden's, with
    distances under the policy that sampled them.
    """
    model = copy.deepcopy(context.policy.model).requires_grad_(True)
    policy = replace(context.policy, model=model)
    frozen = replace(context.policy, model=copy.deepcopy(model).requires_grad_(False).eval())
    scorer, reference = Scorer(policy, TEMPERATURE), Scorer(frozen, TEMPERATURE)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=LEARNING_RATE)
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
            PLAN, SingleProcess(), scorer, model, optimizer, window, reference=score_reference
        )
        tokens = sum(len(completion.token_ids) for completion in rolled.completions)
        yield (
            f"loss.{n}",
            {
                "tokens": tokens,
                **{
                    f"update_{i}": {"loss": update.loss, **step_metrics(update.metrics.values())}
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
    differing = {i: j for i, pair in enumerate(pairs) if (j := first_difference(*pair)) is not None}
    if not differing:
        return tuple(found)
    tokens = pad_completions(was.completions, policy.pad_token_id)
    with torch.no_grad(), generating(policy.model):
        logits = completion_logits(policy, batch, tokens.ids, tokens.mask.to(torch.int64))
        logprobs = sampling_logprobs(policy, logits, was.temperature).cpu()
    uniforms = torch.cat(
        [draws(was.seed, row.sample_id, was.group_size, MOST_TOKENS) for row in batch.rows]
    )
    for i, at in differing.items():
        if at < min(map(len, pairs[i])):
            # both share the same prefix up to here: the draw must lie near both tokens' slices
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


def step_metrics(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Without the drift between scoring and sampling, which is rounding alone."""
    return {name: value for name, value in metrics.items() if not name.startswith("drift")}
