"""Which frames of a file the pictures of a recorded clip are, whatever their size and rate.

A trainer may read a clip with another decoder, resizer, rate or number of frames than ours and be
right. So every frame of the file is compared, and a clip is judged by the numbers of its frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from omni_grpo_core.core.decode import inspect, read_frames, recount
from omni_grpo_core.core.frame_sampling import resized_frame
from omni_grpo_core.core.media_config import MediaConfig
from omni_grpo_core.doctor.replay.media import file_of, load, stamp
from omni_grpo_core.errors import MediaError
from omni_grpo_core.types import MediaRef

_MOST_BYTES = 256 << 20
"""Of a clip's frames at the recorded size: a longer one is not read whole."""
_PLACES = 4096
"""Pixels by which the nearest frame is found; those it is compared with are all of them."""
_SAME = 1.0
"""Mean difference in grey levels: two correct decoders of a file agree within half a level."""
_ALIKE = 0.25
"""Mean difference by the frame's deviation: first frames of the shipped clips differ by up to .02
between bilinear and bicubic, those of two clips by .33 to above 1."""
_LARGE = 1024 * 1024
"""Pixels from which an image is resized to sizes that the reference would not give it."""
_TIE = 0.25
"""Grey levels: frames of a still clip that cannot be told apart."""


@dataclass(frozen=True, slots=True, eq=False)
class FileFrames:
    """``pictures``: (T, 3, h, w), grey levels, every frame of a stretch of a file at one size.
    ``times``: when each appears, in seconds from its start."""

    pictures: Tensor
    times: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Matched:
    """``numbers``: of the file's frame that each recorded one is, in the file's order where still
    frames leave a choice. ``gap``: mean difference in grey levels; ``share``: the same by the
    frames' deviation."""

    numbers: tuple[int, ...]
    gap: float
    share: float

    @property
    def is_found(self) -> bool:
        return self.gap <= _SAME or self.share <= _ALIKE

    @property
    def in_order(self) -> bool:
        return all(a <= b for a, b in pairwise(self.numbers))


def frames_of(ref: MediaRef, size: tuple[int, int]) -> FileFrames | None:
    """A file's frames at a size, of an image its one; ``None`` where it is missing, damaged or too
    long."""
    if ref.modality == "image":
        picture = _picture_of(ref, size)
        return None if picture is None else FileFrames(picture[None], (0.0,))
    path = file_of(ref.path)
    if path is None:
        return None
    try:
        return _read(path, stamp(path), ref.start, ref.end, size)
    except MediaError:
        return None


def _picture_of(ref: MediaRef, size: tuple[int, int]) -> Tensor | None:
    """An image file at a size: float (3, h, w), grey levels; ``None`` where it cannot be read."""
    area = size[0] * size[1]
    for config in (
        MediaConfig(image_min_pixels=area, image_max_pixels=area),
        MediaConfig(image_min_pixels=_LARGE, image_max_pixels=_LARGE),
    ):
        read = load(ref, config)
        if read is None:
            continue
        pixels = read.images[0].pixels.float()
        if tuple(pixels.shape[-2:]) == size:
            return pixels
    if read is None:
        return None
    made: Tensor = interpolate(pixels[None], size, mode="bicubic", antialias=True)
    return made[0].clamp(0, 255)


@lru_cache(maxsize=32)
def _read(
    path: str, _: tuple[int, int], start: float | None, end: float | None, size: tuple[int, int]
) -> FileFrames | None:
    contents = inspect(path)
    if not contents.has_video:
        return None
    if contents.shown is None:
        contents = recount(contents)
    shown = contents.shown or ()
    last = float("inf") if end is None else end + 1e-6
    numbers = [n for n, time in enumerate(shown) if (start or 0.0) - 1e-6 <= time <= last]
    if not numbers or len(numbers) * 3 * size[0] * size[1] > _MOST_BYTES:
        return None
    read = [
        (shown[number] - (start or 0.0), resized_frame(picture, size))
        for number, picture in read_frames(contents, numbers, timed=False)
    ]
    return FileFrames(torch.stack([picture for _, picture in read]), tuple(t for t, _ in read))


def matched(given: Tensor, held: Tensor) -> Matched:
    """The frames (T, 3, h, w) that are nearest to given ones (n, 3, h, w), in grey levels.

    Frames that are as near as the nearest, as in a clip that stands still, count as whichever
    keeps the order.
    """
    flat, pool = given.flatten(1), held.flatten(1)
    places = torch.linspace(0, flat.shape[1] - 1, min(_PLACES, flat.shape[1])).long()
    apart = torch.cdist(flat[:, places].float(), pool[:, places].float(), p=1) / len(places)
    ties = apart <= apart.min(1, keepdim=True).values + _TIE
    numbers = _ordered(ties) or tuple(apart.argmin(1).tolist())
    chosen = held[list(numbers)].float()
    gaps = (given.float() - chosen).abs().flatten(1).mean(1)
    spread = given.float().flatten(1).std(1, correction=0).clamp(min=1e-6)
    return Matched(numbers, float(gaps.max()), float((gaps / spread).max()))


def _ordered(ties: Tensor) -> tuple[int, ...] | None:
    """The earliest choice that never goes back; ``None`` where there is none."""
    found: list[int] = []
    for row in ties:
        options = [n for n in row.nonzero().flatten().tolist() if not found or n >= found[-1]]
        if not options:
            return None
        # a repeated frame only where no later one is as near
        later = [n for n in options if not found or n > found[-1]]
        found.append((later or options)[0])
    return tuple(found)


def spacing(numbers: Sequence[int]) -> str:
    """Numbers in a sentence, shortened where their step is constant.

    >>> spacing(range(0, 40, 5)), spacing((0, 4, 9)), spacing((2,))
    ('0, 5, … 35', '0 4 9', '2')
    """
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 6 and len(steps) == 1:
        return f"{numbers[0]}, {numbers[1]}, … {numbers[-1]}"
    shown = " ".join(map(str, numbers[:12]))
    return f"{shown} …" if len(numbers) > 12 else shown
