"""Question -> what the model is trained or evaluated on, through the project's own stages.

Training, evaluation, check and GRPO see the same prompt text, decoded files, processor call and
positions, because all of them use this module or the stages it calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omni_grpo_core.core.batch import process_row, render
from omni_grpo_core.core.conversation import AudioPreference, build_conversation
from omni_grpo_core.core.media import load_media
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.tiny.clips import Clip, Split, combinations, write_mp4, write_png, write_wav
from omni_grpo_core.tiny.make import QWEN2_5, Make
from omni_grpo_core.tiny.questions import Carry, Question
from omni_grpo_core.types import Conversation, Media, MediaRef, Row, Sample

_PREFERENCE: dict[Carry, AudioPreference] = {
    "interleaved": "interleaved",
    "separate": "separate",
    "off": "off",
    "image": "auto",
    "audio": "auto",
    "text": "auto",
}


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A question with its decoded media, ready for the processor."""

    question: Question
    conversation: Conversation
    media: Media


def draw_clips(split: Split, count: int, *, seed: int) -> list[Clip]:
    """``count`` clips of a split, its combinations in equal shares; 8 of 10 last 1 s, one 2 s, one
    3 s. The splits' seeds do not overlap."""
    rng = np.random.default_rng([seed, len(split)])
    pool = combinations(split)
    first = {"train": 0, "select": 1_000_000, "held-out": 2_000_000}[split]
    seconds = rng.choice((1, 2, 3), size=count, p=(0.8, 0.1, 0.1))
    return [
        Clip(pool[i % len(pool)], seed=first + 100_000 * seed + i, seconds=int(seconds[i]))
        for i in range(count)
    ]


def make_example(question: Question, folder: Path, make: Make = QWEN2_5) -> Example:
    """Write the question's clip into ``folder`` (once) and decode it, at the size that ``make``
    sets."""
    clip, carry = question.clip, question.carry
    media: tuple[MediaRef, ...] = ()
    tracks: dict[str, bool] = {}
    if carry != "text":
        modality, suffix, write = {
            "image": ("image", "png", write_png),
            "audio": ("audio", "wav", write_wav),
        }.get(carry, ("video", "mp4", write_mp4))
        path = folder / f"{clip.seed}-{clip.seconds}.{suffix}"
        if not path.exists():
            write(clip, path)
        media = (MediaRef(modality, str(path)),)  # type: ignore[arg-type]
        tracks = {str(path): not clip.silent_film}
    sample = Sample(
        sample_id=f"{clip.seed}-{carry}-{question.topic}",
        question=question.text,
        problem_type="multiple choice",
        options=question.options,
        solution=question.completion,
        media=media,
        origin="synthetic",
    )
    conversation = build_conversation(sample, audio_in_video=_PREFERENCE[carry], tracks=tracks)
    decoded = load_media(conversation, make.media, patch_size=make.patch_size)
    return Example(question, conversation, decoded)


def make_row(example: Example, policy: Policy) -> Row:
    """The example's prompt through the policy's processor."""
    prompt = render(example.conversation, policy.processor)
    return process_row(prompt, example.conversation, example.media, policy.processor, policy.family)


def with_completion(row: Row, completion: Sequence[int]) -> Row:
    """The row with completion ids appended to its prompt."""
    ids: Tensor = torch.tensor(completion, dtype=row.input_ids.dtype)
    return replace(row, input_ids=torch.cat([row.input_ids, ids]))
