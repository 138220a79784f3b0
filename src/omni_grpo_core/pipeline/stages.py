"""The good path: samples through every stage, each value kept and checked -> Trace."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch

from omni_grpo_core._version import __version__
from omni_grpo_core.core.batch import (
    check_batch,
    collate,
    process_row,
    render,
    require_positions,
)
from omni_grpo_core.core.conversation import build_conversation, check_conversation
from omni_grpo_core.core.forward import LibraryForward, embed, library_forward, positions, prefill
from omni_grpo_core.core.media import decoder_version, load_media, probe
from omni_grpo_core.core.policy import Policy, generating
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.errors import CheckpointError
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
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.base import Reward
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.types import (
    Batch,
    Check,
    Conversation,
    Media,
    Prompt,
    Rollout,
    Sample,
    Score,
    Stage,
    StageRecord,
    Trace,
)

T = TypeVar("T")
Edit = Callable[[tuple[Media, ...]], tuple[Media, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What the model is given for some samples, stage by stage."""

    samples: tuple[Sample, ...]
    conversations: tuple[Conversation, ...]
    prompts: tuple[Prompt, ...]
    media: tuple[Media, ...]
    batch: Batch


def converse(samples: Sequence[Sample], settings: Settings) -> tuple[Conversation, ...]:
    """Conversations of samples; every video file is asked once whether it has an audio track."""
    paths = {ref.path for s in samples for ref in s.media if ref.modality == "video"}
    tracks = {path: probe(path).has_audio for path in sorted(paths)}
    return tuple(
        build_conversation(sample, audio_in_video=settings.audio_in_video, tracks=tracks)
        for sample in samples
    )


def load_all(
    policy: Policy, conversations: Sequence[Conversation], settings: Settings
) -> tuple[Media, ...]:
    """The media of conversations, as large as the settings ask and the checkpoint's patches fit."""
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
    """Everything up to the batch, without checks: for training and measuring."""
    conversations = converse(samples, settings)
    prompts = tuple(render(c, policy.processor) for c in conversations)
    media = load_all(policy, conversations, settings)
    batch = make_batch(policy, prompts, conversations, media, settings)
    return Inputs(tuple(samples), conversations, prompts, media, batch)


def score(
    rewards: Iterable[Reward], inputs_prompts: Sequence[Prompt], samples: Sequence[Sample],
    rolled: Rollout,
) -> dict[str, tuple[Score, ...]]:  # fmt: skip
    """Every reward of every completion, with reasons, by the reward's name."""
    of = {s.sample_id: (s, p.text) for s, p in zip(samples, inputs_prompts, strict=True)}
    owners = [of[completion.group_id] for completion in rolled.completions]
    columns = {
        "problem_type": [sample.problem_type for sample, _ in owners],
        "options": [list(sample.options) for sample, _ in owners],
        "solution": [sample.solution for sample, _ in owners],
        "sample_id": [sample.sample_id for sample, _ in owners],
    }
    prompts = [prompt for _, prompt in owners]
    texts = [completion.text for completion in rolled.completions]
    return {reward.__name__: tuple(reward.explain(prompts, texts, **columns)) for reward in rewards}


@torch.no_grad()
def run(
    policy: Policy,
    samples: Sequence[Sample],
    settings: Settings,
    *,
    on_stage: Callable[[Stage], None] = lambda stage: None,
) -> Trace:
    """Every stage on ``samples``, its value and its checks: greedy first, then sampled groups.

    ``on_stage`` is told each stage before it runs (for a progress display).
    """
    records: list[StageRecord] = []

    def stage(name: Stage, make: Callable[[], T], check: Callable[[T], tuple[Check, ...]]) -> T:
        on_stage(name)
        begin = time.perf_counter()
        value = make()
        checks = check(value)
        records.append(StageRecord(name, value, checks, time.perf_counter() - begin))
        return value

    samples = stage("sample", lambda: tuple(samples), check_samples)
    conversations = stage(
        "conversation",
        lambda: converse(samples, settings),
        lambda made: _merged(check_conversation(s, c) for s, c in zip(samples, made, strict=True)),
    )
    prompts = stage(
        "text",
        lambda: tuple(render(c, policy.processor) for c in conversations),
        lambda made: check_text(conversations, made, policy.processor),
    )
    media = stage(
        "media",
        lambda: load_all(policy, conversations, settings),
        check_media,
    )
    batch = stage(
        "batch",
        lambda: make_batch(policy, prompts, conversations, media, settings),
        lambda made: check_batch(made, conversations, media, policy.processor, policy.family),
    )
    with generating(policy.model):
        library = _library(policy, batch)
        stage(
            "embeddings",
            lambda: embed(policy, batch),
            lambda made: check_embeddings(policy, batch, made, library),
        )
        stage(
            "positions",
            lambda: positions(policy, batch),
            lambda made: check_positions(policy, batch, made, library),
        )
        stage(
            "logits",
            lambda: prefill(policy, batch).logits,
            lambda made: check_logits(made, library, policy.model.dtype),
        )
        greedy, _ = stage(
            "completion",
            lambda: (
                rollout(
                    policy,
                    batch,
                    group_size=1,
                    max_new_tokens=settings.max_new_tokens,
                    temperature=0.0,
                ),
                rollout(
                    policy,
                    batch,
                    group_size=settings.group_size,
                    max_new_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    seed=settings.seed,
                ),
            ),
            lambda made: check_completions(policy, batch, made[0], made[1]),
        )
    stage(
        "parsed",
        lambda: tuple(parse(completion.text) for completion in greedy.completions),
        lambda made: check_parsed(made, settings.min_format),
    )
    rewards = (Format(), Accuracy())
    stage(
        "reward",
        lambda: score(rewards, prompts, samples, greedy),
        lambda made: check_rewards(made, rewards, samples, settings.min_accuracy),
    )
    return Trace(header(policy, settings), tuple(records))


def _library(policy: Policy, batch: Batch) -> list[LibraryForward]:
    """transformers' own forward of each row. It is the first, and what a config makes it raise is
    the checkpoint's fault."""
    found = []
    for row in batch.rows:
        try:
            found.append(library_forward(policy, row))
        except Exception as error:
            if isinstance(error, MemoryError) or "memory" in str(error):
                raise
            raise CheckpointError(
                f"forward of sample {row.sample_id}",
                got=f"{type(error).__name__} in transformers: {' '.join(str(error).split())[:300]}",
                want="a model that takes what its processor makes",
                fix="use config and processor of the base checkpoint, and a supported version of "
                "transformers",
            ) from error
    return found


def header(policy: Policy, settings: Settings) -> dict[str, str]:
    """Under what a pass runs: what could make it come out otherwise."""
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


def _merged(rows: Iterable[tuple[Check, ...]]) -> tuple[Check, ...]:
    """Checks of many rows as one each: failed if one fails, telling the first that did."""
    merged: dict[str, Check] = {}
    count = 0
    for checks in rows:
        count += 1
        for check in checks:
            if merged.get(check.name, check).ok:
                merged[check.name] = check
    return tuple(
        check if not check.ok else Check(check.name, True, f"{count} rows")
        for check in merged.values()
    )
