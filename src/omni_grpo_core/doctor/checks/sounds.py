"""What a sound is of its file: unchanged, changed in a way that is known, or another one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from omni_grpo_core.doctor.checks.other_files import beside, near, others, swapped
from omni_grpo_core.doctor.evidence import Case, Evidence
from omni_grpo_core.doctor.media_similarity import (
    OTHER_WAVE,
    PRIMING,
    aligned,
    moved,
    same_wave,
    sounds_alike,
    unexplained,
)
from omni_grpo_core.doctor.reproduce import Reproduction, difference, plain, reproductions, told
from omni_grpo_core.doctor.reproduce_shape import band_limited, ordinal
from omni_grpo_core.doctor.shown_media import Shown
from omni_grpo_core.types import AUDIO_SAMPLING_RATE as RATE

if TYPE_CHECKING:
    from torch import Tensor

_CHOICES = frozenset({"last-dropped", "first-dropped", "cropped", "padded"})
"""Changes of a sound that a recipe may make on purpose."""
_CLEARLY = 0.25
"""Of what its own file leaves of a sound: another that leaves less is what was really heard."""
_RATES = (8_000, 11_025, 12_000, 22_050, 24_000, 32_000, 44_100, 48_000)
"""Sampling rates of files and readers, in Hz, other than the model's."""


def sound(
    case: Case, item: Shown, values: Tensor, reference: Tensor, every: Sequence[Shown],
    known: dict[str, Any],
) -> Iterator[Evidence]:  # fmt: skip
    if same_wave(reference, values):
        return
    rest = unexplained(values, reference)
    better = min(rest * _CLEARLY, OTHER_WAVE)
    for other in _other_sounds(item, every):
        if other.values is not None and unexplained(values, other.values) < better:
            yield from swapped(item, other, every, known)
            return
    found: tuple[Reproduction, ...]
    by, left = moved(values, reference)
    if left < better and abs(by) > PRIMING:
        said = f"{abs(by) / RATE:.3g} s {'later' if by > 0 else 'earlier'}"
        found = (Reproduction("shifted", said, {"by": by}),)
    elif unexplained(values, reference.flip(0)) < better:
        found = (Reproduction("reversed", "with its samples in reverse order"),)
    elif rest <= OTHER_WAVE and sounds_alike(values, reference):
        return  # another reader, which may begin with its codec's priming
    else:
        found = _changed_sound(values, reference, rest)
        if not found and sounds_alike(values, reference):
            return
        for other in () if found else beside(item, case):
            if other.values is not None and unexplained(values, other.values) < better:
                yield from swapped(item, other, every, known)
                return
    yield _sound_differs(item, values, reference, found, known)


def _other_sounds(item: Shown, every: Sequence[Shown]) -> list[Shown]:
    return [other for other in others(item, near(item, every)) if other.ref.modality == "audio"]


def _changed_sound(values: Tensor, reference: Tensor, rest: float) -> tuple[Reproduction, ...]:
    """A change of the whole sound; of the stretch that another reader's shares with it, where it
    has the same waves; or of its speed."""
    both = aligned(values, reference) if rest <= OTHER_WAVE else None
    got, want = both or (values, reference)
    found = reproductions(want, got, same_wave, axes=("samples",))
    if found or both:
        return found
    return tuple(one for one, made in _at_other_rates(reference, len(values) / len(reference))
                 if unexplained(values, made) <= OTHER_WAVE)[:1]  # fmt: skip


def _at_other_rates(reference: Tensor, ratio: float) -> Iterator[tuple[Reproduction, Tensor]]:
    """Sounds of about ``ratio`` times as many samples, as other sampling rates give them."""
    every = round(1 / ratio)
    if every > 1:
        said = f"with only every {ordinal(every)} of its samples"
        yield Reproduction("strided", said, {"every": every}), reference[::every]
    rate = min(_RATES, key=lambda rate: abs(math.log(rate / RATE / ratio)))
    said = f"resampled to {rate} Hz, {rate / RATE:.4g} times as many samples"
    made = band_limited(reference.float()[None], round(len(reference) * rate / RATE))[0]
    yield Reproduction("resampled", said, {"times": rate / RATE}), made


def _sound_differs(
    item: Shown,
    values: Tensor,
    reference: Tensor,
    found: Sequence[Reproduction],
    known: dict[str, Any],
) -> Evidence:
    known |= {"factor": len(values) / len(reference), **plain(found)}
    names = {one.name for one in found}
    quiet = "times" in names and 0.05 < abs(float(known["times"])) < 20  # normalised loudness
    breaks = not (found and (names <= _CHOICES or quiet))
    if found:
        said = told(f"the sound of row {item.row} is that of {known['file']}", found)
        fact = "sound-changed"
    elif abs(known["factor"] - 1) > 0.02:
        fact = "sound-length"
        said = (
            f"row {item.row} gets {len(values)} samples of {known['file']}, which has "
            f"{len(reference)}"
        )
    else:
        fact = "content-differs"
        said = (
            f"row {item.row} gets another sound than {known['file']}: "
            f"{difference(reference[: len(values)], values[: len(reference)])}"
        )
    return Evidence(
        "media", fact, said, row=item.row, values=known,
        severity="breaks" if breaks else "differs",
    )  # fmt: skip
