"""Why two paths show the model different media: the change that gives the other side's values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from omni_grpo_core.core.media import load_media
from omni_grpo_core.core.media_config import MAX_FPS
from omni_grpo_core.doctor.reproduce import difference, reproductions, told
from omni_grpo_core.errors import OmniGrpoError
from omni_grpo_core.parity.given import Given, Setup
from omni_grpo_core.parity.ids_causes import Cause
from omni_grpo_core.tolerances import FEATURES
from omni_grpo_core.types import AUDIO_SAMPLING_RATE, Conversation, MediaPart, Message

_AXES: Mapping[str, tuple[str, ...]] = {
    "image": ("channels", "height", "width"),
    "video": ("frames", "channels", "height", "width"),
    "audio": ("samples",),
}
_SAME_FRAME = 3 / 255
"""Mean difference up to which a frame is a file's: two decoders round colours differently."""


_RESIZED_FRAME = 0.1
"""The same where one was resized, and back again by another kernel. Chosen: neighbouring frames are
told apart by which is nearest."""


def alike(made: Tensor, got: Tensor) -> bool:
    """Equal within the tolerance of features: they went through the same arithmetic."""
    return made.shape == got.shape and bool(
        torch.allclose(made.float(), got.float(), atol=FEATURES.atol, rtol=FEATURES.rtol)
    )


def explain_media(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    given: Given | None = None,
    setup: Setup | None = None,
    elsewhere: Mapping[str, Tensor] | None = None,
) -> Iterator[Cause]:
    """A cause for each item of one row that differs. ``given``: the row, whose files are read again
    to see which frames of them each side took; without it that is not told. ``elsewhere``: items of
    other rows, by name, of which one may stand in its place."""
    for item in dict.fromkeys((*a, *b)):
        kind = item.partition("_")[0]
        was, now = a.get(item), b.get(item)
        if was is None or now is None:
            what = "has no such item" if now is None else "has one that the first has not"
            yield Cause(f"{kind}-missing", f"{_name(item)}: the second {what}")
            continue
        if alike(was, now):
            continue
        if kind == "video" and given is not None and setup is not None:
            found = _frames(item, was, now, given, setup)
            if found is not None:
                yield found
                continue
        others = {
            _name(name): other
            for name, other in {**a, **(elsewhere or {})}.items()
            if name != item and name.startswith(kind)
        }
        made = reproductions(was, now, alike, axes=_AXES[kind], others=others)
        if made:
            sentence = told(f"{_name(item)}: what the second has is the first's", made)
            # one side of a picture only
            resized = kind != "audio" and made[0].name == "resampled"
            yield Cause(f"{kind}-{'resized' if resized else made[0].name}", sentence)
        elif kind == "audio" and given is not None and (read := _librosa(item, now, given)):
            yield read
        else:
            yield Cause(f"{kind}-differs", f"{_name(item)}: {difference(was, now)}")


def _name(item: str) -> str:
    return item.replace("_", " ")


def _frames(item: str, was: Tensor, now: Tensor, given: Given, setup: Setup) -> Cause | None:
    """Which frames of the file each side took; ``None`` if that is not the difference."""
    every = _every_frame(item, was, given, setup)
    if every is None or now.shape[1] != was.shape[1]:
        return None
    size, apart = "", _SAME_FRAME
    if was.shape[2:] != now.shape[2:]:
        size = f", at {_by(now.shape)} instead of {_by(was.shape)} pixels"
        apart = _RESIZED_FRAME
        now = interpolate(now, tuple(was.shape[2:]), mode="bilinear", antialias=True)
    first, second = _numbers(was, every, _SAME_FRAME), _numbers(now, every, apart)
    if first is None or second is None:
        return None
    if first == second:
        name = f"{_name(item)}: the same frames{size}"
        return Cause("video-resized", name) if size else None
    count = f"{len(now)} frames instead of {len(was)}, " if len(was) != len(now) else ""
    return Cause(
        "other-frames",
        f"{_name(item)}: {count}frames {_listed(second)} of the file's {len(every)}, where the "
        f"first takes {_listed(first)}{size}",
    )


def _by(shape: Sequence[int]) -> str:
    return f"{shape[-1]} x {shape[-2]}"


def _every_frame(item: str, like: Tensor, given: Given, setup: Setup) -> Tensor | None:
    """All frames of an item's file, 0 to 1, at the size of ``like`` (T, 3, H, W)."""
    videos = [part for part in given.conversation.media if part.ref.modality == "video"]
    number = int(item.partition("_")[2])
    if number >= len(videos):
        return None
    alone = Conversation("row", (Message("user", (MediaPart(videos[number].ref),)),), "off")
    area = like.shape[-1] * like.shape[-2]
    config = replace(
        setup.settings.media, fps=float(MAX_FPS), max_frames=768, min_pixels=area, max_pixels=area
    )
    try:
        clip = load_media(alone, config, patch_size=setup.policy.patch_size).videos[0]
    except OmniGrpoError:
        return None
    frames = clip.frames / 255
    return frames if frames.shape[1:] == like.shape[1:] else None


def _numbers(frames: Tensor, every: Tensor, most: float) -> list[int] | None:
    """The number in the file of each frame; ``None`` if one is none of them."""
    found = []
    for frame in frames:
        apart = (every - frame).abs().flatten(1).mean(1)
        best = int(apart.argmin())
        if float(apart[best]) > most:
            return None
        found.append(best)
    return found


def _listed(numbers: Sequence[int], most: int = 12) -> str:
    shown = " ".join(map(str, numbers[:most]))
    return shown + (" …" if len(numbers) > most else "")


def _librosa(item: str, now: Tensor, given: Given) -> Cause | None:
    """Whether a waveform is what librosa reads: its resampler is another than our decoder's."""
    sounds = [part for part in given.conversation.media if part.ref.modality == "audio"]
    number = int(item.partition("_")[2])
    if number >= len(sounds) or Path(sounds[number].ref.path).suffix.lower() != ".wav":
        return None
    import librosa  # takes a second

    read, _ = librosa.load(sounds[number].ref.path, sr=AUDIO_SAMPLING_RATE)
    if not alike(torch.from_numpy(read), now):
        return None
    return Cause("other-resampler", f"{_name(item)}: resampled by librosa (soxr)")
