"""How many tokens a sample's prompt has, from file headers and settings alone.

Of media a lower bound: what it refuses could not have run. Files whose headers cannot be read
(:mod:`~omni_grpo_core.training.headers`) count as nothing, and lengths are reduced by the error
that the media stage tolerates in a header.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_grpo_core.core.checkpoint_files import check_config, read_object, thinker_of
from omni_grpo_core.core.conversation import build_conversation, interleaves
from omni_grpo_core.core.family import family_of
from omni_grpo_core.core.media_config import FRAMES_PER_TOKEN, MediaConfig
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.training.headers import Header, VideoTrack, image_size, read_header
from omni_grpo_core.types import (
    Conversation,
    MediaPart,
    MediaRef,
    Modality,
    Sample,
    TextPart,
)

TRUSTED = 0.95
"""Share of a header's length that is relied on, less for a short one: the media stage accepts a
file as complete that lacks a twentieth, or a tenth of a second."""

BYTES_PER_TOKEN = 4
"""Of text, in UTF-8: about what Qwen's tokenizer makes of English."""

# qwen-omni-utils' own limits, in tokens per frame; a test compares them with the library's
VIDEO_TOKENS = (128, 768)
IMAGE_TOKENS = (4, 16_384)
CLIP_TOKENS = 128_000 * 0.9


@dataclass(frozen=True, slots=True)
class TokenShape:
    """``side``: side length in pixels of the square that one token covers. ``audio_tokens``: mel
    frames (10 ms) -> tokens."""

    side: int
    audio_tokens: Callable[[int], int]


def token_shape(checkpoint: Path) -> TokenShape:
    """From the checkpoint's ``config.json``. Raises ``CheckpointError`` for another family or an
    invalid file."""
    vision = read_config(checkpoint).get("vision_config", {})
    side = int(vision.get("patch_size", 14)) * int(vision.get("spatial_merge_size", 2))
    model_type = read_object(checkpoint / "config.json").get("model_type")
    family = family_of(str(model_type), str(checkpoint))
    return TokenShape(side, family.audio_tokens)


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The thinker's part of the checkpoint's ``config.json``, its numbers checked; a value that is
    null is left out of its section. Raises ``CheckpointError`` if it is invalid."""
    config = read_object(checkpoint / "config.json")
    check_config(config, checkpoint)
    return {
        name: {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else part
        for name, part in thinker_of(config, checkpoint).items()
    }


@dataclass(frozen=True, slots=True)
class FileHeaders:
    """What the headers of media files state, by path. ``clips``: videos and recordings, ``None``
    where the header cannot be read. ``images``: width and height, ``None`` likewise."""

    clips: Mapping[str, Header | None]
    images: Mapping[str, tuple[int, int] | None]

    @property
    def tracks(self) -> dict[str, bool]:
        """Whether each clip has sound; one whose header cannot be read counts as silent."""
        return {path: bool(clip and clip.audio_seconds) for path, clip in self.clips.items()}


def read_headers(samples: Sequence[Sample]) -> FileHeaders:
    """The headers of the samples' media files, each read once."""
    used = sorted({(ref.modality == "image", ref.path) for s in samples for ref in s.media})
    return FileHeaders(
        clips={path: read_header(path) for is_image, path in used if not is_image},
        images={path: image_size(path) for is_image, path in used if is_image},
    )


@dataclass(frozen=True, slots=True)
class PromptSize:
    """Tokens of one prompt, at least, by kind; of text about as many, a token for four bytes.
    ``items``: modality and tokens of each medium in reading order, a track with its video."""

    vision: int = 0
    sound: int = 0
    text: int = 0
    items: tuple[tuple[Modality, int], ...] = ()

    @property
    def media(self) -> int:
        return self.vision + self.sound

    @property
    def total(self) -> int:
        return self.media + self.text


def prompt_sizes(
    samples: Sequence[Sample],
    settings: Settings,
    shape: TokenShape,
    headers: FileHeaders | None = None,
) -> tuple[PromptSize, ...]:
    """The size of each sample's prompt; ``headers`` as of :func:`read_headers`, which is called
    without them.

    Raises ``ConversationError`` for a sample that contradicts the audio-in-video setting.
    """
    headers = headers or read_headers(samples)
    tracks = headers.tracks
    found = []
    for sample in samples:
        built = build_conversation(sample, audio_in_video=settings.audio_in_video, tracks=tracks)
        parts = [*_each(built, headers, settings.media, shape)]
        texts = [part.text for message in built.messages for part in message.parts
                 if isinstance(part, TextPart)]  # fmt: skip
        found.append(
            PromptSize(
                sum(vision for vision, _ in parts),
                sum(sound for _, sound in parts),
                sum(len(text.encode()) for text in texts) // BYTES_PER_TOKEN,
                tuple(
                    (shown.ref.modality, sum(part))
                    for shown, part in zip(built.media, parts, strict=True)
                ),
            )
        )
    return tuple(found)


