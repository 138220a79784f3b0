"""The only reader and decoder of files: conversation -> arrays the processor can take.

PyAV and Pillow decode; ``qwen_omni_utils.process_mm_info`` resizes what they give, so that sizes
and pixels are those the published models were trained with. Neither an ffmpeg binary nor
whichever video backend happens to be installed has a say: the same file gives the same frames.
"""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from numpy.typing import NDArray
from qwen_omni_utils import process_mm_info
from qwen_omni_utils.v2_5 import vision_process

from omni_grpo_core import _decode
from omni_grpo_core._decode import Contents, decoder_version
from omni_grpo_core.errors import ConfigError, MediaError
from omni_grpo_core.types import (
    AUDIO_SAMPLING_RATE,
    Audio,
    Conversation,
    Image,
    Media,
    MediaRef,
    Video,
)

__all__ = ["MediaConfig", "Probe", "decoder_version", "load_media", "probe"]

_PATCH = 28  # pixels a side of one token: 14 px patches, merged 2 x 2
_TEMPORAL_PATCH = 2
# qwen-omni-utils 0.0.9: a clip's frames share this many pixels. Passed explicitly because the
# library reads an environment variable for it.
_TOTAL_PIXELS = 128_000 * _PATCH * _PATCH * 0.9
_MIN_FRAME_PIXELS = vision_process.VIDEO_MIN_TOKEN_NUM * _PATCH * _PATCH
_MIN_IMAGE_PIXELS = vision_process.IMAGE_MIN_TOKEN_NUM * _PATCH * _PATCH


