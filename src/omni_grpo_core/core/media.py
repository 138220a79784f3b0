"""The only reader and decoder of media files: conversation -> arrays for the processor.

PyAV (:mod:`omni_grpo_core.core.decode`) and Pillow decode; qwen-omni-utils
(:mod:`omni_grpo_core.core.frame_sampling`) chooses frames and resizes. Neither an ffmpeg binary nor
the installed video backend matters: the same file gives the same frames.
"""

from __future__ import annotations

import logging
import math
import threading
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from numpy.typing import NDArray
from torch import Tensor

from omni_grpo_core.core import decode as _decode
from omni_grpo_core.core import frame_sampling as _sampling
from omni_grpo_core.core.conversation import interleaves
from omni_grpo_core.core.decode import Contents, decoder_version
from omni_grpo_core.core.frame_sampling import Choice
from omni_grpo_core.core.media_config import MediaConfig
from omni_grpo_core.errors import MediaError
from omni_grpo_core.types import (
    AUDIO_SAMPLING_RATE,
    Audio,
    Conversation,
    Image,
    Media,
    MediaRef,
    Video,
)

__all__ = ["MediaConfig", "Probe", "chosen_frames", "decoder_version", "load_media", "probe"]

_WARNINGS = threading.Lock()
# Pillow logs what it then raises; without any logging set up, Python prints that to stderr
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class Probe:
    """What a clip or recording holds. ``duration``: seconds of the longer track."""

    has_video: bool
    has_audio: bool
    duration: float


def probe(path: str | Path) -> Probe:
    """Inspect a clip or a recording. The cover picture of a song is not a video.

    Raises MediaError if it cannot be read: "no audio" is only reported for a file that was read to
    its end and has no track.
    """
    contents = _decode.inspect(path)
    return Probe(contents.has_video, contents.has_audio, contents.duration)


def load_media(
    conversation: Conversation, config: MediaConfig | None = None, *, patch_size: int = 14
) -> Media:
    """Decode and resize every medium of a conversation, in reading order.

    An interleaved video also gives its track, right after it, as an Audio with
    ``from_video`` set: the order of the audio placeholders in the text. A track longer or shorter
    than its video is kept unchanged. Audio is cut to the same stretch as its video; where a track
    ends before the stretch does, the rest is silence. A file used twice is decoded once, and equal
    results share memory. ``config`` defaults to ``MediaConfig()``; ``patch_size`` is the
    checkpoint's: sides become multiples of two patches, the area of a token.

    Raises MediaError: a file is missing, empty, truncated, damaged, too large, not of the modality
    it is listed as, lacks the requested track, or a stretch is outside it; or memory runs out.
    """
    files = _Files(config or MediaConfig(), patch_size)
    images: list[Image] = []
    videos: list[Video] = []
    audios: list[Audio] = []
    for part in conversation.media:
        ref = part.ref
        with _within_memory(ref):
            if ref.modality == "image":
                images.append(files.image(ref))
            elif ref.modality == "audio":
                audios.append(Audio(files.sound(ref)))
            else:
                video = files.clip(ref)
                if interleaves(conversation.audio_in_video, len(videos)):
                    audios.append(Audio(files.sound(ref), from_video=len(videos)))
                videos.append(video)
    return Media(
        sample_id=conversation.sample_id,
        images=tuple(images),
        videos=tuple(videos),
        audios=tuple(audios),
        decoder=decoder_version(),
    )


def chosen_frames(
    ref: MediaRef, config: MediaConfig
) -> tuple[tuple[int, ...], int, dict[int, NDArray[np.uint8]]]:
    """What another decoder is compared with: the numbers of the frames that a model is given of a
    clip, each once, ascending; how many frames the clip has; and by number those frames and their
    neighbours, uint8, (height, width, 3), RGB, not resized. Raises MediaError as
    :func:`load_media`."""
    files = _Files(config, 1)
    contents = files.clip_contents(ref)
    if contents.shown is None:
        contents = _decode.recount(contents)
    numbers = tuple(dict.fromkeys(files.choose(ref, contents).frames))
    total = len(contents.shown or ())
    around = sorted({n + step for n in numbers for step in (-1, 0, 1) if 0 <= n + step < total})
    return numbers, total, dict(_decode.read_frames(contents, around, timed=False))


