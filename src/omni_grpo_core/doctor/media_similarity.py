"""Whether a recorded picture, clip or sound is a file's content, up to the differences between
correct readers.

An item too large to keep is compared by size, mean and standard deviation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from omni_grpo_core.pipeline.checks import BLANK, SILENT
from omni_grpo_core.trace.calls import MediumSeen
from omni_grpo_core.types import Modality

if TYPE_CHECKING:
    from torch import Tensor

_OTHER_FRAMES = 1.0
"""Mean difference in grey levels: two correct decoders of a file agree within half a level."""
_OTHER_LENGTH = 0.02
"""Of a sound's length: readers differ by a codec's priming, a few hundredths of a second."""
PRIMING = 3200
"""Samples by which a reader may begin earlier or later: a fifth of a second."""
_OTHER_TIMBRE = 0.44
"""The part of a sound that its file may leave unexplained where no other sound explains it better.
Chosen, not measured: the shipped clips leave 0 of a sound that PyAV resampled, .03 to .18 of one
played backwards, .1 and .37 of others of one pitch, and 1 of all others."""
_OTHER_SOUND = 0.2
"""Of a sound's standard deviation."""
OTHER_WAVE = 0.05
"""Root mean square of a difference, by the sound's deviation."""
_OTHER_RESIZER = 0.25
"""Mean difference by a picture's deviation: first frames of the shipped clips differ by up to .02
between bilinear and bicubic, those of two clips by .33 to above 1."""
_UNIT = 1.5
"""No picture in grey levels is as dark as this throughout."""


def is_empty(medium: MediumSeen) -> bool:
    """Whether a recorded item is blank or silent, at any scale."""
    if medium.modality == "audio":
        return medium.high - medium.low < 2 * SILENT
    scale = 1.0 if medium.high > 1.5 or medium.dtype == "uint8" else 255.0
    return medium.std * scale < BLANK


def is_flat(values: Tensor, modality: Modality) -> bool:
    """The same for a file's own array."""
    if modality == "audio":
        return bool(values.max() - values.min() < 2 * SILENT)
    return bool(values.std() < BLANK)


def array(medium: MediumSeen) -> Tensor | None:
    """Float values, channels first as in the reference; ``None`` where not kept."""
    values = medium.values
    if values is None:
        return None
    if medium.modality == "audio":
        return values.flatten().float()
    if values.shape[-1] == 3 and values.shape[-3] != 3:
        values = values.movedim(-1, -3)
    return values.float()


def levels(values: Tensor, keywords: Mapping[str, Any]) -> Tensor:
    """Pictures in grey levels: floats between 0 and 1 where the processor is told not to rescale
    them itself."""
    groups = [keywords.get(name) for name in ("images_kwargs", "videos_kwargs")]
    places = [keywords, *(group for group in groups if isinstance(group, Mapping))]
    scaled = any(place.get("do_rescale") is False for place in places)
    return values * 255 if scaled and float(values.max()) <= _UNIT else values


def same_levels(made: Tensor, got: Tensor) -> bool:
    """Whether two pictures or clips are the same but for their decoder."""
    return made.shape == got.shape and bool((made - got).abs().mean() <= _level(got))


def looks_alike(made: Tensor, got: Tensor) -> bool:
    """The same, also where another resizer was used."""
    if made.shape != got.shape:
        return False
    gap = float((made - got).abs().mean())
    return gap <= _level(got) or gap <= _OTHER_RESIZER * float(got.std(correction=0))


def _level(values: Tensor) -> float:
    """The most that two decoders differ by, at the scale of ``values``."""
    return _OTHER_FRAMES if float(values.abs().max()) > _UNIT else _OTHER_FRAMES / 255


def same_wave(made: Tensor, got: Tensor) -> bool:
    """Whether two sounds of one length are the same, sample by sample."""
    if made.shape != got.shape:
        return False
    gap = (made.double() - got.double()).pow(2).mean().sqrt()
    return bool(gap <= OTHER_WAVE * got.double().std(correction=0))


def sounds_alike(values: Tensor, reference: Tensor) -> bool:
    """Whether two sounds may be the same but for their readers, which resample in their own ways
    and may begin with a codec's priming."""
    both = aligned(values, reference)
    if both is None:
        return False
    one, other = (sound.float().std() for sound in both)
    if (one - other).abs() > _OTHER_SOUND * other:
        return False
    return unexplained(values, reference) <= _OTHER_TIMBRE


def unexplained(values: Tensor, reference: Tensor) -> float:
    """The part of a sound that another does not explain at its best loudness and offset, as a share
    of its root mean square: 0 is the same sound, 1 nothing in common.

    >>> tone = torch.sin(torch.arange(100) / 3)
    >>> round(unexplained(2 * tone, tone), 3), round(unexplained(tone, torch.ones(10)), 3)
    (0.0, 1.0)
    """
    both = aligned(values, reference)
    return 1.0 if both is None else _left_of(*both)


def moved(values: Tensor, reference: Tensor) -> tuple[int, float]:
    """By how many samples a sound comes later than another of about its length, and what that
    leaves unexplained of the half at least that they share; (0, 1.0) where nothing fits."""
    if not _as_long(values, reference):
        return 0, 1.0
    most = min(len(values), len(reference)) // 2
    # a steady tone agrees at many offsets: the silence that fills one end tells its own
    heard = (values.abs() > SILENT).nonzero().flatten()
    ends = (int(heard[0]), int(heard[-1]) + 1 - len(values)) if len(heard) else ()
    tried = {_offset(values, reference, most), *(by for by in ends if abs(by) <= most)}
    return min(
        ((by, _left_of(*_shared(values, reference, by))) for by in tried), key=lambda one: one[1]
    )


def aligned(values: Tensor, reference: Tensor) -> tuple[Tensor, Tensor] | None:
    """The stretches that two sounds share where they agree best, moved against each other by at
    most a codec's priming; ``None`` where their lengths differ more than readers' do. A change of
    sign is not heard."""
    if not _as_long(values, reference):
        return None
    most = min(PRIMING, len(values) - 1, len(reference) - 1)
    return _shared(values, reference, _offset(values, reference, most))


def _as_long(one: Tensor, other: Tensor) -> bool:
    longest, shortest = (pick(len(one), len(other)) for pick in (max, min))
    return shortest > 0 and longest <= (1 + _OTHER_LENGTH) * shortest


def _offset(values: Tensor, reference: Tensor, most: int) -> int:
    """By how many samples a sound comes later than another, where they agree best."""
    size = 2 * max(len(values), len(reference))
    one, other = (sound.float() - sound.float().mean() for sound in (values, reference))
    spectra = torch.fft.rfft(one, size), torch.fft.rfft(other, size)
    found = torch.fft.irfft(spectra[0] * spectra[1].conj(), size).abs()
    offsets = torch.arange(-most, most + 1)
    return int(offsets[found[offsets].argmax()])


def _shared(values: Tensor, reference: Tensor, by: int) -> tuple[Tensor, Tensor]:
    later, earlier = values[max(by, 0) :], reference[max(-by, 0) :]
    length = min(len(later), len(earlier))
    return later[:length], earlier[:length]


def _left_of(values: Tensor, reference: Tensor) -> float:
    one, other = (sound.float() - sound.float().mean() for sound in (values, reference))
    gain = (one @ other) / (other @ other).clamp(min=1e-12)
    return float((one - gain * other).norm() / one.norm().clamp(min=1e-12))
