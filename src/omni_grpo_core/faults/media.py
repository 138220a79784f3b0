"""Faults of media between the file and the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.media_config import MediaConfig
from omni_grpo_core.faults.fault import (
    FaultRegistry,
    Injection,
    Manager,
    instead_of,
    result_of,
    without,
)
from omni_grpo_core.faults.fixtures import Drawn
from omni_grpo_core.faults.seams import Loop, Messages
from omni_grpo_core.types import AUDIO_SAMPLING_RATE, Media

faults = FaultRegistry()
Inputs = dict[str, Tensor]

OF_CLIPS = (
    "pixel_values_videos",
    "video_grid_thw",
    "video_second_per_grid",
    "input_features",
    "feature_attention_mask",
)
"""Processor outputs for videos and audio."""

LIBROSA_RATE = 22_050
"""Hz: the default of ``librosa.load``."""


def _each(kind: str, tensor: str) -> Callable[[Callable[[Tensor], Tensor]], Injection]:
    """Decorates a change to one tensor of every decoded medium of a kind."""

    def decorate(change: Callable[[Tensor], Tensor]) -> Injection:
        @result_of("load")
        @wraps(change)
        def changed(loop: Loop, media: Media) -> Media:
            held = getattr(media, kind)
            found: Any = tuple(replace(m, **{tensor: change(getattr(m, tensor))}) for m in held)
            return replace(media, **{kind: found})

        return changed

    return decorate


_pixels = _each("images", "pixels")
_frames = _each("videos", "frames")
_sound = _each("audios", "samples")


@faults.add("media.video-dropped", "open-r1-multimodal's get_custom_multimodal_keywords")
@result_of("process")
def video_dropped(loop: Loop, inputs: Inputs) -> Inputs:
    """The trainer's list of model input keys lacks pixel_values_videos: the placeholders keep their
    raw embeddings, and nothing is raised."""
    return without(inputs, "pixel_values_videos")


@faults.add("media.audio-dropped", "trainers made for images and video")
@result_of("process")
def audio_dropped(loop: Loop, inputs: Inputs) -> Inputs:
    """The trainer's list of model input keys lacks input_features: audio placeholders keep their
    raw embeddings."""
    return without(inputs, "input_features")


@faults.add("media.images-only", "the incident's vLLM trainer")
@result_of("process")
def images_only(loop: Loop, inputs: Inputs) -> Inputs:
    """The trainer passes images to the model and drops videos and audios."""
    return {name: value for name, value in inputs.items() if name not in OF_CLIPS}


@faults.add("media.swapped", "loaders that sort or cache media separately from the text")
def swapped(loop: Loop) -> Manager:
    """The media of one sample are paired with the text of another: nothing is raised, and accuracy
    is at chance."""
    draw, load = loop.draw, loop.load
    drawn: list[Drawn] = []

    def remembered(micro: int) -> list[Drawn]:
        drawn[:] = draw(micro)
        return list(drawn)

    def of_the_next(messages: Messages) -> Media:
        asked = [loop.conversation(row) for row in drawn]
        return load(asked[asked.index(messages) - 1])

    return loop.replaced(draw=remembered, load=of_the_next)


@faults.add("media.fps-ignored", "return_video_kwargs of qwen-omni-utils, left unused")
@result_of("processor_keywords")
def fps_ignored(loop: Loop, keywords: dict[str, Any]) -> dict[str, Any]:
    """The sampled frame rate does not reach the processor, which assumes 2 frames a second: all
    time positions are off."""
    return without(keywords, "fps")


@faults.add("media.frames-clamped", "Qwen-Omni issues on memory", needs={"rows": (12, 11)})
@result_of("processor_keywords")
def frames_clamped(loop: Loop, keywords: dict[str, Any]) -> dict[str, Any]:
    """max_frames is passed to the processor, but the frames are already sampled: the limit has no
    effect."""
    return {**keywords, "max_frames": 4}


@faults.add("media.pixels-ignored", "Qwen-VL and Qwen-Omni issues on max_pixels")
def pixels_ignored(loop: Loop) -> Manager:
    """max_pixels is passed to the processor, after the reader has chosen the size: frames are four
    times as large as requested."""
    asked = 56 * 56
    wide = replace(loop.clips.config, min_pixels=4 * asked, max_pixels=4 * asked)

    def load(messages: Messages) -> Media:
        return loop.clips.load(messages, loop.use_audio_in_video, wide)

    before = loop.processor_keywords
    return loop.replaced(
        load=load, processor_keywords=lambda media: {**before(media), "max_pixels": asked}
    )


@faults.add("media.blank", "hardware decoders and damaged files")
@_frames
def blank(frames: Tensor) -> Tensor:
    """The decoder returned black frames and no error."""
    return torch.zeros_like(frames)


@faults.add("media.silent", "open-r1-multimodal forks: zeros where librosa raised")
@_sound
def silent(samples: Tensor) -> Tensor:
    """The audio reader failed and returned zeros."""
    return torch.zeros_like(samples)


@faults.add(
    "media.decoder-differs",
    "qwen-omni-utils: torchcodec, decord and torchvision in turn, by what is installed",
    severity="differs",
)
@_frames
def decoder_differs(frames: Tensor) -> Tensor:
    """Another reader backend picks a different frame for the same time: always the one before."""
    return torch.cat([frames[:1], frames[:-1]])


EVERY_FRAME = 1000.0
"""Frames a second: more than any clip has, so that a reader returns all of them."""


@faults.add(
    "media.library-decoder",
    "transformers' fetch_videos and sample_frames, 4.57 to 5.24",
    severity="differs",
)
@instead_of("load")
def library_decoder(loop: Loop, before: Callable[[Messages], Media], messages: Messages) -> Media:
    """The clip is passed to the processor as a path. Transformers decodes it with torchcodec on the
    machine's FFmpeg, or with another installed backend, and takes frame k * total // n, while
    qwen-omni-utils spaces n frames evenly up to the last."""
    every = replace(loop.clips.config, fps=EVERY_FRAME, max_frames=MediaConfig().max_frames)
    asked, whole = before(messages), loop.clips.load(messages, loop.use_audio_in_video, every)
    videos = tuple(
        replace(clip, frames=_by_the_library(full.frames, len(clip.frames)))
        for clip, full in zip(asked.videos, whole.videos, strict=True)
    )
    return replace(asked, videos=videos)


def _by_the_library(frames: Tensor, number: int) -> Tensor:
    return frames[torch.arange(number) * len(frames) // number]


@faults.add("media.channels-swapped", "readers on cv2.VideoCapture")
@_frames
def channels_swapped(frames: Tensor) -> Tensor:
    """Frames come from OpenCV as BGR and are treated as RGB."""
    return frames.flip(1)


@faults.add(
    "media.bgr-image",
    "data sets whose images are read by cv2.imread",
    needs={"audio": "off", "rows": (16, 17)},
    also=("media.channels-swapped",),
)
@_pixels
def bgr_image(pixels: Tensor) -> Tensor:
    """Pictures are read as BGR and passed as RGB arrays: what is red looks blue."""
    return pixels.flip(0)


@faults.add("media.sampling-rate", "audio loaders without sr=16000")
@_sound
def sampling_rate(samples: Tensor) -> Tensor:
    """Audio at librosa's default 22,050 Hz is passed as if it were 16,000 Hz: everything sounds
    deeper and lasts longer."""
    size = len(samples) * LIBROSA_RATE // AUDIO_SAMPLING_RATE
    wide: Tensor = torch.nn.functional.interpolate(
        samples[None, None], size=size, mode="linear", align_corners=False
    )
    return wide[0, 0]


# --------------------------------------------------------------------------- content


@faults.add("media.reversed", "frame lists built from the end, or sorted by name: 9 before 10")
@_frames
def reversed_frames(frames: Tensor) -> Tensor:
    """The frames of a clip reach the processor in reverse order: what rises falls."""
    return frames.flip(0)


@faults.add("media.frames-frozen", "readers that fail to seek and return the frame they are at")
@_frames
def frozen(frames: Tensor) -> Tensor:
    """Every frame is the first: nothing moves, and the clip has its length."""
    return frames[:1].expand_as(frames).clone()


@faults.add("media.frames-duplicated", "readers that seek to key frames: decord on long GOPs")
@_frames
def duplicated(frames: Tensor) -> Tensor:
    """Every second frame is the one before it again: half of what was filmed is never seen."""
    return frames[torch.arange(len(frames)) // 2 * 2]


@faults.add("media.mirrored-width", "augmentation left over from supervised training")
@_frames
def mirrored(frames: Tensor) -> Tensor:
    """Frames are mirrored at random, as for classification: left is right, and text unreadable."""
    return frames.flip(-1)


@faults.add(
    "media.never-divided",
    "wave files read by scipy or the standard library",
    also=("media.times",),
)
@_sound
def never_divided(samples: Tensor) -> Tensor:
    """Samples are passed as 16-bit integers, from -32768 to 32767, where -1 to 1 is expected."""
    return (samples * 32768).round()


@faults.add(
    "media.exchanged-sound",
    "audio and video files listed by two calls of glob",
    also=("media.swapped", "media.swapped-with"),
)
def exchanged_sound(loop: Loop) -> Manager:
    """Each clip is shown with the sound of the next one: pictures are right, and answers about
    what is heard are not."""
    draw, load = loop.draw, loop.load
    drawn: list[Drawn] = []

    def remembered(micro: int) -> list[Drawn]:
        drawn[:] = draw(micro)
        return list(drawn)

    def with_the_sound_of_the_next(messages: Messages) -> Media:
        asked = [loop.conversation(row) for row in drawn]
        return replace(load(messages), audios=load(asked[asked.index(messages) - 1]).audios)

    return loop.replaced(draw=remembered, load=with_the_sound_of_the_next)
