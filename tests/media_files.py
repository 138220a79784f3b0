"""Tiny media files, written on the spot, whose every frame and sample is known.

Frames are numbered by their brightness: frame ``i`` is ``BRIGHTNESS_STEP * i`` all over, so a test
reads off a decoded frame which one it is, after lossy coding and resizing too.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from omni_grpo_core.core.media import MediaConfig, load_media
from omni_grpo_core.errors import MediaError
from omni_grpo_core.types import (
    AudioInVideo,
    Conversation,
    MediaPart,
    MediaRef,
    Message,
    TextPart,
    Video,
)

BRIGHTNESS_STEP = 10

SMALL = MediaConfig(max_pixels=56 * 84, image_max_pixels=56 * 84)
"""Frames and images of 56 x 84 stay as they are."""


def numbered(count: int, height: int = 56, width: int = 84) -> NDArray[np.uint8]:
    """uint8, (count, height, width, 3)."""
    brightness = (np.arange(count) * BRIGHTNESS_STEP).astype(np.uint8)
    return np.broadcast_to(brightness[:, None, None, None], (count, height, width, 3)).copy()


def numbers(frames: Any) -> list[int]:
    """Which frames these are: (T, 3, height, width) of any numeric type."""
    return [round(float(f.mean()) / BRIGHTNESS_STEP) for f in frames]


def tone(seconds: float, rate: int, channels: int = 1, hertz: float = 440.0) -> NDArray[np.float32]:
    """float32, (channels, n): a sine of amplitude one half."""
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.broadcast_to(wave.astype(np.float32), (channels, len(wave))).copy()


def layout_of(channels: int) -> str:
    """libav's usual layout of so many channels; beyond eight, just the number."""
    return f"{channels}c" if channels <= 8 else f"{channels} channels"


def write_media(
    path: Path,
    frames: NDArray[np.uint8] | None = None,
    audio: NDArray[np.float32] | None = None,
    *,
    fps: int = 8,
    times_ms: Sequence[int] | None = None,
    audio_rate: int = 48_000,
    audio_starts: float = 0.0,
    video_codec: str = "libx264",
    audio_codec: str = "aac",
    pixel_format: str = "yuv420p",
    rotation: int | None = None,
    hflip: bool = False,
    options: dict[str, str] | None = None,
) -> Path:
    """Mux frames (T, height, width, 3) and sound (channels, n) into the container ``path`` names.

    ``times_ms`` gives each frame its own time in place of ``fps``.
    """
    with av.open(str(path), "w", options=options or {}) as container:
        picture = sound = None
        if frames is not None:
            picture = container.add_stream(video_codec, rate=fps)
            picture.height, picture.width = frames.shape[1:3]
            picture.pix_fmt = pixel_format
            if times_ms is not None:
                picture.codec_context.time_base = picture.time_base = Fraction(1, 1000)
            if rotation is not None:
                picture.set_display_rotation(rotation, hflip=hflip)
        if audio is not None:
            sound = container.add_stream(audio_codec, rate=audio_rate, layout=layout_of(len(audio)))
        if frames is not None and picture is not None:
            _write_frames(container, picture, frames, times_ms)
        if audio is not None and sound is not None:
            write_sound(container, sound, audio, audio_starts)
    return path


def trimmed(body: bytes, begin: float, seconds: float) -> bytes:
    """An mp4 of :func:`write_media` with its edit lists changed: what ``ffmpeg -ss BEGIN -t SECONDS
    -c copy`` writes, which keeps what is hidden."""
    parts = body.split(b"elst")
    scales = [struct.unpack_from(">I", part, 12)[0] for part in body.split(b"mdhd")[1:]]
    assert len(parts) == 1 + len(scales)
    done = [parts[0]]
    for part, scale in zip(parts[1:], scales, strict=True):
        version, count, _, start = struct.unpack_from(">IIIi", part)
        assert (version, count) == (0, 1)
        entry = struct.pack(">IIIi", 0, 1, int(1000 * seconds), start + int(begin * scale))
        done.append(entry + part[16:])
    return b"elst".join(done)


def _write_frames(
    container: Any, stream: Any, frames: NDArray[np.uint8], times_ms: Sequence[int] | None
) -> None:
    for index, rgb in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
        frame.pts = index if times_ms is None else times_ms[index]
        if times_ms is not None:
            frame.time_base = Fraction(1, 1000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_sound(
    container: Any, stream: Any, audio: NDArray[np.float32], starts: float = 0.0
) -> None:
    rate = stream.codec_context.sample_rate
    packed = np.ascontiguousarray(audio.T).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout_of(len(audio)))
    frame.sample_rate, frame.pts, frame.time_base = rate, round(starts * rate), Fraction(1, rate)
    resampler = av.AudioResampler(
        stream.format, stream.layout, rate, frame_size=stream.codec_context.frame_size or None
    )
    for block in [*resampler.resample(frame), *resampler.resample(None)]:
        container.mux(stream.encode(block))
    container.mux(stream.encode(None))


def lossless(path: Path, frames: NDArray[np.uint8], **options: Any) -> Path:
    """A video (mkv) that decodes to exactly these frames."""
    return write_media(path, frames, video_codec="ffv1", pixel_format="bgr0", **options)


def conversation(
    *media: MediaRef | MediaPart, audio_in_video: AudioInVideo = "off"
) -> Conversation:
    """A user's message of these media and a question."""
    parts = [part if isinstance(part, MediaPart) else MediaPart(part) for part in media]
    message = Message("user", (*parts, TextPart("What do you see and hear?")))
    return Conversation("sample", (message,), audio_in_video)


def load_video(path: Path, config: MediaConfig = SMALL, **stretch: float) -> Video:
    media = load_media(conversation(MediaRef("video", str(path), **stretch)), config)
    assert not media.images
    assert not media.audios
    return media.videos[0]


def load_audio(path: Path, **stretch: float) -> torch.Tensor:
    media = load_media(conversation(MediaRef("audio", str(path), **stretch)), SMALL)
    assert media.audios[0].from_video is None
    samples = media.audios[0].samples
    assert samples.dtype == torch.float32
    assert samples.ndim == 1
    return samples


def load_image(path: Path, config: MediaConfig = SMALL) -> torch.Tensor:
    pixels = load_media(conversation(MediaRef("image", str(path))), config).images[0].pixels
    assert pixels.dtype == torch.uint8
    return pixels


def loudest_hertz(samples: torch.Tensor) -> float:
    spectrum = torch.fft.rfft(samples).abs()
    return float(spectrum[1:].argmax() + 1) * 16_000 / len(samples)


def refused(path: Path | str, modality: Any, **stretch: float) -> str:
    """The message with which every way of reading this file refuses it."""
    with pytest.raises(MediaError) as caught:
        load_media(conversation(MediaRef(modality, str(path), **stretch)), SMALL)
    message = str(caught.value)
    assert message.startswith(f"media: {path}: found ")
    assert "\n" not in message
    return message
