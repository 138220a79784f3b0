"""Faults between two calls: what the next one gets is not what the one before it made."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.faults.batch import PADDED
from omni_grpo_core.faults.fault import (
    ONE_PROMPT,
    FaultRegistry,
    Injection,
    Manager,
    instead_of,
    result_of,
)
from omni_grpo_core.faults.fixtures import Drawn, rows_of
from omni_grpo_core.faults.seams import Loop, Rolled

faults = FaultRegistry()
Inputs = dict[str, Tensor]
FRAMES = "pixel_values_videos"
UNEQUAL = {"audio": "off", "rows": (12, 7)}
"""Clips of different length, so that their grids differ."""

# --------------------------------------------------------------------------- to generate


@faults.add("batch.resized", "trainers that cap pixels after the processor")
@result_of("expand")
def resized(loop: Loop, inputs: Inputs) -> Inputs:
    """Pixels are resized after the grid was computed: patches of the same number show half the
    detail."""
    patches = inputs[FRAMES]
    pairs = patches.float().view(-1, 2, patches.shape[1]).mean(1)
    return {**inputs, FRAMES: pairs.repeat_interleave(2, dim=0).to(patches.dtype)}


@faults.add("batch.times", "feature extractors written twice: the mel scale is applied again")
@result_of("expand")
def scaled(loop: Loop, inputs: Inputs) -> Inputs:
    """Mel features are doubled on their way from the processor to the model."""
    return {**inputs, "input_features": inputs["input_features"] * 2}


@faults.add("batch.channels-swapped", "images converted to BGR after normalisation")
@result_of("expand")
def channels_swapped(loop: Loop, inputs: Inputs) -> Inputs:
    """Red and blue are exchanged in the patches that the processor made."""
    patches = inputs[FRAMES]
    return {**inputs, FRAMES: patches.view(len(patches), 3, -1).flip(1).flatten(1)}


@faults.add("batch.seconds", "frame rates applied by the processor and again by the trainer")
@result_of("expand")
def seconds(loop: Loop, inputs: Inputs) -> Inputs:
    """The seconds between frames are doubled after the processor: the clip seems twice as long."""
    name = "video_second_per_grid"
    return {**inputs, name: torch.as_tensor(inputs[name]) * 2}


@faults.add(
    "batch.rows-exchanged",
    "collators that sort ids by length and leave media as they are",
    lacking=ONE_PROMPT,
)
@result_of("expand")
def rows_exchanged(loop: Loop, inputs: Inputs) -> Inputs:
    """The ids of two prompts are exchanged between processor and generate, their media are not:
    questions are asked about other clips, and answers credited to other rows."""
    size = loop.config.group_size
    return {**inputs, **{k: inputs[k].roll(size, 0) for k in ("input_ids", "attention_mask")}}


@faults.add(
    "batch.grids-exchanged",
    "collators that put pixels and grids into separate dictionaries",
    needs=UNEQUAL,
    lacking=ONE_PROMPT,
)
@result_of("expand")
def grids_exchanged(loop: Loop, inputs: Inputs) -> Inputs:
    """The grids of two prompts are exchanged, their pixels are not: the patches of a long clip and
    of a short one are cut in the wrong place."""
    size = loop.config.group_size
    return {**inputs, "video_grid_thw": inputs["video_grid_thw"].roll(size, 0)}


@faults.add("batch.stale", "buffers filled before they are read", steps=2)
def stale(loop: Loop) -> Manager:
    """The processor's output of the step before is handed on once more: the first step is right,
    and each later one trains on old questions with new golds."""
    before, kept = loop.expand, list[Inputs]()
    place, step = 0, 0

    def expand(inputs: Inputs) -> Inputs:
        nonlocal place, step
        place = place + 1 if loop.steps_done == step else 1
        step = loop.steps_done
        made = before(inputs)
        if not step:
            kept.append(made)
        return dict(kept[place - 1]) if step else made

    return loop.replaced(expand=expand)


@faults.add(
    "batch.mask-of-ones",
    "generate called with ids and media only",
    needs=PADDED,
    lacking=ONE_PROMPT,
    also=("batch.mask-ignored",),
)
@instead_of("generate")
def mask_of_ones(loop: Loop, before: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    """Generate alone gets an attention mask of ones, so padding is attended to while sampling and
    not while scoring."""
    return before({**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])})


# --------------------------------------------------------------------------- to scoring


@faults.add(
    "media.video-not-scored",
    "TRL 1.16: pixel_values_videos are not among the keys that its buffer keeps",
    also=("media.video-dropped",),
)
@result_of("scoring_inputs")
def video_not_scored(loop: Loop, inputs: dict[str, Any]) -> dict[str, Any]:
    """Clips reach generate and not the scoring forward: completions are scored by a model that
    sees nothing."""
    return {name: value for name, value in inputs.items() if name != FRAMES}


@faults.add(
    "media.stale-in-scoring",
    "caches of vision features keyed by position",
    lacking=ONE_PROMPT,
    also=("media.exchanged-in-scoring",),
)
@result_of("scoring_inputs")
def scored_with_others(loop: Loop, inputs: dict[str, Any]) -> dict[str, Any]:
    """Completions are scored with the clips of other rows than they were sampled with."""
    return {**inputs, FRAMES: inputs[FRAMES].roll(len(inputs[FRAMES]) // 2, 0)}


# --------------------------------------------------------------------------- to rewards


@faults.add("gen.other-tokenizer", "a base model's tokenizer beside a tuned checkpoint")
@instead_of("decode")
def other_tokenizer(loop: Loop, before: object, ids: Tensor, mask: Tensor) -> list[str]:
    """Completions are decoded by a tokenizer with another order of tokens: rewards read what the
    policy never wrote."""
    tokens = loop.policy.suppressed.shape[0]
    kept = zip((ids + 7) % tokens, mask, strict=True)
    return [loop.policy.decode(row[counted].tolist()) for row, counted in kept]


@faults.add("gen.text-cut", "logging helpers that shorten text in place")
@result_of("decode")
def text_cut(loop: Loop, texts: list[str]) -> list[str]:
    """Texts are cut after 40 characters before they are scored: the answer at the end is gone."""
    return [text[:40] for text in texts]


def _scored_texts(change: Callable[[list[str], list[str]], list[str]]) -> Injection:
    """Rewards get other texts: a function of prompts and completions."""

    @instead_of("score")
    @wraps(change)
    def score(
        loop: Loop,
        before: Callable[..., Tensor],
        prompts: list[str],
        texts: list[str],
        drawn: list[Drawn],
    ) -> Tensor:
        return before(prompts, change(prompts, texts), drawn)

    return score


@faults.add("reward.prompt-inside", "decoding the whole sequence that generate returns")
@_scored_texts
def prompt_inside(prompts: list[str], texts: list[str]) -> list[str]:
    """Rewards get prompt and completion as one text: the format is never met, or always."""
    return [p + t for p, t in zip(prompts, texts, strict=True)]


@faults.add("reward.specials-kept", "decoding with skip_special_tokens=False")
@_scored_texts
def specials_kept(prompts: list[str], texts: list[str]) -> list[str]:
    """Rewards get texts with the eos and the padding after it: a strict reward pays none of
    them."""
    return [f"{text}<|im_end|><|endoftext|>" for text in texts]


@faults.add(
    "reward.rolled", "generators consumed once before they are zipped", also=("reward.by-position",)
)
@_scored_texts
def rolled_texts(prompts: list[str], texts: list[str]) -> list[str]:
    """Each completion is scored in the place of the one before it: rewards go to other rows."""
    return [*texts[1:], *texts[:1]]


@faults.add(
    "reward.golds-shifted",
    "data sets filtered after the prompts were made",
    also=("reward.by-position",),
)
@result_of("columns")
def golds_shifted(loop: Loop, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The golds are those of the next question: right answers earn nothing."""
    size = loop.config.group_size
    return {name: [*values[size:], *values[:size]] for name, values in columns.items()}