def _each(
    built: Conversation, headers: FileHeaders, media: MediaConfig, shape: TokenShape
) -> Iterator[tuple[int, int]]:
    """The least number of tokens of each medium, seen and heard, in reading order."""
    videos = 0
    for part in built.media:
        is_video = part.ref.modality == "video"
        interleaved = is_video and interleaves(built.audio_in_video, videos)
        videos += is_video
        yield _size(part, headers, interleaved, media, shape)


def check_prompt_limit(samples: Sequence[Sample], tokens: Sequence[int], limit: int | None) -> None:
    """Raises ``ConfigError`` if ``limit`` is below the media tokens of a sample."""
    over = [n for n in tokens if limit is not None and n > limit]
    if over:
        worst = tokens.index(max(over))
        raise ConfigError(
            "settings: max_prompt_length",
            got=f"{limit}, and {len(over)} of {len(samples)} samples have more media tokens: "
            f"{samples[worst].sample_id} has {tokens[worst]} or more",
            want="a limit above the media tokens plus the text: nothing is truncated to fit",
            fix="raise it, or lower settings: media: fps, max_frames or max_pixels",
        )


def resized_tokens(height: int, width: int, side: int, least: float, most: float) -> int:
    """Tokens of an image after resizing to between ``least`` and ``most`` pixels, sides multiples
    of ``side``, as qwen-vl-utils' ``smart_resize`` does.

    >>> resized_tokens(280, 560, 28, 0, 1e9), resized_tokens(280, 560, 28, 0, 28 * 28 * 50)
    (200, 50)
    """
    rows, columns = (max(1, round(length / side)) for length in (height, width))
    if rows * columns * side * side > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (math.floor(length / shrink / side) for length in (height, width))
    elif rows * columns * side * side < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(length * grow / side) for length in (height, width))
    return rows * columns


def _size(
    part: MediaPart,
    headers: FileHeaders,
    interleaved: bool,
    media: MediaConfig,
    shape: TokenShape,
) -> tuple[int, int]:
    """Tokens seen and heard."""
    ref = part.ref
    if ref.modality == "image":
        return _image_tokens(headers.images[ref.path], media, shape.side), 0
    header = headers.clips[ref.path] or Header()
    sound = _audio_tokens(_stretch(ref, header.audio_seconds), shape)
    if ref.modality == "audio":
        return 0, sound
    seen = 0 if header.video is None else _video_tokens(ref, header.video, media, shape.side)
    return seen, sound if interleaved else 0


def _stretch(ref: MediaRef, seconds: float) -> float:
    """How many seconds are requested of a track that lasts ``seconds``."""
    return max(0.0, min(seconds if ref.end is None else ref.end, seconds) - (ref.start or 0.0))


def _trusted(seconds: float) -> float:
    return max(0.0, min(TRUSTED * seconds, seconds - 0.1))


def _audio_tokens(seconds: float, shape: TokenShape) -> int:
    frames = int(100 * _trusted(seconds))
    return max(0, shape.audio_tokens(frames)) if frames else 0


def _video_tokens(ref: MediaRef, video: VideoTrack, media: MediaConfig, side: int) -> int:
    seconds, present = video.seconds, float(video.frames)
    if ref.start is not None or ref.end is not None:
        # the worst case: the longest-lasting frames, one of which begins just before the stretch
        present = video.rate * _stretch(ref, seconds)
        seconds = (present - 1) / video.rate if present > 1 else 0.0
    if not seconds or present < 1:
        return 0
    lasting = _trusted(seconds)
    chosen = min(
        max(lasting * media.fps, media.min_frames), media.max_frames, present * lasting / seconds
    )
    frames = max(FRAMES_PER_TOKEN, int(chosen) // FRAMES_PER_TOKEN * FRAMES_PER_TOKEN)
    area = side * side
    least, most = _limits(media.min_pixels, media.max_pixels, VIDEO_TOKENS, area)
    shared = max(min(VIDEO_TOKENS[1], CLIP_TOKENS / frames * FRAMES_PER_TOKEN) * area, 1.05 * least)
    each = resized_tokens(video.height, video.width, side, least, min(most, shared))
    return frames // FRAMES_PER_TOKEN * each


def _image_tokens(size: tuple[int, int] | None, media: MediaConfig, side: int) -> int:
    if size is None:
        return 0
    area = side * side
    least, most = _limits(media.image_min_pixels, media.image_max_pixels, IMAGE_TOKENS, area)
    return resized_tokens(size[1], size[0], side, least, most)


def _limits(
    low: int | None, high: int | None, tokens: tuple[int, int], area: int
) -> tuple[float, float]:
    floor, ceiling = tokens[0] * area, tokens[1] * area
    most = ceiling if high is None else high
    # a ceiling below the default floor disables the floor
    least = floor if most >= floor else min(area, most)
    return float(least if low is None else low), float(most)
