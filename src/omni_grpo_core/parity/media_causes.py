"""Why two paths show the model different media: the change that gives the other side's values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from omni_grpo_core.core.conversation import interleaves
from omni_grpo_core.doctor.file_frames import frames_of, matched
from omni_grpo_core.doctor.reproduce import difference, reproductions, told
from omni_grpo_core.parity.given import Given, Setup
from omni_grpo_core.parity.ids_causes import Cause
from omni_grpo_core.parity.read_again import frame_kernel, read_picture, read_sound
from omni_grpo_core.tolerances import FEATURES
from omni_grpo_core.types import MODALITIES, MediaRef

_AXES: Mapping[str, tuple[str, ...]] = {
    "image": ("channels", "height", "width"),
    "video": ("frames", "channels", "height", "width"),
    "audio": ("samples",),
}
_SAME_FRAME = 3.0
"""Mean difference in grey levels up to which a frame is a file's: two decoders round colours
differently, two kernels resize."""
_INT16 = (32768, 32767)
_LIGHT = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in grey (ITU-R BT.601): Pillow's, OpenCV's and torchvision's."""
_LEVEL = 1.01 / 255
"""A grey level: each of them rounds otherwise."""


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
    yield from _missing(a, b)
    for name in (name for name in a if name in b):
        kind = name.partition("_")[0]
        was, now = a[name], b[name]
        if alike(was, now):
            continue
        if not bool(now.isfinite().all()):
            lost = int((~now.isfinite()).sum())
            yield Item(name, was, now, given, setup).cause(
                "not-finite", f"{lost} of {now.numel()} values are not finite"
            )
            continue
        if kind != "audio":  # what undoing the normalisation leaves of a whole number
            was, now = was.round(decimals=6), now.round(decimals=6)
        item = Item(name, was, now, given, setup)
        inside = {_title(n): v for n, v in a.items() if n != name and n.startswith(kind)}
        outside = {_title(n): v for n, v in (elsewhere or {}).items() if n.startswith(kind)}
        found = (
            _another(item, inside)
            or _another(item, outside)
            or _cut_out(item)
            or _frames(item)
            or _unscaled(item)
            or _reproduced(item)
            or _grey(item)
            or _per_colour(item)
        )
        if found is None:
            found = _read_otherwise(item)
        elif found.name == "audio-resampled":  # which only comes near to it
            found = _read_otherwise(item, resampled=False) or found
        elif found.name in ("image-normalised", "video-normalised"):
            found = _per_colour(item) or found  # with the numbers that were set
        yield found or item.cause("differs", difference(was, now))


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One medium of a row as both sides show it."""

    name: str
    was: Tensor
    now: Tensor
    given: Given | None
    setup: Setup | None

    @property
    def kind(self) -> str:
        return self.name.partition("_")[0]

    def cause(self, name: str, said: str) -> Cause:
        """A cause about it; the name gets its kind in front."""
        return Cause(f"{self.kind}-{name}", f"{_title(self.name)}: {said}")

    @property
    def ref(self) -> MediaRef | None:
        """Its file."""
        if self.given is None:
            return None
        found: list[MediaRef] = []
        videos = 0
        for part in self.given.conversation.media:
            is_video = part.ref.modality == "video"
            inside = is_video and interleaves(self.given.conversation.audio_in_video, videos)
            if part.ref.modality == self.kind or (self.kind == "audio" and inside):
                found.append(part.ref)
            videos += is_video
        number = int(self.name.partition("_")[2])
        return found[number] if number < len(found) else None


def _missing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Iterator[Cause]:
    for side, other, what in (
        (a, b, "the second has no such item"),
        (b, a, "the second has it, the first has not"),
    ):
        for kind in MODALITIES:
            items = [_title(i) for i in side if i.startswith(kind) and i not in other]
            if items:
                yield Cause(f"{kind}-missing", f"{_run_of(items)}: {what}")


def _run_of(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{items[0]} to {items[-1].split()[-1]}"


def _title(name: str) -> str:
    return name.replace("_", " ")


def _another(item: Item, others: Mapping[str, Tensor]) -> Cause | None:
    names = [name for name, other in others.items() if alike(other, item.now)]
    if not names:
        return None
    said = " or ".join(f"of {name}" for name in names)
    return item.cause("swapped-with", f"what the second has is the first's {said} instead")


def _reproduced(item: Item) -> Cause | None:
    made = reproductions(item.was, item.now, alike, axes=_AXES[item.kind])
    if not made:
        return None
    # one side of a picture only
    resized = item.kind != "audio" and made[0].name == "resampled"
    name = "resized" if resized else made[0].name
    return item.cause(name, told("what the second has is the first's", made))


def _cut_out(item: Item) -> Cause | None:
    """A part of each frame, or more around it: not to be taken for frames at another size."""
    was, now = item.was.shape, item.now.shape
    if item.kind == "audio" or was[:-2] != now[:-2] or was == now:
        return None
    found = _reproduced(item)
    return None if found is None or found.name.endswith("resized") else found


def _unscaled(item: Item) -> Cause | None:
    """int16 samples rounded to whole numbers, beside which the tolerance of a waveform is small."""
    for scale in _INT16 if item.kind == "audio" else ():
        if alike(item.now / scale, item.was):
            said = f"times {scale} (int16 samples never divided by {scale})"
            return item.cause("times", f"what the second has is the first's {said}")
    return None


def _grey(item: Item) -> Cause | None:
    was, now = item.was, item.now
    if item.kind == "audio" or was.shape != now.shape:
        return None
    light = sum(share * was.select(-3, n) for n, share in enumerate(_LIGHT))
    apart = (now - torch.as_tensor(light).unsqueeze(-3)).abs().max()
    return item.cause("grey", "without colour") if float(apart) <= _LEVEL else None


def _per_colour(item: Item) -> Cause | None:
    """Another mean and deviation of each colour; or values rounded after the normalisation."""
    was, now = item.was, item.now
    if item.setup is None or item.kind == "audio" or was.shape != now.shape:
        return None
    family = item.setup.policy.family
    mean, std = (torch.tensor(v)[:, None, None] for v in (family.image_mean, family.image_std))
    normal = (was - mean) / std
    for dtype in (torch.bfloat16, torch.float16):
        if alike(normal.to(dtype).float() * std + mean, now):
            said = str(dtype).removeprefix("torch.")
            return item.cause(f"cast-{said}", f"rounded to {said}")
    colours = [one.movedim(-3, 0).flatten(1).double() for one in (was, now)]
    centred = [one - one.mean(1, keepdim=True) for one in colours]
    slope = (centred[0] * centred[1]).sum(1) / centred[0].pow(2).sum(1)
    start = colours[1].mean(1) - slope * colours[0].mean(1)
    made = colours[0] * slope[:, None] + start[:, None]
    if not bool((slope > 0).all()) or not alike(made, colours[1]):
        return None
    # now = (was - m) / s * std + mean, with their m and s
    theirs = (mean.flatten() - start) / slope, std.flatten() / slope
    numbers = (" ".join(f"{round(float(n), 3) + 0.0:g}" for n in values) for values in theirs)
    return item.cause("normalised", "with mean {} and deviation {}".format(*numbers))


def _read_otherwise(item: Item, *, resampled: bool = True) -> Cause | None:
    ref = item.ref
    if ref is None or ref.start is not None or ref.end is not None:
        return None
    found = None
    if item.kind == "audio":
        found = read_sound(ref.path, item.now, resampled=resampled)
    elif item.kind == "image":
        found = read_picture(ref, item.was, item.now)
    return None if found is None else item.cause(*found)


def _frames(item: Item) -> Cause | None:
    """Which frames of the file each side took, and how they were resized; ``None`` if that is not
    the difference."""
    was, now, ref = item.was, item.now, item.ref
    if item.kind != "video" or ref is None or now.shape[1] != was.shape[1]:
        return None
    own, theirs = (frames_of(ref, (side.shape[-2], side.shape[-1])) for side in (was, now))
    if own is None or theirs is None:
        return None
    # theirs from the file, or from what the first has of it, resized once more
    twice = interpolate(own.pictures.float(), tuple(now.shape[-2:]), mode="bicubic", antialias=True)
    first = matched(was * 255, own.pictures)
    second = min(
        (matched(now * 255, every) for every in (theirs.pictures, twice)), key=lambda m: m.gap
    )
    if max(first.gap, second.gap) > _SAME_FRAME:
        return None
    size = "" if was.shape[2:] == now.shape[2:] else (
        f", at {_by(now.shape)} instead of {_by(was.shape)} pixels"
    )  # fmt: skip
    if first.numbers == second.numbers:
        if size:
            return item.cause("resized", f"the same frames{size}")
        kernel = frame_kernel(ref, second.numbers, was, now)
        return None if kernel is None else item.cause("other-kernel", kernel)
    count = f"{len(now)} frames instead of {len(was)}, " if len(was) != len(now) else ""
    return Cause(
        "other-frames",
        f"{_title(item.name)}: {count}frames {_listed(second.numbers)} of the file's "
        f"{len(own.pictures)}, where the first takes {_listed(first.numbers)}{size}",
    )


def _by(shape: Sequence[int]) -> str:
    return f"{shape[-1]} x {shape[-2]}"


def _listed(numbers: Sequence[int], most: int = 12) -> str:
    shown = " ".join(map(str, numbers[:most]))
    return shown + (" …" if len(numbers) > most else "")