@contextmanager
def _within_memory(ref: MediaRef) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise  # torch has no error class of its own for exhausted CPU memory
        raise MediaError(
            ref.path,
            got="more than fits into the memory of this machine",
            want="a medium that fits",
            fix="lower fps, max_frames or max_pixels, or use a shorter stretch",
        ) from error


@dataclass(slots=True)
class _Files:
    """The files of one conversation, each inspected and each track decoded at most once."""

    config: MediaConfig
    patch_size: int
    contents: dict[str, Contents] = field(default_factory=dict)
    tracks: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    clips: dict[MediaRef, Video] = field(default_factory=dict)

    def image(self, ref: MediaRef) -> Image:
        """An image, resized."""
        low, high = self.config.image_min_pixels, self.config.image_max_pixels
        image = _sampling.resized_image(ref.path, _read_image(ref), low, high, self.patch_size)
        return Image(torch.from_numpy(np.array(image).transpose(2, 0, 1)))

    def sound(self, ref: MediaRef) -> Tensor:
        """float32, (n,): a stretch of an audio track."""
        contents = self._inspect(ref.path)
        if not contents.has_audio:
            raise MediaError(
                ref.path,
                got="no audio track",
                want="a recording, or a clip with sound",
                fix="list the clip without its audio, or use another file",
            )
        start, end = _stretch(ref, contents)
        if ref.path not in self.tracks:
            self.tracks[ref.path] = _decode.read_audio(contents)
        track = self.tracks[ref.path]
        last = None if end is None else int(end * AUDIO_SAMPLING_RATE)
        samples = track[int(start * AUDIO_SAMPLING_RATE) : last]
        if ref.start is not None or ref.end is not None:
            samples = _to_its_end(samples, start, min(end or math.inf, contents.duration))
        if not samples.size:
            raise _nothing_there(ref, "sound")
        return torch.from_numpy(samples if samples.size == track.size else samples.copy())

    def clip(self, ref: MediaRef) -> Video:
        """The chosen frames of a stretch, resized."""
        contents = self.clip_contents(ref)
        if ref not in self.clips:
            self.clips[ref] = self._read_clip(ref, contents)
        return self.clips[ref]

    def clip_contents(self, ref: MediaRef) -> Contents:
        """What the file of a clip holds."""
        contents = self._inspect(ref.path)
        if not contents.has_video:
            raise MediaError(
                ref.path, got="a file without video", want="a clip", fix="list it as audio"
            )
        return contents

    def _inspect(self, path: str) -> Contents:
        if path not in self.contents:
            self.contents[path] = _decode.inspect(path)
        return self.contents[path]

    def _read_clip(self, ref: MediaRef, contents: Contents) -> Video:
        video = None if contents.shown is None else self._decode_clip(ref, contents, timed=True)
        if video is None:
            video = self._decode_clip(ref, _decode.recount(contents), timed=False)
        if video is None:
            raise MediaError(
                ref.path,
                got="a different number of frames each time it is decoded",
                want="a clip",
                fix="convert it",
            )
        return video

    def _decode_clip(self, ref: MediaRef, contents: Contents, *, timed: bool) -> Video | None:
        """Each frame is resized before the next is decoded: only one is held at full size."""
        choice = self.choose(ref, contents)
        numbers, clip = choice.frames, torch.empty(0)
        low, high = self.config.min_pixels, self.config.max_pixels
        done = 0
        for number, picture in _decode.read_frames(contents, numbers, timed=timed):
            if not done:
                shape = (len(numbers), *picture.shape[:2])
                size = _sampling.frame_size(ref.path, shape, low, high, self.patch_size)
                clip = torch.empty((len(numbers), 3, *size))
            stop = bisect_right(numbers, number)
            clip[done:stop] = _sampling.resized_frame(picture, size)
            done = stop
        if done < len(numbers):
            return None
        return Video(clip, choice.sample_fps, choice.source_fps, choice.duration)

    def choose(self, ref: MediaRef, contents: Contents) -> Choice:
        """The frames to take of a stretch."""
        start, end = _stretch(ref, contents)
        shown = contents.shown or ()
        last_moment = math.inf if end is None else end
        slack = 1e-6  # a frame that appears at the very start or end belongs to the stretch
        inside = [i for i, t in enumerate(shown) if start - slack <= t <= last_moment + slack]
        if not inside:
            raise _nothing_there(ref, "frame")
        first, past = inside[0], inside[-1] + 1
        choice = _sampling.choose_frames(
            shown[first:past],
            shown[past] if past < len(shown) else contents.video_end,
            stated_rate=contents.rate,
            fps=self.config.fps,
            min_frames=self.config.min_frames,
            max_frames=self.config.max_frames,
        )
        return replace(choice, frames=tuple(number + first for number in choice.frames))


