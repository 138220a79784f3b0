"""The whole GRPO loop on one page, on the tiny omni checkpoint that ships with the package.

    python docs/examples/minimal_grpo.py [--steps 12] [--seed 0]

Questions about clips with picture and sound; G completions a question, sampled hot; rewards for the
format and the answer; advantages within each group; one clipped policy-gradient update a rollout.
The tiny policy answers rightly when it is cold. At temperature 2 it errs, and that is what it
unlearns here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import fmean

import torch

from omni_grpo_core import (
    LossConfig,
    Policy,
    Scorer,
    Settings,
    Totals,
    group_advantages,
    load_policy,
    load_samples,
    load_settings,
    policy_loss,
    prepare,
    rollout,
    score,
    stack_completions,
    tiny,
)
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.types import Sample

GROUP = 8
PROMPTS = 4
TEMPERATURE = 2.0
LOSS = LossConfig(loss_type="dapo", epsilon_low=0.2, epsilon_high=0.28)
REWARDS = (Format(), Accuracy())


def step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Sample],
    settings: Settings,
    seed: int,
) -> float:
    """One rollout and one update on it; the mean reward before the update."""
    # samples -> conversations -> chat template -> decoded media -> processor -> one padded batch
    inputs = prepare(policy, samples, settings)
    rolled = rollout(
        policy,
        inputs.batch,
        group_size=GROUP,
        max_new_tokens=settings.max_new_tokens,
        temperature=TEMPERATURE,
        seed=seed,
    )

    # rewards by name, each with a reason; their mean is what a completion earns
    columns = score(REWARDS, inputs.prompts, samples, rolled).values()
    rewards = [fmean(one.value or 0.0 for one in row) for row in zip(*columns, strict=True)]
    groups = [completion.group_id for completion in rolled.completions]
    advantages = group_advantages(rewards, groups, scale="group")

    # logprobs of the very tokens that were sampled, (N, C), with gradient
    tokens = stack_completions(
        rolled.completions, pad_id=policy.pad_token_id, eos_ids=policy.eos_token_ids
    )
    logprobs, _ = Scorer(policy, TEMPERATURE)(inputs.batch, tokens.ids, tokens.mask)
    mask = tokens.mask & advantages.usable[:, None]
    loss = policy_loss(
        LOSS,
        logprobs=logprobs,
        old_logprobs=logprobs.detach(),  # one update a rollout: the sampling policy is this one
        advantages=advantages.values,
        mask=mask,
        totals=Totals.of(mask),
    )
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return fmean(rewards)


def main(steps: int, seed: int) -> list[float]:
    """The mean reward of every step."""
    folder = tiny.checkpoint_dir()
    policy, settings = load_policy(folder), load_settings(folder)
    policy.model.requires_grad_(True)
    samples = load_samples(tiny.data_file())
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=3e-4, weight_decay=0.0)
    rewards = []
    for number in range(steps):
        at = number * PROMPTS
        chosen = [samples[(at + i) % len(samples)] for i in range(PROMPTS)]
        rewards.append(step(policy, optimizer, chosen, settings, seed + number))
        print(f"step {number:3}  reward {rewards[-1]:.3f}", flush=True)
    return rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.steps, options.seed)
