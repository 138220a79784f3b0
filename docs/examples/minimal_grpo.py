"""The whole GRPO loop on one page, on the tiny omni checkpoint that ships with the package.

    python docs/examples/minimal_grpo.py [--steps 32] [--seed 0]

Questions about pictures, sounds and clips; G sampled completions a question; rewards for format and
answer; advantages within each group; one clipped policy-gradient update a rollout. The tiny policy
answers rightly at temperature 1; at temperature 2 most completions fall apart, which it unlearns
here. Left out: a reference model and more than one update a rollout; `omni-grpo train` has both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import fmean

import torch

from omni_grpo_core import (
    Accuracy,
    Format,
    LossConfig,
    Policy,
    Sample,
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

GROUP = 16  # G, completions a question
PROMPTS = 2  # questions a step
TEMPERATURE = 2.0
MAX_NEW_TOKENS = 48  # a right answer takes about 35
LEARNING_RATE = 7e-4
LOSS = LossConfig(loss_type="dapo", epsilon_low=0.2, epsilon_high=0.28)
REWARDS = (Format(), Accuracy())
ROWS = (0, 16, 18, 20, 3, 17, 19, 21)  # video, image, audio, text; video with audio beside it, …


def step(
    policy: Policy,
    samples: Sequence[Sample],
    settings: Settings,
    seed: int,
    optimizer: torch.optim.Optimizer | None = None,
) -> float:
    """The mean reward of one rollout; with an optimizer, one update on it."""
    # samples -> conversations -> chat template -> decoded media -> processor -> one padded batch
    inputs = prepare(policy, samples, settings)
    rolled = rollout(
        policy,
        inputs.batch,
        group_size=GROUP,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=TEMPERATURE,
        seed=seed,
    )

    # rewards by name, each with a reason; their mean is what a completion earns
    columns = score(REWARDS, inputs.prompts, samples, rolled).values()
    rewards = [fmean(one.value or 0.0 for one in row) for row in zip(*columns, strict=True)]
    if optimizer is None:
        return fmean(rewards)
    groups = [completion.group_id for completion in rolled.completions]
    advantages = group_advantages(rewards, groups, scale="group")

    # logprobs (N, C), with gradient, of the very tokens that were sampled
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


def main(steps: int, seed: int) -> None:
    folder = tiny.checkpoint_dir()
    policy, settings = load_policy(folder), load_settings(folder)
    policy.model.requires_grad_(True)
    rows = load_samples(tiny.data_file())
    samples = [rows[number] for number in ROWS]
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    before = step(policy, samples, settings, seed)
    for number in range(1, steps + 1):
        chosen = [samples[(number * PROMPTS + i) % len(samples)] for i in range(PROMPTS)]
        reward = step(policy, chosen, settings, seed + number, optimizer)
        print(f"step {number:3}  reward {reward:.3f}", flush=True)
    after = step(policy, samples, settings, seed)  # the same questions and draws as before
    print(f"reward {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.steps, options.seed)