def _stretch(ref: MediaRef, contents: Contents) -> tuple[float, float | None]:
    """Start and end of the requested stretch in seconds, ``None`` for the end of the file.

    An end up to a twentieth (at most half a second) beyond the file is taken for its end: data
    sets state the length that a clip had before it was re-encoded.
    """
    if ref.start is None and ref.end is None:
        return 0.0, None
    start, end = ref.start or 0.0, ref.end
    latest = contents.duration + min(0.05 * contents.duration, 0.5)
    # written so that NaN fails
    if 0 <= start < contents.duration and (end is None or start < end <= latest):
        return start, end
    raise MediaError(
        ref.path,
        got=f"the stretch from {ref.start} to {ref.end} s",
        want=f"0 <= start < end within its {contents.duration:.3f} s",
        fix="correct the row's start and end",
    )


def _to_its_end(samples: NDArray[np.float32], start: float, end: float) -> NDArray[np.float32]:
    """The sound of a stretch, with the silence that one hears where the track ends before it."""
    missing = int(end * AUDIO_SAMPLING_RATE) - int(start * AUDIO_SAMPLING_RATE) - samples.size
    if samples.size and missing <= _decode.GAP * AUDIO_SAMPLING_RATE:
        return samples  # a container's rounding
    return np.pad(samples, (0, max(missing, 0)))


def _nothing_there(ref: MediaRef, what: str) -> MediaError:
    return MediaError(
        ref.path,
        got=f"no {what} from {ref.start} to {ref.end} s",
        want=f"a stretch with {what} in it",
        fix="correct the row's start and end",
    )


def _read_image(ref: MediaRef) -> PIL.Image.Image:
    """An image, upright (EXIF), RGB, transparency on white; the first frame of an animation."""
    if ref.start is not None or ref.end is not None:
        raise MediaError(
            ref.path,
            got=f"an image from {ref.start} to {ref.end} s",
            want="an image without start and end",
            fix="remove them",
        )
    file = _decode.existing_file(ref.path)
    try:
        # Pillow warns about odd metadata, and about decompression bombs, which are refused here
        with _WARNINGS, warnings.catch_warnings(action="ignore"), PIL.Image.open(file) as image:
            if image.width * image.height > _decode.MAX_PIXELS:
                raise _decode.too_large(file, f"{image.width} x {image.height} pixels")
            image.load()
            _refuse_unscaled(ref, image)
            with suppress(Exception):  # broken EXIF does not make the picture bad
                PIL.ImageOps.exif_transpose(image, in_place=True)
            return _rgb_on_white(image)
    except MediaError:
        raise
    except PIL.Image.DecompressionBombError as error:
        raise _decode.too_large(file, f"an absurdly large image ({error})") from error
    except Exception as error:  # each of Pillow's forty format parsers raises its own
        raise MediaError(
            ref.path,
            got=f"a file that Pillow cannot read as an image ({error})",
            want="a complete png, jpg, webp or similar",
            fix="list it under its own modality, or copy or convert it again",
        ) from error


def _refuse_unscaled(ref: MediaRef, image: PIL.Image.Image) -> None:
    """Floats and 32-bit integers do not say what value is white, except in these two formats."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise MediaError(
            ref.path,
            got=f"{'float' if image.mode == 'F' else '32-bit'} pixels without a stated range",
            want="8 or 16 bits per channel",
            fix="scale it to 0 to 255 and save it with 8 bits",
        )


def _rgb_on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey; convert() would clip at 255 and give an all-white image
        image = PIL.Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = PIL.Image.new("RGB", image.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white
