"""Every check of a stage can fail: each is given the fault that it is meant to find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from omni_grpo_core.core.batch import check_batch, collate
from omni_grpo_core.core.forward import LibraryForward, embed, library_forward, positions, prefill
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.pipeline.checks import (
    check_completions,
    check_embeddings,
    check_logits,
    check_media,
    check_parsed,
    check_positions,
    check_rewards,
    check_samples,
    check_text,
)
from omni_grpo_core.pipeline.inputs import Inputs
from omni_grpo_core.rewards import Reward, RewardRow
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.types import Batch, Check, Logits, Malformed, Rollout, Sample, Score


def failed(checks: Sequence[Check]) -> list[str]:
    return [check.name for check in checks if not check.ok]


@pytest.fixture(scope="module")
def library(policy: Policy, mixed: Batch) -> list[LibraryForward]:
    return [library_forward(policy, row) for row in mixed.rows]


def test_samples(samples: tuple[Sample, ...]) -> None:
    assert failed(check_samples(samples)) == []
    assert failed(check_samples([samples[0], samples[0]])) == ["ids unique"]
    tagless = replace(samples[0], solution="A")
    assert failed(check_samples([tagless])) == ["gold answers tagged"]
    # context or think may be missing: such golds were reported as untagged
    for solution in (
        "<think>t</think><answer>A</answer>",
        "<context>c</context><answer>A</answer>",
    ):
        assert failed(check_samples([replace(samples[0], solution=solution)])) == []
    gone = replace(samples[0], media=(replace(samples[0].media[0], path="/gone.mp4"),))
    assert failed(check_samples([gone])) == ["media files there"]


def test_text(policy: Policy, inputs: Inputs) -> None:
    assert failed(check_text(inputs.conversations, inputs.prompts, policy.processor)) == []
    typo = [
        replace(p, text=p.text.replace("<|im_start|>assistant", "<|im_start|>assitant"))
        for p in inputs.prompts
    ]
    assert failed(check_text(inputs.conversations, typo, policy.processor)) == [
        "equals reference rendering",
        "generation prompt",
    ]
    mute = [replace(p, placeholders={**p.placeholders, "audio": 0}) for p in inputs.prompts]
    assert failed(check_text(inputs.conversations, mute, policy.processor)) == [
        "one placeholder per medium"
    ]


def test_media(inputs: Inputs) -> None:
    assert failed(check_media(inputs.media)) == []
    clip = inputs.media[0]
    black = replace(
        clip, videos=tuple(replace(v, frames=torch.zeros_like(v.frames)) for v in clip.videos)
    )
    assert failed(check_media([black])) == ["pictures not blank"]
    assert failed(check_media([black, clip])) == [], "one black clip may be in the data"
    mute = replace(
        clip, audios=tuple(replace(a, samples=torch.zeros_like(a.samples)) for a in clip.audios)
    )
    assert failed(check_media([mute])) == ["sounds not silent"]


def test_batch(policy: Policy, inputs: Inputs) -> None:
    def names(batch: Batch) -> list[str]:
        return failed(
            check_batch(batch, inputs.conversations, inputs.media, policy.processor, policy.family)
        )

    batch = inputs.batch
    assert names(batch) == []
    backwards = replace(batch, rows=batch.rows[::-1])
    assert "prompts == samples" in names(backwards)
    right = replace(batch, attention_mask=batch.attention_mask.flip(1))
    assert names(right) == ["left padding"]
    assert names(replace(batch, attention_mask=batch.attention_mask.bool().int())) == [
        "ids and mask int64"
    ]
    first = batch.rows[0]
    slow = {**first.tensors, "video_second_per_grid": torch.tensor([2.0])}
    unpassed = replace(batch, rows=(replace(first, tensors=slow), *batch.rows[1:]))
    assert names(unpassed) == ["sampled frame rate passed on"]
    extra = {**first.tensors}
    extra["feature_attention_mask"] = torch.ones_like(extra["feature_attention_mask"])
    shifted = replace(batch, rows=(replace(first, tensors=extra), *batch.rows[1:]))
    assert names(shifted) == ["placeholders == features"]
    other = replace(first, audio_in_video="off")
    assert names(replace(batch, rows=(other, *batch.rows[1:]))) == ["audio-in-video as decided"]


@torch.no_grad()
def test_embeddings(policy: Policy, mixed: Batch, library: list[LibraryForward]) -> None:
    made = embed(policy, mixed)
    assert failed(check_embeddings(policy, mixed, made, library)) == []
    raw = policy.model.get_input_embeddings()(mixed.input_ids)
    assert failed(check_embeddings(policy, mixed, replace(made, inputs_embeds=raw), library)) == [
        "placeholders hold tower features",
        "equal transformers' forward, row by row",
    ]
    broken = made.inputs_embeds.clone()
    broken[0, -1, 0] = torch.nan
    assert "finite" in failed(
        check_embeddings(policy, mixed, replace(made, inputs_embeds=broken), library)
    )


def test_positions(policy: Policy, mixed: Batch, library: list[LibraryForward]) -> None:
    made = positions(policy, mixed)
    assert failed(check_positions(policy, mixed, made, library)) == []
    flat = made.position_ids.clone()
    flat[0] = flat[0, :, :1]  # the time axis constant
    assert failed(check_positions(policy, mixed, replace(made, position_ids=flat), library)) == [
        "equal transformers' own, row by row",
        "video time true to the clip",
    ]


@torch.no_grad()
def test_logits(policy: Policy, mixed: Batch, library: list[LibraryForward]) -> None:
    values = prefill(policy, mixed).logits.values
    assert failed(check_logits(Logits(values), library)) == []
    assert failed(check_logits(Logits(values.roll(1, 0)), library)) == [
        "row in the batch = row alone in transformers"
    ]
    assert "finite" in failed(check_logits(Logits(values / 0), library))


@torch.no_grad()
def test_logits_of_a_bfloat16_model_have_its_tolerance(
    policy: Policy, mixed: Batch, library: list[LibraryForward]
) -> None:
    """They are passed on as float32, and were compared with its tolerance: a healthy bfloat16
    model, off by 0.04 on its first CUDA device, failed the check."""
    values = prefill(policy, mixed).logits.values + 0.04
    assert failed(check_logits(Logits(values), library, torch.bfloat16)) == []
    assert failed(check_logits(Logits(values), library)) != []
    assert failed(check_logits(Logits(values + 1), library, torch.bfloat16)) != []


@pytest.fixture(scope="module")
def rollouts(policy: Policy, mixed: Batch) -> tuple[Rollout, Rollout]:
    few = collate(mixed.rows[:2], policy.pad_token_id)
    return (
        rollout(policy, few, group_size=1, max_new_tokens=64, temperature=0.0),
        rollout(policy, few, group_size=2, max_new_tokens=64),
    )


def test_completions(policy: Policy, mixed: Batch, rollouts: tuple[Rollout, Rollout]) -> None:
    batch = collate(mixed.rows[:2], policy.pad_token_id)
    greedy, sampled = rollouts
    assert failed(check_completions(policy, batch, greedy, sampled)) == []
    system = policy.processor.tokenizer.encode("the")[0]
    garbage = tuple(
        replace(c, token_ids=(system,) * 64, text="the" * 64, finish_reason="length")
        for c in greedy.completions
    )
    assert failed(
        check_completions(policy, batch, replace(greedy, completions=garbage), sampled)
    ) == ["greedy not degenerate", "greedy completions end", "greedy = transformers' generate"]
    hot = replace(sampled, temperature=2.0)  # sampled at 1, scored at 2
    assert failed(check_completions(policy, batch, greedy, hot)) == [
        "logprobs: sampling with cache = scoring without"
    ]


def test_parsed() -> None:
    torn = (Malformed("no <context>", 0),)
    assert failed(check_parsed(torn, 0.5)) == ["well-formed"]
    assert failed(check_parsed(torn, 0.0)) == []


class PaysADefault(Reward):
    """The incident's people-focus reward: 0.10 for anything."""

    def score(self, row: RewardRow) -> Score:
        return Score(0.1, "default")


def test_rewards(samples: tuple[Sample, ...]) -> None:
    scores = {"accuracy": (Score(1.0, "right"), Score(0.0, "wrong"))}
    assert failed(check_rewards(scores, (Format(),), samples, 0.5)) == []
    assert failed(check_rewards(scores, (Format(),), samples, 0.6)) == ["accuracy"]
    assert failed(check_rewards(scores, (PaysADefault("people"),), samples, 0.0)) == [
        "garbage earns nothing"
    ]
    unscored = {"accuracy": (Score(None, "judge down"),)}
    assert failed(check_rewards(unscored, (Format(),), samples, 0.0)) == ["every completion scored"]
