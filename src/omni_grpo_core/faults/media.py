"""Faults of media on their way from the file to the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.media_config import MediaConfig
from omni_grpo_core.faults.fault import FaultRegistry
from omni_grpo_core.faults.feeding import Messages
from omni_grpo_core.faults.reference_loop import ReferenceLoop
from omni_grpo_core.types import AUDIO_SAMPLING_RATE, Media

shelf = FaultRegistry()
Manager = AbstractContextManager[None]

LIBROSA_RATE = 22_050
"""Hz: what ``librosa.load`` gives when nobody says otherwise."""


def _forgetting(loop: ReferenceLoop, *names: str) -> Manager:
    """The trainer's list of what goes on to the model lacks some names."""
    before = loop.process

    def process(texts: list[str], media: list[Media]) -> dict[str, Tensor]:
        inputs = before(texts, media)
        return {name: value for name, value in inputs.items() if name not in names}

    return loop.replaced(process=process)


def _decoded(loop: ReferenceLoop, change: Callable[[Media], Media]) -> Manager:
    before = loop.load
    return loop.replaced(load=lambda messages: change(before(messages)))


@shelf.add(
    "media.video-dropped",
    "The trainer's list of keys for the model has no pixel_values_videos: the placeholders keep "
    "their raw embeddings, and nothing is raised.",
    "open-r1-multimodal's get_custom_multimodal_keywords",
)
def video_dropped(loop: ReferenceLoop) -> Manager:
    return _forgetting(loop, "pixel_values_videos")


@shelf.add(
    "media.audio-dropped",
    "The trainer's list of keys for the model has no input_features: audio placeholders keep "
    "their raw embeddings.",
    "trainers made for images and video",
)
def audio_dropped(loop: ReferenceLoop) -> Manager:
    return _forgetting(loop, "input_features")


@shelf.add(
    "media.images-only",
    "The trainer passes images on and drops videos and audios.",
    "the incident's vLLM trainer",
)
def images_only(loop: ReferenceLoop) -> Manager:
    return _forgetting(
        loop,
        "pixel_values_videos",
        "video_grid_thw",
        "video_second_per_grid",
        "input_features",
        "feature_attention_mask",
    )


@shelf.add(
    "media.swapped",
    "The media of one sample meet the text of another: nothing is raised, accuracy is at chance.",
    "loaders that sort or cache media apart from the text",
)
def swapped(loop: ReferenceLoop) -> Manager:
    before = loop.process

    def process(texts: list[str], media: list[Media]) -> dict[str, Tensor]:
        size = len(media) // max(len(set(map(id, media))), 1)
        return before(texts, [*media[size:], *media[:size]])

    return loop.replaced(process=process)


@shelf.add(
    "media.fps-ignored",
    "The frame rate that was sampled does not reach the processor, which assumes 2 a second: all "
    "time positions are off.",
    "return_video_kwargs of qwen-omni-utils, left unused",
)
def fps_ignored(loop: ReferenceLoop) -> Manager:
    before = loop.processor_keywords

    def keywords(media: Sequence[Media]) -> dict[str, Any]:
        return {name: value for name, value in before(media).items() if name != "fps"}

    return loop.replaced(processor_keywords=keywords)


@shelf.add(
    "media.frames-clamped",
    "max_frames is given to the processor, which gets frames that are sampled already: the limit "
    "does nothing.",
    "Qwen-Omni issues on memory",
    needs={"rows": (12, 11)},
)
def frames_clamped(loop: ReferenceLoop) -> Manager:
    return _telling(loop, {"max_frames": 4})


@shelf.add(
    "media.pixels-ignored",
    "max_pixels is given to the processor, after the reader has chosen the size: frames are four "
    "times as large as asked.",
    "Qwen-VL and Qwen-Omni issues on max_pixels",
)
def pixels_ignored(loop: ReferenceLoop) -> Manager:
    asked = 56 * 56
    wide = replace(loop.clips.config, min_pixels=4 * asked, max_pixels=4 * asked)

    def load(messages: Messages) -> Media:
        return loop.clips.load(messages, loop.use_audio_in_video, wide)

    before = loop.processor_keywords
    return loop.replaced(
        load=load, processor_keywords=lambda media: {**before(media), "max_pixels": asked}
    )