@faults.add(
    "reward.other-gold",
    "gold lists that are shuffled apart from the questions",
    noted=True,
    also=("reward.by-position",),
)
@result_of("columns")
def other_gold(loop: Loop, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Each completion is compared with the gold of another row; every other column is its own."""
    size, golds = loop.config.group_size, columns["solution"]
    return {**columns, "solution": [*golds[size:], *golds[:size]]}


@faults.add(
    "reward.gold-by-question",
    "golds kept in a dictionary by question",
    noted=True,
    needs={"rows": (1, 5)},  # one question about two clips
)
@instead_of("columns")
def gold_by_question(
    loop: Loop, before: Callable[[list[Drawn]], dict[str, list[Any]]], drawn: list[Drawn]
) -> dict[str, list[Any]]:
    """Golds are looked up by the question's text: rows that ask the same of other clips are all
    compared with the last one's."""
    golds = {one.row["problem"]: one.row["solution"] for one in rows_of()}
    return {**before(drawn), "solution": [golds[one.row["problem"]] for one in drawn]}


@faults.add("adv.rewards-rolled", "rewards gathered as workers end", also=("adv.rolled",))
@result_of("score")
def rewards_rolled(loop: Loop, rewards: Tensor) -> Tensor:
    """Rewards come back in another order than they were asked for: every completion is paid for
    its neighbour."""
    return rewards.roll(1, 0)


def _rolled(one: Rolled) -> Rolled:
    one.advantages = one.advantages.roll(1, 0)
    return one


@faults.add("adv.rolled", "advantages kept in a deque beside the rows")
@result_of("rollout")
def advantages_rolled(loop: Loop, rolled: list[Rolled]) -> list[Rolled]:
    """Advantages are one row off the completions that they belong to."""
    return [_rolled(one) for one in rolled]
