"""Media read from their files again in the other ways in which people read them: which one gives
what a path shows the model?"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import av
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from omni_grpo_core.core.decode import existing_file, inspect, read_frames, recount
from omni_grpo_core.types import AUDIO_SAMPLING_RATE, MediaRef

Picture = PIL.Image.Image
_LEVEL = 1.01 / 255
"""One of 256 grey levels: two implementations of one kernel round differently."""
_BETTER = 0.5
"""Of the distance between the two sides: a kernel that is named must be the other's much more than
the first's own is."""
_QUALITIES = (75, 80, 85, 90, 95)

# --------------------------------------------------------------------------- pictures


def read_picture(ref: MediaRef, was: Tensor, now: Tensor) -> tuple[str, str] | None:
    """How a picture (3, H, W), 0 to 1, was opened and resized otherwise: the name of it, and in
    words; ``None`` if by none of these ways."""
    with PIL.Image.open(existing_file(ref.path)) as image:
        image.load()
        opened = {name: change(image) for name, change in _OPENED.items()}
    size, plain = now.shape[-2:], opened[""]
    if float((_bicubic(plain, size) - now).abs().max()) <= _LEVEL:
        return None  # it is read as it should be
    # one thing that is otherwise, before two
    for (name, picture), (kernel, resized) in sorted(
        product(opened.items(), _KERNELS), key=lambda way: bool(way[0][0]) + bool(way[1][0])
    ):
        if (name or kernel) and _is_made(resized(picture, size), was, now):
            return name or "other-kernel", _joined(_SAID.get(name, ""), kernel)
    for quality in _QUALITIES:
        before, after = _jpeg(plain, quality), _jpeg(_picture(_bicubic(plain, size)), quality)
        if any(_is_made(made, was, now) for made in (_bicubic(before, size), _tensor(after))):
            return "jpeg", f"stored as JPEG of quality {quality} in between"
    return None


def frame_kernel(ref: MediaRef, numbers: Sequence[int], was: Tensor, now: Tensor) -> str | None:
    """How these frames (T, 3, H, W) of a clip were resized otherwise."""
    contents = inspect(ref.path)
    contents = recount(contents) if contents.shown is None else contents
    read = dict(read_frames(contents, sorted({*numbers}), timed=False))
    frames = [PIL.Image.fromarray(read[number]) for number in numbers if number in read]
    if len(frames) != len(now):
        return None
    for kernel, resized in _KERNELS:
        # the first frame before all of them
        if kernel and all(
            _is_made(resized(frame, now.shape[-2:]), *sides)
            for frame, *sides in zip(frames, was, now, strict=True)
        ):
            return kernel
    return None


def _is_made(made: Tensor, was: Tensor, now: Tensor) -> bool:
    if float((made - now).abs().max()) > _LEVEL:
        return False
    if was.shape != now.shape:
        return True
    gap, apart = (float((now - one).pow(2).mean().sqrt()) for one in (made, was))
    return gap <= _BETTER * apart


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _upright(image: Picture) -> Picture:
    return PIL.ImageOps.exif_transpose(image)


def _on(colour: int, image: Picture) -> Picture:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    ground = PIL.Image.new("RGB", rgba.size, (colour, colour, colour))
    ground.paste(rgba, mask=rgba.getchannel("A"))
    return ground


_OPENED: Mapping[str, Callable[[Picture], Picture]] = {
    "": lambda image: _on(255, _upright(image)),
    "exif-ignored": lambda image: _on(255, image),
    "transparency-on-black": lambda image: _on(0, _upright(image)),
    "transparency-dropped": lambda image: _upright(image).convert("RGB"),
    "grey": lambda image: _on(255, _upright(image)).convert("L").convert("RGB"),
}
_SAID: Mapping[str, str] = {
    "exif-ignored": "not turned upright as its EXIF says",
    "transparency-on-black": "transparent on black instead of white",
    "transparency-dropped": "with the colours that transparency hides",
    "grey": "without colour",
}


def _jpeg(image: Picture, quality: int) -> Picture:
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=quality)
    return PIL.Image.open(stored).convert("RGB")


