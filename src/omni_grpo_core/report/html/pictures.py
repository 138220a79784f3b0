"""Tensors as pictures: frames, waveforms and mel spectrograms as ``data:`` URIs."""

from __future__ import annotations

import base64
import io
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from omni_grpo_core.report.html import Tick
from omni_grpo_core.types import AUDIO_SAMPLING_RATE

_EXACT, _LARGEST = 64, 160
"""Longest side, in pixels, of a picture kept exact, and of a compressed copy. A dozen clips of
sixteen frames must fit into a page of 3 MB."""
_COLUMNS = 800
_WAVE_HEIGHT = 64
_WAVE_COLOUR = (46, 134, 193, 255)
"""A mid blue: contrast of at least 3:1 against both a white and a near-black page."""
_SHADES = 65
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Five even steps of matplotlib's viridis: even in lightness, so it survives greyscale printing."""


@dataclass(frozen=True, slots=True)
class Picture:
    """``uri``: a ``data:`` URI. ``width``, ``height``: of the pixels given to the model.
    ``exact``: those very pixels, not a smaller or compressed copy."""

    uri: str
    width: int
    height: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Spectrogram:
    """``low``, ``high``: the feature values at the ends of the colour scale."""

    picture: Picture
    low: float
    high: float


def frame_picture(pixels: Tensor) -> Picture:
    """RGB ``pixels`` (3, height, width) in 0..255 as they are (PNG); large ones as a copy (JPEG).

    Enlarging tiny ones is left to the page, which shows each pixel as a square.
    """
    whole = torch.nan_to_num(pixels.detach().cpu().float()).round().clamp(0, 255).to(torch.uint8)
    image = PILImage.fromarray(whole.permute(1, 2, 0).contiguous().numpy())
    width, height = image.size
    exact = max(width, height) <= _EXACT
    if not exact:
        image.thumbnail((_LARGEST, _LARGEST))
    return Picture(_uri(image, "PNG" if exact else "JPEG"), width, height, exact)


def waveform_picture(samples: Tensor) -> Picture:
    """The envelope of ``samples`` (n,), scaled to its own peak, on a transparent background."""
    wave = torch.nan_to_num(samples.detach().cpu().float())
    columns = max(1, min(_COLUMNS, len(wave)))
    edges = np.linspace(0, len(wave), columns + 1).astype(int)
    peak = max(float(wave.abs().max()), 1e-9) if len(wave) else 1.0
    middle = (_WAVE_HEIGHT - 1) / 2
    canvas = np.zeros((_WAVE_HEIGHT, columns, 4), dtype=np.uint8)
    for column, (begin, end) in enumerate(itertools.pairwise(edges)):
        part = wave[begin:end] / peak if end > begin else torch.zeros(1)
        # always from the middle line: a column may hold a single sample
        top = int(middle - max(float(part.max()), 0.0) * middle)
        bottom = math.ceil(middle - min(float(part.min()), 0.0) * middle)
        canvas[top : bottom + 1, column] = _WAVE_COLOUR
    return Picture(_uri(PILImage.fromarray(canvas), "PNG"), columns, _WAVE_HEIGHT, False)


def mel_picture(features: Tensor) -> Spectrogram:
    """Audio features (mels, frames) as given to the model: time runs right, pitch runs up, dark is
    quiet. Beyond 800 frames they are averaged."""
    values = torch.nan_to_num(features.detach().cpu().float())
    mels, frames = values.shape
    exact = frames <= _COLUMNS
    if not exact:
        values = torch.nn.functional.adaptive_avg_pool1d(values[None], _COLUMNS)[0]
    low, high = (float(values.min()), float(values.max())) if values.numel() else (0.0, 0.0)
    scaled = ((values - low) / max(high - low, 1e-9)).flip(0)
    # a palette takes a quarter of the bytes of full colour, and no eye tells more steps apart
    image = PILImage.fromarray((scaled * (_SHADES - 1)).round().to(torch.uint8).numpy(), "P")
    image.putpalette(_palette().tobytes())
    return Spectrogram(Picture(_uri(image, "PNG"), frames, mels, exact), low, high)


def ticks(seconds: float) -> tuple[Tick, ...]:
    """At most seven round times on an axis of ``seconds``, as percentages of its length.

    >>> [tick.label for tick in ticks(1.0)]
    ['0 s', '0.2', '0.4', '0.6', '0.8', '1']
    """
    if seconds <= 0:
        return (Tick(0.0, "0 s"),)
    steps = (base * 10.0**power for power in range(-2, 6) for base in (1, 2, 5))
    step = next((s for s in steps if seconds / s <= 6), seconds)
    # an axis of 0.9999 s still ends with a tick
    count = int(seconds / step + 1e-3)
    return tuple(
        Tick(min(100.0, 100 * i * step / seconds), f"{i * step:g}" + ("" if i else " s"))
        for i in range(count + 1)
    )


def seconds_of(samples: Tensor) -> float:
    """Length of a 16 kHz waveform (n,)."""
    return len(samples) / AUDIO_SAMPLING_RATE


def _palette() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """RGB of each shade, (_SHADES, 3)."""
    place = np.linspace(0, len(_VIRIDIS) - 1, _SHADES)
    steps = np.arange(len(_VIRIDIS))
    channels = [np.interp(place, steps, [colour[i] for colour in _VIRIDIS]) for i in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _uri(image: PILImage.Image, format: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": 85} if format == "JPEG" else {"optimize": True}))
    code = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{format.lower()};base64,{code}"
