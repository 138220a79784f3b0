"""qwen-omni-utils behind plain functions: which frames of a clip to take, and at what size.

The other half of :mod:`omni_grpo_core.core.media`. The library reads no files here; it only chooses
frames and sizes and resizes, so that they match the training of the published models. Figures in
comments are for qwen-omni-utils 0.0.9.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from qwen_omni_utils.v2_5 import vision_process
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from omni_grpo_core.core.media_config import FRAMES_PER_TOKEN
from omni_grpo_core.errors import MediaError

# The budget of tokens for all frames of a clip. The library takes it from an environment variable;
# passed explicitly, it gives the same clip the same size everywhere.
_CLIP_TOKENS = 128_000 * 0.9
_EPSILON = 1e-6  # seconds: finer than any container's clock, coarser than float error

_LIBRARY = threading.Lock()


@dataclass(frozen=True, slots=True)
class Choice:
    """Numbers of the frames to take (ascending, an even count, numbers may repeat).

    ``sample_fps``: chosen frames per second of clip; ``source_fps``: all frames per second;
    ``duration``: seconds, ``len(frames) / sample_fps``.
    """

    frames: tuple[int, ...]
    sample_fps: float
    source_fps: float
    duration: float


def choose_frames(
    shown: Sequence[float],
    video_end: float,
    *,
    stated_rate: float | None,
    fps: float,
    min_frames: int,
    max_frames: int,
) -> Choice:
    """Choose among frames that appear at ``shown`` seconds (ascending, at least one).

    As in the library: ``n = smart_nframes(total, fps)`` frames at
    ``linspace(0, total - 1, n).round()``, ``sample_fps = n / total * rate``. With uneven spacing a
    frame's number does not give its time, so the frame *on screen* at each of ``n`` evenly spaced
    times is taken. A single frame is taken twice: frames enter the model in pairs.

    >>> choose_frames([0.0, 0.5, 1.0, 1.5], 2.0, stated_rate=2.0,
    ...               fps=1.0, min_frames=2, max_frames=8)
    Choice(frames=(0, 3), sample_fps=1.0, source_fps=2.0, duration=2.0)
    """
    times, total = np.asarray(shown, np.float64), len(shown)
    rate, even = _rate(times, video_end, stated_rate)
    if total < FRAMES_PER_TOKEN:
        count, numbers = FRAMES_PER_TOKEN, np.zeros(FRAMES_PER_TOKEN, np.int64)
    else:
        limits = {"fps": fps, "min_frames": min_frames, "max_frames": max_frames}
        with _quiet_library():
            count = vision_process.smart_nframes(limits, total_frames=total, video_fps=rate)
        numbers = torch.linspace(0, total - 1, count).round().long().numpy()
        if not even:
            moments = times[0] + np.linspace(0, (total - 1) / rate, count)
            numbers = np.searchsorted(times, moments + _EPSILON, side="right") - 1
    return Choice(
        frames=tuple(numbers.tolist()),
        sample_fps=count / total * rate,
        source_fps=rate,
        duration=total / rate,
    )


def _rate(times: NDArray[np.float64], end: float, stated: float | None) -> tuple[float, bool]:
    """Frames per second, and whether they are evenly spaced."""
    total = len(times)
    if total == 1 and stated is not None:
        return stated, True
    step = float(times[-1] - times[0]) / max(total - 1, 1)
    if end <= times[-1]:
        end = float(times[-1]) + (step or 1.0)  # the last frame's length is unknown
    off_beat = np.abs(times - times[0] - step * np.arange(total)).max()
    if total > 1 and off_beat < 0.5 * step and end - times[-1] < 2 * step:
        # the stated rate is exact even if timestamps are rounded (mkv: to a millisecond)
        agrees = stated is not None and abs(stated * step - 1) < 0.02
        return (stated if agrees and stated is not None else 1 / step), True
    return total / (end - float(times[0])), False


# --------------------------------------------------------------------------- resizing


def resized_image(
    path: str, image: PIL.Image.Image, least: int | None, most: int | None, patch_size: int
) -> PIL.Image.Image:
    """An RGB image at the model's size. Raises MediaError if it is too narrow to be resized."""
    side = _token_side(patch_size)
    limits = _limits(least, most, vision_process.IMAGE_MIN_TOKEN_NUM, side)
    _refuse_sliver(path, image.height, image.width, limits, side)
    with _quiet_library():
        done: PIL.Image.Image = vision_process.fetch_image(
            {"image": image, **limits}, image_patch_size=patch_size
        )
    return done


