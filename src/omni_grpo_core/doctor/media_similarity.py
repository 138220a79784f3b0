"""Whether a recorded picture, clip or sound is a file's content, up to the differences between
correct readers.

An item too large to keep is compared by size, mean and standard deviation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
_OTHER_SPECTRUM = 0.9
"""Cosine similarity of two magnitude spectra, which a shift by the priming does not change: below
.03 between two shipped clips, above .999 for one clip shifted or resampled by another method."""
_OTHER_SOUND = 0.2
"""Of a sound's standard deviation."""


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


def is_same(medium: MediumSeen, reference: Tensor) -> bool:
    """Whether ``medium`` is what the reference read from a file."""
    values = array(medium)
    if values is not None:
        return is_close(values, reference, medium.modality)
    if sorted(medium.shape) != sorted(reference.shape):
        return False
    gap = abs(medium.mean - float(reference.mean()))
    spread = abs(medium.std - float(reference.std(correction=0)))
    if medium.modality == "audio":
        return spread <= _OTHER_SOUND * float(reference.std(correction=0))
    return gap <= _OTHER_FRAMES and spread <= _OTHER_FRAMES


def is_close(values: Tensor, reference: Tensor, modality: Modality) -> bool:
    """Whether two arrays of one modality look or sound the same."""
    if modality == "audio":
        return _sounds_alike(values, reference)
    if values.shape != reference.shape:
        return False
    return bool((values - reference).abs().mean() <= _OTHER_FRAMES)


def _sounds_alike(values: Tensor, reference: Tensor) -> bool:
    length = min(len(values), len(reference))
    if max(len(values), len(reference)) > (1 + _OTHER_LENGTH) * length:
        return False
    one, other = values[:length], reference[:length]
    if torch.equal(one, other):
        return True
    if (one.std() - other.std()).abs() > _OTHER_SOUND * other.std():
        return False
    spectra = torch.fft.rfft(one).abs(), torch.fft.rfft(other).abs()
    return bool(torch.cosine_similarity(*spectra, dim=0) >= _OTHER_SPECTRUM)