@dataclass(frozen=True, slots=True)
class MediaConfig:
    """How much of the media a model is shown; the defaults are those of qwen-omni-utils 0.0.9.

    ``fps``: frames taken per second of clip, between ``min_frames`` and ``max_frames`` in all.
    ``min_pixels``, ``max_pixels``: area of a video frame after resizing; ``None`` is the library's
    default (100,352 to 602,112, less for clips of more than 300 frames). ``image_*``: the same for
    images (3,136 to 12,845,056). A maximum below the default minimum lowers the minimum with it.

    Raises ConfigError for a limit that cannot work.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int | None = None
    max_pixels: int | None = None
    image_min_pixels: int | None = None
    image_max_pixels: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ConfigError(
                "media fps", got=f"{self.fps}", want="a positive number", fix="try 2.0"
            )
        if not _TEMPORAL_PATCH <= self.min_frames <= self.max_frames:
            raise ConfigError(
                "media min_frames, max_frames",
                got=f"{self.min_frames}, {self.max_frames}",
                want="2 <= min_frames <= max_frames",
                fix="frames enter the model in pairs; the defaults are 4 and 768",
            )
        for kind, low, high in (
            ("", self.min_pixels, self.max_pixels),
            ("image_", self.image_min_pixels, self.image_max_pixels),
        ):
            sizes = [n for n in (low, high) if n is not None]
            if any(n < _PATCH * _PATCH for n in sizes) or sizes != sorted(sizes):
                raise ConfigError(
                    f"media {kind}min_pixels, {kind}max_pixels",
                    got=f"{low}, {high}",
                    want=f"{_PATCH * _PATCH} <= {kind}min_pixels <= {kind}max_pixels",
                    fix=f"one token covers {_PATCH} x {_PATCH} pixels",
                )


@dataclass(frozen=True, slots=True)
class Probe:
    """What a media file holds. ``duration``: seconds, of the longer track; 0.0 for an image."""

    has_video: bool
    has_audio: bool
    duration: float


def probe(path: str | Path) -> Probe:
    """Look into a clip or a recording.

    An unreadable file raises MediaError: "no audio" is only ever said of a file that was read to
    its end and has no track. The cover picture of a song is no video.
    """
    contents = _decode.inspect(path)
    return Probe(contents.has_video, contents.has_audio, contents.duration)


@dataclass(slots=True)
class _Files:
    """What has been read so far: a file used twice in a conversation is decoded once."""

    contents: dict[str, Contents] = field(default_factory=dict)
    tracks: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    clips: dict[MediaRef, _Clip] = field(default_factory=dict)

    def inspect(self, path: str) -> Contents:
        if path not in self.contents:
            self.contents[path] = _decode.inspect(path)
        return self.contents[path]

    def track(self, path: str) -> NDArray[np.float32]:
        if path not in self.tracks:
            self.tracks[path] = _decode.read_audio(self.inspect(path))
        return self.tracks[path]

    def clip(self, ref: MediaRef, config: MediaConfig) -> _Clip:
        if ref not in self.clips:
            self.clips[ref] = _read_clip(self.inspect(ref.path), ref, config)
        return self.clips[ref]


@dataclass(frozen=True, slots=True)
class _Clip:
    frames: torch.Tensor  # uint8, (T, 3, height, width)
    sample_fps: float
    source_fps: float
    duration: float


def load_media(conversation: Conversation, config: MediaConfig | None = None) -> Media:
    """Decode and resize every medium of a conversation.

    With ``interleaved`` each video gives its track as an Audio with ``from_video`` set, in reading
    order, right after the video: the order in which the audio placeholders appear. A track longer
    or shorter than its video is kept as it is. The sample rate of frames is
    ``len(frames) / duration``, whatever was clamped.

    Raises MediaError: a file is missing, empty, cut off, not of the modality it is listed as,
    lacks the track that was asked for, or a stretch lies outside it.
    """
    config = config or MediaConfig()
    files = _Files()
    content: list[dict[str, Any]] = []
    clips: list[_Clip] = []
    from_video: list[int | None] = []
    for part in conversation.media:
        if part.ref.modality == "image":
            content.append(_image_element(part.ref, config))
        elif part.ref.modality == "audio":
            content.append({"type": "audio", "audio": _read_sound(files, part.ref)})
            from_video.append(None)
        else:
            clip = files.clip(part.ref, config)
            content.append(_video_element(part.ref, clip, config))
            if conversation.audio_in_video == "interleaved":
                content.append({"type": "audio", "audio": _read_sound(files, part.ref)})
                from_video.append(len(clips))
            clips.append(clip)
    audios, images, videos = _resize(content)
    return Media(
        sample_id=conversation.sample_id,
        images=tuple(Image(torch.from_numpy(np.array(i).transpose(2, 0, 1))) for i in images),
        videos=tuple(
            Video(frames, clip.sample_fps, clip.source_fps, clip.duration)
            for frames, clip in zip(videos, clips, strict=True)
        ),
        audios=tuple(
            Audio(torch.from_numpy(samples), video)
            for samples, video in zip(audios, from_video, strict=True)
        ),
        decoder=decoder_version(),
    )


# --------------------------------------------------------------------------- the library

_LIBRARY = threading.Lock()


@contextmanager
def _library_with_our_frames() -> Iterator[None]:
    """qwen-omni-utils, taking frames that are already decoded.

    Its list-of-frames input is not the way: version 0.0.9 resizes such frames to multiples of 56
    first (it applies the merge factor twice) and then again to 28, so they end up blurred and of
    another size than the same frames read from a file. Registering a reader that hands over the
    decoded tensor leaves exactly its file path's resizing to run. The choice of backend is a
    cached module function that prints; it is replaced for the time of the call, under a lock.
    """
    with _LIBRARY:
        chooser, level = vision_process.get_video_reader_backend, vision_process.logger.level
        vision_process.VIDEO_READER_BACKENDS["pyav"] = lambda ele: (ele["decoded"], {}, 0.0)
        vision_process.get_video_reader_backend = lambda: "pyav"
        # its warnings (frames clamped, pixels capped) are the limits working as asked
        vision_process.logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            vision_process.get_video_reader_backend = chooser
            vision_process.logger.setLevel(level)
            del vision_process.VIDEO_READER_BACKENDS["pyav"]


def _resize(content: list[dict[str, Any]]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    if not content:
        return (), (), ()
    with _library_with_our_frames():
        audios, images, videos = process_mm_info(
            [{"role": "user", "content": content}], use_audio_in_video=False
        )
    return audios or (), images or (), videos or ()


def _limits(low: int | None, high: int | None, default_low: int) -> dict[str, int]:
    limits = {"min_pixels": low, "max_pixels": high}
    if low is None and high is not None and high < default_low:
        limits["min_pixels"] = high
    return {key: value for key, value in limits.items() if value is not None}


def _refuse_sliver(path: str, height: int, width: int) -> None:
    if max(height, width) > vision_process.MAX_RATIO * min(height, width):
        raise MediaError(
            path,
            got=f"{width} x {height} pixels",
            want=f"sides within a ratio of {vision_process.MAX_RATIO}",
            fix="crop it",
        )


# --------------------------------------------------------------------------- images


def _image_element(ref: MediaRef, config: MediaConfig) -> dict[str, Any]:
    if ref.start is not None or ref.end is not None:
        raise MediaError(
            ref.path, got="an image with start or end", want="neither", fix="leave them out"
        )
    image = _read_image(ref.path)
    _refuse_sliver(ref.path, image.height, image.width)
    limits = _limits(config.image_min_pixels, config.image_max_pixels, _MIN_IMAGE_PIXELS)
    return {"type": "image", "image": image, **limits}


def _read_image(path: str) -> PIL.Image.Image:
    """An image upright (EXIF applied), RGB, transparency on white; the first of an animation."""
    file = _decode.existing_file(path)
    try:
        with warnings.catch_warnings():
            # Pillow only warns of bombs, which are refused below, and of odd metadata
            warnings.simplefilter("ignore")
            with PIL.Image.open(file) as image:
                if image.width * image.height > _decode.MAX_PIXELS:
                    raise _decode.too_large(file, image.width, image.height)
                image.load()
                upright = PIL.ImageOps.exif_transpose(image)
            return _rgb_on_white(upright)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise MediaError(
            path,
            got=f"what Pillow cannot read as an image ({error})",
            want="png, jpg, webp or the like",
            fix="list it under what it is, or convert it",
        ) from error


def _rgb_on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: convert() would clip at 255 and leave a white page
        image = PIL.Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = PIL.Image.new("RGB", image.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


# --------------------------------------------------------------------------- video, audio


def _video_element(ref: MediaRef, clip: _Clip, config: MediaConfig) -> dict[str, Any]:
    _, _, height, width = clip.frames.shape
    _refuse_sliver(ref.path, height, width)
    limits = _limits(config.min_pixels, config.max_pixels, _MIN_FRAME_PIXELS)
    return {
        "type": "video",
        "video": ref.path,
        "decoded": clip.frames,
        "total_pixels": _TOTAL_PIXELS,
        **limits,
    }


def _stretch(ref: MediaRef, contents: Contents) -> tuple[float, float]:
    """The stretch of the file that is asked for, seconds.

    An end up to a twentieth (at most half a second) beyond the end is taken for the end: data sets
    give the length of the clip before it was re-encoded.
    """
    start = 0.0 if ref.start is None else ref.start
    end = math.inf if ref.end is None else ref.end
    slack = min(0.05 * contents.duration, 0.5)
    beyond = ref.end is not None and not end <= contents.duration + slack
    if not 0 <= start < min(end, contents.duration) or beyond:
        raise MediaError(
            ref.path,
            got=f"the stretch {ref.start} to {ref.end} s",
            want=f"0 <= start < end within its {contents.duration:.3f} s",
            fix="mend start and end of the row",
        )
    return start, end


def _read_sound(files: _Files, ref: MediaRef) -> NDArray[np.float32]:
    contents = files.inspect(ref.path)
    if not contents.has_audio:
        raise MediaError(
            ref.path,
            got="no audio track",
            want="a recording or a clip with sound",
            fix="use the clip without its audio, or another file",
        )
    start, end = _stretch(ref, contents)
    last = None if math.isinf(end) else int(end * AUDIO_SAMPLING_RATE)
    samples = files.track(ref.path)[int(start * AUDIO_SAMPLING_RATE) : last]
    if not samples.size:
        raise MediaError(
            ref.path,
            got=f"no sound between {ref.start} and {ref.end} s",
            want="a stretch of the audio track",
            fix="mend start and end of the row",
        )
    return samples.copy()


def _read_clip(contents: Contents, ref: MediaRef, config: MediaConfig) -> _Clip:
    if not contents.has_video:
        raise MediaError(
            ref.path, got="a file without video", want="a clip", fix="list it as audio"
        )
    start, end = _stretch(ref, contents)
    shown = contents.shown
    if shown is None:
        shown = _decode.decoded_times(contents)
    choice = _choose(shown, contents, start, end, config, ref)
    frames = _decode.read_frames(contents, shown, choice.frames)
    if frames is None:
        shown = _decode.decoded_times(contents)
        choice = _choose(shown, contents, start, end, config, ref)
        frames = _decode.read_frames(contents, shown, choice.frames)
    if frames is None:
        raise MediaError(
            ref.path,
            got="frames that differ from one decoding to the next",
            want="a clip",
            fix="convert it again",
        )
    return _Clip(
        torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(),
        sample_fps=choice.sample_fps,
        source_fps=choice.source_fps,
        duration=choice.duration,
    )


@dataclass(frozen=True, slots=True)
class _Choice:
    frames: tuple[int, ...]
    sample_fps: float
    source_fps: float
    duration: float


def _choose(
    shown: Sequence[float],
    contents: Contents,
    start: float,
    end: float,
    config: MediaConfig,
    ref: MediaRef,
) -> _Choice:
    """Which frames to take, as qwen-omni-utils chooses them.

    ``n = smart_nframes(total, fps)`` frames at ``linspace(0, total - 1, n).round()`` of the
    stretch's ``total``; ``sample_fps = n / total * fps``. Where frames are unevenly spaced, the
    number of a frame says nothing about its time, so the frame *on screen* at each of the same
    ``n`` even times is taken instead. A single frame is shown twice: the model takes pairs.
    """
    slack = 1e-6
    inside = [i for i, t in enumerate(shown) if start - slack <= t <= end + slack]
    if not inside:
        raise MediaError(
            ref.path,
            got=f"no frame between {ref.start} and {ref.end} s",
            want="at least one",
            fix="mend start and end of the row",
        )
    first, total = inside[0], len(inside)
    times = np.array([shown[i] for i in inside])
    after = shown[inside[-1] + 1] if inside[-1] + 1 < len(shown) else contents.video_end
    rate, even = _rate(times, max(after, times[-1]), contents.rate)
    if total == 1:
        count, numbers = _TEMPORAL_PATCH, np.zeros(_TEMPORAL_PATCH, np.int64)
    else:
        count = _frame_count(total, rate, config)
        numbers = torch.linspace(0, total - 1, count).round().long().numpy()
        if not even:
            moments = times[0] + np.linspace(0, (total - 1) / rate, count)
            numbers = np.searchsorted(times, moments + slack, side="right") - 1
    return _Choice(
        frames=tuple(int(n) + first for n in numbers),
        sample_fps=count / total * rate,
        source_fps=rate,
        duration=total / rate,
    )


def _rate(times: NDArray[np.float64], after: float, stated: float | None) -> tuple[float, bool]:
    """Frames per second of the stretch, and whether they are evenly spaced."""
    total, steps = len(times), np.arange(len(times))
    if total > 1:
        step = (times[-1] - times[0]) / (total - 1)
        if np.abs(times - times[0] - steps * step).max() < 0.5 * step:
            measured = 1 / step
            # the stated rate is exact where timestamps are rounded (to 1 ms in mkv)
            agrees = stated is not None and abs(stated - measured) < 0.02 * measured
            return (float(stated) if agrees and stated is not None else float(measured)), True
    elif stated is not None:
        return stated, True
    span = float(after - times[0])
    return total / span if span > 0 else float(stated or 1.0), False


def _frame_count(total: int, rate: float, config: MediaConfig) -> int:
    limits = {
        "fps": config.fps,
        "min_frames": config.min_frames,
        "max_frames": config.max_frames,
    }
    with _library_with_our_frames():
        return int(vision_process.smart_nframes(limits, total_frames=total, video_fps=rate))
