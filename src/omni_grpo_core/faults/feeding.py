"""The loop's first part: from data set rows to the model's inputs, by plain library calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor

from omni_grpo_core.core.conversation import build_conversation
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.faults.config import ROWS, LoopConfig
from omni_grpo_core.faults.fixtures import Clips, Drawn, rows_of
from omni_grpo_core.faults.seams import Messages
from omni_grpo_core.types import Media

MEDIA_KEYS = ("pixel_values", "pixel_values_videos", "input_features")


class Feeding:
    """From rows to model inputs. Every method is a seam that a fault may replace."""

    config: LoopConfig
    policy: Policy
    clips: Clips
    processor: Any
    use_audio_in_video: bool
    steps_done: int

    def draw(self, micro: int) -> list[Drawn]:
        """The rows of a micro-batch, one per prompt: the configured ones first, then others that
        fit the same flag."""
        rows = self.config.rows
        pool = dict.fromkeys(
            (*rows, *(n for kind in ROWS[self.config.audio].values() for n in kind))
        )
        start = (micro + self.steps_done * self.config.accumulation) * len(rows)
        numbers = list(islice(cycle(pool), start, start + len(rows)))
        return [rows_of()[number] for number in numbers]

    def has_track(self, path: str) -> bool:
        """Whether a clip has an audio track."""
        return self.clips.has_track(path)

    def conversation(self, drawn: Drawn) -> Messages:
        """The messages of one row."""
        tracks = {path: self.has_track(path) for path in drawn.videos}
        built = build_conversation(drawn.sample, audio_in_video=self.config.audio, tracks=tracks)
        return self.clips.messages(built)

    def render(self, conversations: list[Messages]) -> list[str]:
        """The prompts of a batch."""
        texts: list[str] = self.processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=False
        )
        return texts

    def load(self, messages: Messages) -> Media:
        """The media that the messages name, and the track of a video where it is interleaved."""
        return self.clips.load(messages, self.use_audio_in_video)

    def repeat(self, values: list[Any]) -> list[Any]:
        """For the group: 1 1 2 2."""
        return [value for value in values for _ in range(self.config.group_size)]

    def processor_keywords(self, media: Sequence[Media]) -> dict[str, Any]:
        """The processor's keywords besides text and media."""
        keywords: dict[str, Any] = {"padding": True, "return_tensors": "pt", "do_resize": False}
        rates = {video.sample_fps for one in media for video in one.videos}
        if rates:
            (keywords["fps"],) = rates
        if self.use_audio_in_video:
            if hasattr(self.processor, "load_audio_from_video"):
                keywords["load_audio_from_video"] = True
                keywords["audio_from_video_indices"] = self._audio_owners(media)
            else:
                keywords["use_audio_in_video"] = True
        return keywords

    @staticmethod
    def _audio_owners(media: Sequence[Media]) -> list[int | None]:
        owners: list[int | None] = []
        videos = 0
        for one in media:
            owners += [
                None if audio.from_video is None else videos + audio.from_video
                for audio in one.audios
            ]
            videos += len(one.videos)
        return owners

    def process(self, texts: list[str], media: list[Media]) -> dict[str, Tensor]:
        """Prompts and media to the model's inputs, left-padded."""
        output = self.call_processor(
            text=texts,
            images=[_pil(image.pixels) for one in media for image in one.images] or None,
            videos=[video.frames for one in media for video in one.videos] or None,
            audio=[audio.samples.numpy() for one in media for audio in one.audios] or None,
            **self.processor_keywords(media),
        )
        inputs = {key: torch.as_tensor(value) for key, value in output.items()}
        for key in MEDIA_KEYS:
            if key in inputs:
                inputs[key] = inputs[key].to(self.policy.model.dtype)
        return inputs

    def call_processor(self, **keywords: Any) -> Mapping[str, Any]:
        """The one call of the processor."""
        output: Mapping[str, Any] = self.processor(**keywords)
        return output

    def expand(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """As they are: prompts were repeated before the processor."""
        return inputs


def _pil(pixels: Tensor) -> PILImage.Image:
    return PILImage.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
