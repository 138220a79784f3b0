"""The frames that a model is given, decoded once more by another library.

transformers from 5.23 on loads clips with torchcodec by itself; other trainers use decord or
OpenCV. Where such a library delivers other frames under the same numbers, training with it and
serving without it see different clips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from omni_grpo_core.core.media import MediaConfig, chosen_frames
from omni_grpo_core.errors import ConfigError, one_line
from omni_grpo_core.types import MediaRef

Name = Literal["torchcodec", "opencv", "decord"]
Frames = Sequence[NDArray[np.uint8]]
Decoder = Callable[[Path, Sequence[int]], tuple[int, Frames]]
"""Path and frame numbers (ascending) -> how many frames the clip has, and those, uint8, (height,
width, 3), RGB."""

ROUNDING = 2.0
"""Levels of 255, mean over a frame: room for a conversion of colours with other rounding or
interpolation. Measured 0 for all three, on the shipped clips and on H.264 of 4:2:0 and 4:4:4 up to
1278 x 718. Neighbouring frames of a moving scene differ by more."""


_SHOWN = 8
"""Differing frames named in a line."""


@dataclass(frozen=True, slots=True)
class FrameDifference:
    """``number``: of the frame; ``mean``, ``most``: absolute difference in levels of 255;
    ``is_like``: the neighbouring frame that it equals better, if any."""

    number: int
    mean: float
    most: int
    is_like: int | None = None

    @property
    def words(self) -> str:
        if self.is_like is not None:
            return f"{self.number} is our {self.is_like}"
        return f"{self.number} by {self.mean:.1f} levels"


@dataclass(frozen=True, slots=True)
class Opinion:
    """A clip by another decoder: ``total`` frames against ``ours``, ``compared`` of them, and those
    that ``differ`` by more than rounding. ``mean``, ``most``: the largest difference of a frame
    within rounding. ``failure``: what the decoder raised instead."""

    path: str
    decoder: str
    total: int
    ours: int
    compared: int
    mean: float
    most: int
    differ: tuple[FrameDifference, ...]
    failure: str = ""

    @property
    def same(self) -> bool:
        return not self.failure and not self.differ and self.total == self.ours

    @property
    def words(self) -> str:
        """Whether the frames are the same, or which differ by how much, in one line."""
        clip = f"{self.decoder}: {Path(self.path).name}"
        if self.failure:
            return f"✗ {clip} is not decoded: {self.failure}"
        if self.same:
            within = f"largest difference {self.most} of 255, at most {self.mean:.2f} on average"
            return f"✓ {clip}: the same {self.compared} frames ({within})"
        facts = []
        if self.total != self.ours:
            facts.append(f"{self.total} frames in all instead of {self.ours}")
        if self.differ:
            numbers = ", ".join(one.words for one in self.differ[:_SHOWN])
            more = len(self.differ) - _SHOWN
            facts.append(
                f"{len(self.differ)} of {self.compared} frames differ: {numbers}"
                + (f" and {more} more" if more > 0 else "")
            )
        return f"✗ {clip}: {'; '.join(facts)}"


def second_opinions(
    refs: Iterable[MediaRef], config: MediaConfig, name: Name, decode: Decoder | None = None
) -> tuple[Opinion, ...]:
    """Each clip, once, at the frames that the settings choose. ``decode`` replaces the library.

    Raises:
        ConfigError: the library is not installed, or does not load.
        MediaError: the clip cannot be read by our own decoder.
    """
    decoder = decode or load_decoder(name)
    clips = dict.fromkeys(ref for ref in refs if ref.modality == "video")
    return tuple(_opinion(ref, config, name, decoder) for ref in clips)


def _opinion(ref: MediaRef, config: MediaConfig, name: Name, decode: Decoder) -> Opinion:
    numbers, ours_total, ours = chosen_frames(ref, config)
    try:
        total, theirs = decode(Path(ref.path).absolute(), numbers)
    except ConfigError:
        raise
    except Exception as error:  # whatever the other library raises is the finding
        said = f"{type(error).__name__}: {one_line(error, 200)}"
        return Opinion(ref.path, name, 0, ours_total, 0, 0.0, 0, (), said)
    found = [_compare(number, frame, ours) for number, frame in zip(numbers, theirs, strict=False)]
    close = [one for one in found if one.mean <= ROUNDING]
    return Opinion(
        path=ref.path,
        decoder=name,
        total=total,
        ours=ours_total,
        compared=len(found),
        mean=max((one.mean for one in close), default=0.0),
        most=max((one.most for one in close), default=0),
        differ=tuple(one for one in found if one.mean > ROUNDING),
    )


def _compare(
    number: int, frame: NDArray[np.uint8], ours: Mapping[int, NDArray[np.uint8]]
) -> FrameDifference:
    mean, most = _apart(frame, ours[number])
    if mean <= ROUNDING:
        return FrameDifference(number, mean, most)
    beside = [n for n in (number - 1, number + 1) if n in ours]
    nearest = min(beside, key=lambda n: _apart(frame, ours[n])[0], default=None)
    like = nearest is not None and _apart(frame, ours[nearest])[0] <= ROUNDING
    return FrameDifference(number, mean, most, nearest if like else None)


def _apart(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> tuple[float, int]:
    if a.shape != b.shape:
        return 255.0, 255  # another size: nothing alike
    difference = np.abs(a.astype(np.int16) - b.astype(np.int16))
    return float(difference.mean()), int(difference.max())


# --------------------------------------------------------------------------- libraries


def load_decoder(name: Name) -> Decoder:
    """Raises ConfigError if the library is not installed, or does not load."""
    module, decoder = _LIBRARIES[name]
    try:
        library = import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--second-decoder {name}",
            got=f"no package {error.name}",
            want="an installed decoder",
            fix=f"pip install {_PACKAGES[name]}",
        ) from error
    except Exception as error:
        raise _does_not_load(name, error) from error
    return lambda path, numbers: decoder(library, path, numbers)


def _does_not_load(name: Name, error: Exception) -> ConfigError:
    return ConfigError(
        f"--second-decoder {name}",
        got=f"a package that does not load ({one_line(error, 120)} …)",
        want="an installed decoder",
        fix="give it FFmpeg's shared libraries (LD_LIBRARY_PATH), or choose another decoder",
    )


def _torchcodec(library: Any, path: Path, numbers: Sequence[int]) -> tuple[int, Frames]:
    try:
        # as transformers' own loading does
        decoder = library.VideoDecoder(str(path), seek_mode="exact", dimension_order="NHWC")
    except RuntimeError as error:  # it looks for FFmpeg's libraries when first used
        if "libtorchcodec" in str(error):
            raise _does_not_load("torchcodec", error) from error
        raise
    frames = decoder.get_frames_at(indices=list(numbers)).data.numpy()
    return int(decoder.metadata.num_frames), list(frames)


def _opencv(library: Any, path: Path, numbers: Sequence[int]) -> tuple[int, Frames]:
    capture = library.VideoCapture(str(path))
    try:
        wanted, frames, total = set(numbers), dict[int, NDArray[np.uint8]](), 0
        while True:  # seeking by number is not exact in OpenCV
            there, frame = capture.read()
            if not there:
                break
            if total in wanted:
                frames[total] = library.cvtColor(frame, library.COLOR_BGR2RGB)
            total += 1
        return total, [frames[n] for n in numbers if n in frames]
    finally:
        capture.release()


def _decord(library: Any, path: Path, numbers: Sequence[int]) -> tuple[int, Frames]:
    reader = library.VideoReader(str(path), num_threads=1)
    return len(reader), list(reader.get_batch(list(numbers)).asnumpy())


_LIBRARIES: Mapping[Name, tuple[str, Callable[[Any, Path, Sequence[int]], tuple[int, Frames]]]] = {
    "torchcodec": ("torchcodec.decoders", _torchcodec),
    "opencv": ("cv2", _opencv),
    "decord": ("decord", _decord),
}
_PACKAGES: Mapping[Name, str] = {
    "torchcodec": "torchcodec",
    "opencv": "opencv-python-headless",
    "decord": "decord",
}