def frame_size(
    path: str,
    shape: tuple[int, int, int],
    least: int | None,
    most: int | None,
    patch_size: int,
) -> tuple[int, int]:
    """Height and width at which the model gets a clip of ``shape`` (frames, height, width).

    Decided by the library's own code for clips, on frames without memory ("meta"). Raises
    MediaError if they are too narrow to be resized.
    """
    count, height, width = shape
    side = _token_side(patch_size)
    limits = _limits(least, most, vision_process.VIDEO_MIN_TOKEN_NUM, side)
    _refuse_sliver(path, height, width, limits, side)
    element = {
        "video": path,
        "decoded": torch.empty((count, 3, height, width), dtype=torch.uint8, device="meta"),
        "total_pixels": _CLIP_TOKENS * side * side,
        **limits,
    }
    with _quiet_library(), _reader_of_decoded_frames():
        clip = vision_process.fetch_video(element, image_patch_size=patch_size)
    return clip.shape[2], clip.shape[3]


def resized_frame(frame: NDArray[np.uint8], size: tuple[int, int]) -> torch.Tensor:
    """One frame, uint8 (height, width, 3), as uint8 (3, *size), resized as the library does.

    The library resizes the whole clip at once, with every frame in memory as float32. Frames are
    independent, so one at a time gives the same pixels.
    """
    picture = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)
    done: torch.Tensor = resize(
        picture, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    return done


def _token_side(patch_size: int) -> int:
    """Side in pixels of the area that one token covers."""
    return patch_size * int(vision_process.SPATIAL_MERGE_SIZE)


def _limits(least: int | None, most: int | None, default_tokens: int, side: int) -> dict[str, int]:
    if least is None and most is not None and most < default_tokens * side * side:
        # the library asserts that a ceiling is not below the default floor; it can only mean that
        # the floor is unwanted
        least = min(side * side, most)
    return {k: v for k, v in (("min_pixels", least), ("max_pixels", most)) if v is not None}


def _refuse_sliver(path: str, height: int, width: int, limits: dict[str, int], side: int) -> None:
    try:
        fits = min(vision_process.smart_resize(height, width, side, **limits)) > 0
    except ValueError:
        fits = False
    if not fits:
        raise MediaError(
            path,
            got=f"{width} x {height} pixels",
            want=f"sides of at least a token, within a ratio of {vision_process.MAX_RATIO}",
            fix="crop it, or raise max_pixels",
        )


@contextmanager
def _quiet_library() -> Iterator[None]:
    """One caller at a time, and no warnings: they report clamped frames and capped pixels, which is
    what the limits are for."""
    with _LIBRARY:
        level = vision_process.logger.level
        vision_process.logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            vision_process.logger.setLevel(level)


@contextmanager
def _reader_of_decoded_frames() -> Iterator[None]:
    """Make the library take decoded frames as if it had read them from a file. Hold the lock.

    Its list-of-frames input does not work: such frames are first resized to multiples of 56 (the
    merge factor is applied twice) and then again to 28, so they come out blurred and at a different
    size from the same frames read from a file. With a reader that returns a tensor, exactly the
    code for files runs. The reader is chosen by a cached function that inspects what is installed
    and prints; it is replaced during the call.
    """
    chooser = vision_process.get_video_reader_backend
    vision_process.VIDEO_READER_BACKENDS["pyav"] = lambda ele: (ele["decoded"], {}, 0.0)
    vision_process.get_video_reader_backend = lambda: "pyav"
    try:
        yield
    finally:
        vision_process.get_video_reader_backend = chooser
        del vision_process.VIDEO_READER_BACKENDS["pyav"]