def _tensor(image: Picture) -> Tensor:
    """float (3, H, W), 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _picture(tensor: Tensor) -> Picture:
    return PIL.Image.fromarray((tensor * 255).round().byte().permute(1, 2, 0).numpy())


def _pillow(kernel: PIL.Image.Resampling) -> Callable[[Picture, Sequence[int]], Tensor]:
    return lambda image, size: _tensor(image.resize((size[1], size[0]), kernel))


def _torchvision(
    kernel: InterpolationMode, *, antialias: bool
) -> Callable[[Picture, Sequence[int]], Tensor]:
    def resized(image: Picture, size: Sequence[int]) -> Tensor:
        whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        made: Tensor = resize(whole, list(size), kernel, antialias=antialias)
        return made.float() / 255

    return resized


_bicubic = _pillow(PIL.Image.Resampling.BICUBIC)
_KERNELS: tuple[tuple[str, Callable[[Picture, Sequence[int]], Tensor]], ...] = (
    ("", _bicubic),
    ("resized bilinearly", _pillow(PIL.Image.Resampling.BILINEAR)),
    ("resized bilinearly", _torchvision(InterpolationMode.BILINEAR, antialias=True)),
    ("resized by Lanczos' kernel", _pillow(PIL.Image.Resampling.LANCZOS)),
    ("resized by a box", _pillow(PIL.Image.Resampling.BOX)),
    ("resized by Hamming's kernel", _pillow(PIL.Image.Resampling.HAMMING)),
    ("resized to nearest pixels", _pillow(PIL.Image.Resampling.NEAREST)),
    ("resized bilinearly without antialiasing",
     _torchvision(InterpolationMode.BILINEAR, antialias=False)),
    ("resized bicubically without antialiasing",
     _torchvision(InterpolationMode.BICUBIC, antialias=False)),
)  # fmt: skip
"""Without antialiasing, as OpenCV resizes."""

# --------------------------------------------------------------------------- sounds


def read_sound(path: str, now: Tensor, *, resampled: bool = True) -> tuple[str, str] | None:
    """How a waveform (n,) was read from its file otherwise: the name of it, and in words.
    ``resampled``: whether it may have been."""
    raw, rate = _channels(path)
    if not len(raw) or _same(_ours(raw.mean(0), rate, len(now)), now):
        return None  # without samples, or read as it should be
    ways = _RESAMPLED.items() if resampled else [(_IGNORED, _not)]
    for (mixed, channel), (how, change) in sorted(
        product(_mixed(raw).items(), ways), key=lambda way: bool(way[0][0]) + bool(way[1][0])
    ):
        if not (mixed or how):
            continue
        if _same(change(channel, rate, len(now)), now):
            alone = "rate-ignored" if how == _IGNORED else "other-resampler"
            return ("other-channels" if mixed else alone), _joined(mixed, how.format(rate=rate))
    return None


def _same(made: NDArray[np.float32], now: Tensor) -> bool:
    return len(made) == len(now) and bool(np.allclose(made, now.numpy(), atol=1e-4, rtol=1e-4))


def _channels(path: str) -> tuple[NDArray[np.float32], int]:
    """All channels of a track (C, n), -1 to 1, at their own rate."""
    blocks: list[NDArray[np.float32]] = []
    with av.open(str(existing_file(path))) as container:
        stream = container.streams.audio[0]
        rate, count = int(stream.rate), stream.codec_context.channels
        # packed: PyAV reads planes beyond the eighth out of bounds
        packed = av.AudioResampler(format="flt", rate=rate)
        for frame in (*container.decode(stream), None):
            blocks += [one.to_ndarray().reshape(-1, count).T for one in packed.resample(frame)]
    whole = np.concatenate(blocks, 1) if blocks else np.empty((0, 0), np.float32)
    return np.ascontiguousarray(whole), rate


def _mixed(raw: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Ways to one channel."""
    ways = {"": raw.mean(0)}
    if len(raw) > 1:
        ways |= {f"channel {number} only": one for number, one in enumerate(raw)}
        ways["the sum of its channels"] = raw.sum(0)
        ways["its channels mixed as libav does"] = raw.sum(0) / np.sqrt(np.float32(2))
        ways["its channels' samples one after the other"] = raw.T.reshape(-1)
    return ways


def _ours(sound: NDArray[np.float32], rate: int, size: int) -> NDArray[np.float32]:
    resampler = av.AudioResampler(format="flt", layout="mono", rate=AUDIO_SAMPLING_RATE)
    frame = av.AudioFrame.from_ndarray(sound[None], format="flt", layout="mono")
    frame.sample_rate = rate
    return np.concatenate(
        [one.to_ndarray()[0] for f in (frame, None) for one in resampler.resample(f)]
    )


def _librosa(sound: NDArray[np.float32], rate: int, size: int) -> NDArray[np.float32]:
    import librosa  # takes a second

    made: NDArray[np.float32] = librosa.resample(sound, orig_sr=rate, target_sr=AUDIO_SAMPLING_RATE)
    return made


def _linear(sound: NDArray[np.float32], rate: int, size: int) -> NDArray[np.float32]:
    at = np.arange(size) * (rate / AUDIO_SAMPLING_RATE)
    made: NDArray[np.float64] = np.interp(at, np.arange(len(sound)), sound)
    return made.astype(np.float32)


def _decimated(sound: NDArray[np.float32], rate: int, size: int) -> NDArray[np.float32]:
    every, rest = divmod(rate, AUDIO_SAMPLING_RATE)
    return sound[:0] if rest else sound[::every]


def _not(sound: NDArray[np.float32], rate: int, size: int) -> NDArray[np.float32]:
    return sound


_IGNORED = "its {rate} samples a second taken for 16000"
_RESAMPLED: Mapping[str, Callable[[NDArray[np.float32], int, int], NDArray[np.float32]]] = {
    "": _ours,
    _IGNORED: _not,
    "resampled by leaving samples out": _decimated,
    "resampled by linear interpolation": _linear,
    "resampled by librosa (soxr)": _librosa,
}
