"""What every path is given: the same rows, conversations, texts and decoded media."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_grpo_core.core.batch import chat_messages, process_row, render
from omni_grpo_core.core.conversation import interleaves
from omni_grpo_core.core.media import load_media
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.core.weightless import load_weightless
from omni_grpo_core.pipeline.inputs import converse
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.types import Conversation, Media, Prompt, Row, Sample


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """What a path runs with. ``policy`` has a processor, and of the model at most its config."""

    checkpoint: Path
    policy: Policy
    settings: Settings

    @property
    def processor(self) -> Any:
        return self.policy.processor


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """One row. ``prompt`` and ``media``: as the reference renders and decodes them."""

    sample: Sample
    conversation: Conversation
    prompt: Prompt
    media: Media

    @property
    def interleaved(self) -> bool:
        """Whether the track of some video belongs inside it: libraries have one flag for all."""
        decided = self.conversation.audio_in_video
        return any(interleaves(decided, video) for video in range(len(self.media.videos)))

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates take it, each medium as its path; a new copy, because
        libraries write into it."""
        return chat_messages(self.conversation)


def setup_of(checkpoint: Path, settings: Settings, *, processor: Path | None = None) -> Setup:
    """Raises :class:`~omni_grpo_core.errors.CheckpointError` for a folder without a processor."""
    return Setup(checkpoint, load_weightless(checkpoint, processor=processor), settings)


def given_rows(setup: Setup, samples: Sequence[Sample]) -> Iterator[Given]:
    """Each sample up to its decoded media; one at a time, because frames are large."""
    for sample, conversation in zip(samples, converse(samples, setup.settings), strict=True):
        yield Given(
            sample,
            conversation,
            render(conversation, setup.processor),
            load_media(conversation, setup.settings.media, patch_size=setup.policy.patch_size),
        )


def row_reader(setup: Setup, samples: Sequence[Sample]) -> Callable[[int], Given | None]:
    """Reads a single row again, by its number; ``None`` where there is none."""

    def read(number: int) -> Given | None:
        return next(given_rows(setup, samples[number : number + 1]), None)

    return read


def our_row(setup: Setup, given: Given) -> Row:
    """The row of our own batch."""
    policy = setup.policy
    return process_row(
        given.prompt, given.conversation, given.media, policy.processor, policy.family
    )
