"""Loss and gradient norm of one update on given completions: in bfloat16 processes would sample
others, since rounding moves draws from one token to another. Also a program, run as a launcher
runs ``omni-grpo train``::

    python tests/same_completions.py run.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from omni_grpo_core.core.policy import load_policy
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.pipeline.inputs import prepare
from omni_grpo_core.training.config import TrainConfig
from omni_grpo_core.training.distributed import AccelerateDistributed, make_accelerator
from omni_grpo_core.training.load_config import load_train_config
from omni_grpo_core.training.micro_batches import MicroBatch, make_micro_batches
from omni_grpo_core.training.optimizers import make_optimizer
from omni_grpo_core.training.placement import share_of
from omni_grpo_core.training.sharding import gathered, initialise_root
from omni_grpo_core.training.step import Scorer, StepPlan, Update, optimize
from omni_grpo_core.training.trainable import choose_trainable


def update(config: TrainConfig) -> None:
    """Writes ``update.json`` into the folder of the run. Every process samples its own part with
    float32 weights."""
    settings = config.settings
    accelerator = make_accelerator(config)
    distributed = AccelerateDistributed(accelerator)
    share = share_of(
        config.prompts, settings.group_size, distributed.world, accelerator.process_index
    )
    policy = load_policy(config.checkpoint, device=str(accelerator.device))
    samples = load_samples(config.data)
    batch = prepare(policy, [samples[at] for at in share.prompts], settings).batch
    count = len(share.completions)
    rolled = rollout(
        policy, batch, group_size=count, first=share.completions.start,
        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, seed=1,
    )  # fmt: skip
    reference = choose_trainable(policy, config, accelerator.autocast)
    learning = [p for p in policy.model.parameters() if p.requires_grad]
    scorer, optimizer = accelerator.prepare(
        Scorer(policy, settings.temperature, autocast=accelerator.autocast),
        make_optimizer(config, learning),
    )
    initialise_root(scorer)
    advantages = torch.linspace(1, -1, settings.group_size, dtype=torch.float64)
    own: Tensor = advantages[share.completions.start : share.completions.stop]
    window = make_micro_batches(
        policy, batch, rolled, own.repeat(len(share.prompts)),
        torch.ones(len(rolled.completions), dtype=torch.bool), config.micro_batch_size,
        most=share.most,
    )  # fmt: skip
    found: list[Update] = []

    def scored(micro: MicroBatch) -> Tensor:
        assert reference is not None
        with gathered(scorer):
            return reference(micro)

    def stop(made: Update) -> bool:
        found.append(made)
        return False

    optimize(
        StepPlan(config.loss, None, 1, 1e9, gradient_checkpointing=config.gradient_checkpointing),
        distributed, scorer, policy.model, optimizer, window,
        reference=scored if reference else None,
        may_step=stop,
    )  # fmt: skip
    if distributed.main:
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        numbers = {"loss": found[0].loss, "grad_norm": found[0].grad_norm}
        (out / "update.json").write_text(json.dumps(numbers))
    accelerator.wait_for_everyone()


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    update(load_train_config(Path(sys.argv[1]))[0])


if __name__ == "__main__":
    main()