def _telling(loop: ReferenceLoop, more: Mapping[str, Any]) -> Manager:
    before = loop.processor_keywords
    return loop.replaced(processor_keywords=lambda media: {**before(media), **more})


def _frames(change: Callable[[Tensor], Tensor]) -> Callable[[Media], Media]:
    def changed(media: Media) -> Media:
        videos = tuple(replace(video, frames=change(video.frames)) for video in media.videos)
        return replace(media, videos=videos)

    return changed


def _sound(change: Callable[[Tensor], Tensor]) -> Callable[[Media], Media]:
    def changed(media: Media) -> Media:
        audios = tuple(replace(audio, samples=change(audio.samples)) for audio in media.audios)
        return replace(media, audios=audios)

    return changed


@shelf.add(
    "media.blank",
    "The decoder gave black frames and no error.",
    "hardware decoders and damaged files",
)
def blank(loop: ReferenceLoop) -> Manager:
    return _decoded(loop, _frames(torch.zeros_like))


@shelf.add(
    "media.silent",
    "The audio reader failed and gave zeros.",
    "open-r1-multimodal forks: zeros where librosa raised",
)
def silent(loop: ReferenceLoop) -> Manager:
    return _decoded(loop, _sound(torch.zeros_like))


@shelf.add(
    "media.decoder-differs",
    "Another reader backend takes another frame for the same moment: each is the one before.",
    "qwen-omni-utils: torchcodec, decord and torchvision take turns by what is installed",
)
def decoder_differs(loop: ReferenceLoop) -> Manager:
    def earlier(frames: Tensor) -> Tensor:
        return torch.cat([frames[:1], frames[:-1]])

    return _decoded(loop, _frames(earlier))


EVERY_FRAME = 1000.0
"""Frames a second: more than any clip has, so that a reader gives all of them."""


@shelf.add(
    "media.library-decoder",
    "The clip is handed to the processor as a path: transformers decodes it, by torchcodec on "
    "whatever FFmpeg the machine has, or by what else is installed, and takes frame k * total // n "
    "where qwen-omni-utils spreads n frames evenly up to the last.",
    "transformers' fetch_videos and sample_frames, 4.57 to 5.24",
)
def library_decoder(loop: ReferenceLoop) -> Manager:
    before = loop.load
    every = replace(loop.clips.config, fps=EVERY_FRAME, max_frames=MediaConfig().max_frames)

    def load(messages: Messages) -> Media:
        asked, whole = before(messages), loop.clips.load(messages, loop.use_audio_in_video, every)
        videos = tuple(
            replace(clip, frames=_by_the_library(full.frames, len(clip.frames)))
            for clip, full in zip(asked.videos, whole.videos, strict=True)
        )
        return replace(asked, videos=videos)

    return loop.replaced(load=load)


def _by_the_library(frames: Tensor, number: int) -> Tensor:
    return frames[torch.arange(number) * len(frames) // number]


@shelf.add(
    "media.channels-swapped",
    "Frames come from OpenCV, blue first, and are taken for RGB.",
    "readers on cv2.VideoCapture",
)
def channels_swapped(loop: ReferenceLoop) -> Manager:
    return _decoded(loop, _frames(lambda frames: frames.flip(1)))


@shelf.add(
    "media.sampling-rate",
    "librosa's default rate of 22,050 Hz is handed over as if it were 16,000 Hz: everything sounds "
    "deeper and lasts longer.",
    "audio loaders without sr=16000",
)
def sampling_rate(loop: ReferenceLoop) -> Manager:
    def resampled(samples: Tensor) -> Tensor:
        size = len(samples) * LIBROSA_RATE // AUDIO_SAMPLING_RATE
        wide: Tensor = torch.nn.functional.interpolate(
            samples[None, None], size=size, mode="linear", align_corners=False
        )
        return wide[0, 0]

    return _decoded(loop, _sound(resampled))
