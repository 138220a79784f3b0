"""From samples to the batch, and from texts to scores: plain functions."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omni_grpo_core._version import __version__
from omni_grpo_core.core.batch import collate, process_row, render, require_positions
from omni_grpo_core.core.conversation import build_conversation
from omni_grpo_core.core.media import decoder_version, load_media, probe
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.rewards import Reward, columns_of
from omni_grpo_core.types import Batch, Conversation, Media, Prompt, Rollout, Sample, Score


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What the model is given for some samples, stage by stage."""

    samples: tuple[Sample, ...]
    conversations: tuple[Conversation, ...]
    prompts: tuple[Prompt, ...]
    media: tuple[Media, ...]
    batch: Batch


def converse(samples: Sequence[Sample], settings: Settings) -> tuple[Conversation, ...]:
    """Conversations of samples; every video file is probed once for an audio track."""
    paths = {ref.path for s in samples for ref in s.media if ref.modality == "video"}
    tracks = {path: probe(path).has_audio for path in sorted(paths)}
    return tuple(
        build_conversation(sample, audio_in_video=settings.audio_in_video, tracks=tracks)
        for sample in samples
    )


def render_all(policy: Policy, conversations: Sequence[Conversation]) -> tuple[Prompt, ...]:
    """The prompts of conversations, by the checkpoint's chat template."""
    return tuple(render(c, policy.processor) for c in conversations)


def load_all(
    policy: Policy, conversations: Sequence[Conversation], settings: Settings
) -> tuple[Media, ...]:
    """The media of conversations, sized by the settings and the checkpoint's patches."""
    size = policy.patch_size
    return tuple(load_media(c, settings.media, patch_size=size) for c in conversations)


def make_batch(
    policy: Policy,
    prompts: Sequence[Prompt],
    conversations: Sequence[Conversation],
    media: Sequence[Media],
    settings: Settings,
) -> Batch:
    """Row by row through the processor, then collated."""
    rows = [
        process_row(
            prompt,
            conversation,
            clip,
            policy.processor,
            policy.family,
            max_length=settings.max_prompt_length,
        )
        for prompt, conversation, clip in zip(prompts, conversations, media, strict=True)
    ]
    for row in rows:
        require_positions(row, settings.max_new_tokens, policy.max_positions)
    return collate(rows, policy.pad_token_id)


def prepare(policy: Policy, samples: Sequence[Sample], settings: Settings) -> Inputs:
    """Everything up to the batch, without checks: for training and measurements."""
    conversations = converse(samples, settings)
    prompts = render_all(policy, conversations)
    media = load_all(policy, conversations, settings)
    batch = make_batch(policy, prompts, conversations, media, settings)
    return Inputs(tuple(samples), conversations, prompts, media, batch)


def reward_arguments(
    prompts: Sequence[Prompt], samples: Sequence[Sample], rolled: Rollout
) -> tuple[list[str], list[str], dict[str, list[Any]]]:
    """What a reward function is called with: prompt and text of every completion, and the columns
    of its sample."""
    of = {s.sample_id: (s, p.text) for s, p in zip(samples, prompts, strict=True)}
    owners = [of[completion.group_id] for completion in rolled.completions]
    texts = [completion.text for completion in rolled.completions]
    return [text for _, text in owners], texts, columns_of(sample for sample, _ in owners)


def score(
    rewards: Iterable[Reward],
    prompts: Sequence[Prompt],
    samples: Sequence[Sample],
    rolled: Rollout,
) -> dict[str, tuple[Score, ...]]:
    """Every reward of every completion, with reasons, by the reward's name."""
    asked, texts, columns = reward_arguments(prompts, samples, rolled)
    return {reward.__name__: tuple(reward.explain(asked, texts, **columns)) for reward in rewards}


def header(policy: Policy, settings: Settings) -> dict[str, str]:
    """What a pass runs with: everything that could change its result."""
    names = ("torch", "torchvision", "transformers", "qwen-omni-utils")
    return {
        **{name: version(name) for name in names},
        "omni-grpo-core": __version__,
        "python": platform.python_version(),
        "decoder": decoder_version(),
        "checkpoint": Path(policy.checkpoint).name,
        "family": policy.family.name,
        "device": policy.device.type,
        "dtype": str(policy.model.dtype).removeprefix("torch."),
        "settings": repr(settings),
    }
