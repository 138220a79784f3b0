"""Looks at what media hold: each is the file that its conversation names, unchanged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import torch

from omni_grpo_core.doctor.checks.text import look_one_for_all
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged, note_missing
from omni_grpo_core.doctor.file_frames import FileFrames, Matched, frames_of, matched, spacing
from omni_grpo_core.doctor.media_similarity import (
    OTHER_WAVE,
    PRIMING,
    aligned,
    array,
    is_empty,
    is_flat,
    levels,
    looks_alike,
    moved,
    same_levels,
    same_wave,
    sounds_alike,
    unexplained,
)
from omni_grpo_core.doctor.rendered import RenderedBatch, rendered_batches
from omni_grpo_core.doctor.replay import media as replay_media
from omni_grpo_core.doctor.replay.batch import DEFAULT_RATE, rate_of
from omni_grpo_core.doctor.reproduce import (
    Reproduction,
    difference,
    plain,
    reproductions,
    told,
)
from omni_grpo_core.doctor.reproduce_shape import band_limited, ordinal
from omni_grpo_core.doctor.shown_media import (
    Shown,
    array_of,
    has_settings,
    picture_of,
    read_file,
    shown,
)
from omni_grpo_core.trace.calls import MediumSeen, ProcessorCall
from omni_grpo_core.types import AUDIO_SAMPLING_RATE as RATE
from omni_grpo_core.types import Modality

if TYPE_CHECKING:
    from torch import Tensor

_AXES = ("frames", "channels", "height", "width")
_WRONG_RATE = 1 / 3
"""Of the true frame rate: a clip is shown at another speed."""
_OTHER_RATE = 0.02
"""The same, up to which a rate is the true one, rounded or of whole frames."""
_CHOICES = frozenset({"last-dropped", "first-dropped", "cropped", "padded"})
"""Changes of a sound that a recipe may make on purpose."""
_CLEARLY = 0.25
"""Of what its own file leaves of a sound: another that leaves less is what was really heard."""
_RATES = (8_000, 11_025, 12_000, 22_050, 24_000, 32_000, 44_100, 48_000)
"""Sampling rates of files and readers, in Hz, other than the model's."""
_LOUD = 1.5
"""A float sound is between -1 and 1."""


def look_content(case: Case) -> Iterator[Evidence]:
    """Each media item is the file that its conversation names, neither blank nor silent."""
    # one prompt for all rows: it is the text that is wrong, and names other rows' files
    lost = any(look_one_for_all(case))
    calls = [(one, call) for one in rendered_batches(case) for call in one.processed]
    every = [item for one, call in calls for item in shown(one, call, case)]
    for one, call in calls:
        yield from _values(call)
        found = shown(one, call, case)
        if call.videos and not found:
            note_missing(case, "media could not be matched to messages: files not compared")
        if any(item.media is None for item in found):
            note_missing(case, "some media files were not found: content not compared")
        if any(medium.dtype == "path" for medium in _media(call)):
            note_missing(
                case,
                "the processor was passed paths and decoded them with whatever is installed: "
                "the frames and sound that it used were not recorded",
            )
        for item in _once(found):
            if item.given.shape and item.media is not None:
                for evidence in _content(case, call, item, every):
                    yield replace(evidence, origin="inherited") if lost else evidence
        if not any(item.media is not None for item in found):
            yield from _all_empty(one, call, case)


def _values(call: ProcessorCall) -> Iterator[Evidence]:
    """What is wrong whatever the file holds."""
    for number, sound in enumerate(call.audios):
        values = sound.values
        largest = max(abs(sound.low), abs(sound.high))
        whole = values is not None and bool((values == values.round()).all())
        if largest > _LOUD and whole:
            yield Evidence(
                "media",
                "never-divided",
                f"sound {number} has whole numbers up to {largest:g}: int16 samples never divided "
                "by 32768",
                values={"largest": largest, "modality": "audio"},
            )
            return


def _content(
    case: Case, call: ProcessorCall, item: Shown, every: Sequence[Shown]
) -> Iterator[Evidence]:
    reference = item.values
    if reference is None:
        return
    name = PurePath(item.ref.path).name
    known = {"file": name, "modality": item.ref.modality, "row": item.row}
    note_judged(case, "media")
    if is_empty(item.given):
        if not is_flat(reference, item.ref.modality):
            yield _empty(item, name, known)
        return
    values = array(item.given)
    if values is None:
        note_missing(case, "some media were too large to keep: content not compared")
    elif item.ref.modality == "audio":
        yield from _sound(item, values, reference, every, known)
    else:
        yield from _pictures(case, call, item, levels(values, call.keywords), every, known)


def _empty(item: Shown, name: str, known: Mapping[str, Any]) -> Evidence:
    what = "silent" if item.ref.modality == "audio" else "blank"
    return Evidence(
        "media",
        f"medium-{what}",
        f"{item.ref.modality} {item.number} of row {item.row} is {what}, with all values between "
        f"{item.given.low:g} and {item.given.high:g}, while {name} is not",
        row=item.row,
        values=known,
    )


def _others(item: Shown, every: Sequence[Shown]) -> list[Shown]:
    """Items of other files, each file once, those of the same row first."""
    near = sorted(every, key=lambda other: other.row != item.row)
    refs: dict[object, Shown] = {}
    for other in near:
        if other.ref.path != item.ref.path:
            refs.setdefault(other.ref, other)
    return list(refs.values())


def _swapped(item: Shown, twin: Shown, known: Mapping[str, Any]) -> Evidence:
    other = PurePath(twin.ref.path).name
    of = ", its own at another place," if twin.row == item.row else f" of row {twin.row}"
    return Evidence(
        "media",
        "media-swapped",
        f"row {item.row} gets {other}{of} where its messages name {known['file']}",
        row=item.row,
        values={**known, "shown": other, "of": twin.row},
    )


# --------------------------------------------------------------------------- sound


def _sound(
    item: Shown, values: Tensor, reference: Tensor, every: Sequence[Shown], known: dict[str, Any]
) -> Iterator[Evidence]:
    if same_wave(reference, values):
        return
    rest = unexplained(values, reference)
    better = min(rest * _CLEARLY, OTHER_WAVE)
    for other in _other_sounds(item, every):
        if other.values is not None and unexplained(values, other.values) < better:
            yield _swapped(item, other, known)
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
    yield _sound_differs(item, values, reference, found, known)


def _other_sounds(item: Shown, every: Sequence[Shown]) -> list[Shown]:
    return [other for other in _others(item, every) if other.ref.modality == "audio"]


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


# --------------------------------------------------------------------------- pictures


def _pictures(
    case: Case, call: ProcessorCall, item: Shown, values: Tensor, every: Sequence[Shown],
    known: dict[str, Any],
) -> Iterator[Evidence]:  # fmt: skip
    given = values if values.dim() == 4 else values[None]
    held = _held(item, given)
    if held is None or given.dim() != 4:
        note_missing(case, "a clip is too long, or of another form, to be compared with its file")
        return
    own = matched(given, held.pictures)
    if own.gap > 1:
        twin = _twin(item, given, own, every)
        if twin is not None:
            yield _swapped(item, twin, known)
            return
        found = _changed(case, item, given, held, own)
        if found:
            subject = f"{item.ref.modality} {item.number} of row {item.row} is {known['file']}"
            yield Evidence(
                "media", "content-changed", told(subject, found), row=item.row,
                values={**known, **plain(found)},
            )  # fmt: skip
            return
        yield Evidence(
            "media",
            "content-differs",
            f"row {item.row} gets pictures that are {own.gap:.3g} grey levels off the nearest of "
            f"{known['file']}" + (": another decoder or resizer" if own.is_found else ""),
            row=item.row,
            values={**known, "gap": own.gap},
            severity="differs" if own.is_found else "breaks",
        )
        if not own.is_found:
            return
    yield from _size(case, item, given, known)
    if item.ref.modality == "video":
        yield from _order(case, item, given, held, own, known)


def _held(item: Shown, given: Tensor) -> FileFrames | None:
    size = (int(given.shape[-2]), int(given.shape[-1]))
    if item.ref.modality == "video":
        return frames_of(item.ref, size)
    picture = picture_of(item.ref, size)
    return None if picture is None else FileFrames(picture[None], (0.0,))


def _twin(item: Shown, given: Tensor, own: Matched, every: Sequence[Shown]) -> Shown | None:
    """Another file of the step, whose pictures these are rather than their own file's."""
    for other in _others(item, every):
        same = other.ref.modality == item.ref.modality
        held = _held(other, given) if same else None
        match = None if held is None else matched(given, held.pictures)
        if match is not None and match.is_found and match.gap < 0.5 * own.gap:
            return other
    return None


def _changed(case: Case, item: Shown, given: Tensor, held: FileFrames, own: Matched) -> Any:
    """A change of every picture: of the nearest frames, of those that the settings give, or of
    those that common samplers take."""
    total, number = len(held.pictures), len(given)
    selections = [own.numbers] if own.is_found else []
    right = _right_numbers(item, held)
    if len(right) == number:
        selections.append(right)
    selections.append(tuple(round(k * (total - 1) / max(number - 1, 1)) for k in range(number)))
    selections.append(tuple(k * total // number for k in range(number)))
    for numbers in dict.fromkeys(selections):
        want = held.pictures[list(numbers)].float()
        alike = same_levels if own.is_found else looks_alike
        if found := reproductions(want, given, alike, axes=_AXES):
            return found
    return ()


def _right_numbers(item: Shown, held: FileFrames) -> tuple[int, ...]:
    """The frames that the reference takes from the file."""
    clip = item.values
    if clip is None or item.ref.modality != "video":
        return (0,)
    if clip.shape[-2:] != held.pictures.shape[-2:]:
        again = frames_of(item.ref, (int(clip.shape[-2]), int(clip.shape[-1])))
        if again is None:
            return ()
        held = again
    return matched(clip, held.pictures).numbers


def _size(case: Case, item: Shown, given: Tensor, known: dict[str, Any]) -> Iterator[Evidence]:
    want, got = item.values, tuple(given.shape[-2:])
    if want is None or got == tuple(want.shape[-2:]) or not has_settings(case):
        return
    high, wide = want.shape[-2:]
    yield Evidence(
        "media",
        "picture-size",
        f"row {item.row} gets {known['file']} at {got[0]} x {got[1]} pixels; the settings give "
        f"{high} x {wide}",
        row=item.row,
        values={**known, "got": got, "want": (high, wide)},
        severity="differs",
    )


def _order(
    case: Case, item: Shown, given: Tensor, held: FileFrames, own: Matched, known: dict[str, Any]
) -> Iterator[Evidence]:
    """Which frames of the file these are, and in which order."""
    numbers, total = own.numbers, len(held.pictures)
    subject = f"video {item.number} of row {item.row} is {known['file']}"
    if not own.in_order:
        found = reproductions(
            torch.tensor(sorted(numbers)), torch.tensor(numbers), axes=("frames",)
        )
        said = told(subject, found) if found else f"{subject} with its frames out of order"
        yield Evidence(
            "media", "frames-order", f"{said}: {spacing(numbers)} of {total}", row=item.row,
            values={**known, **plain(found), "numbers": numbers},
        )  # fmt: skip
        return
    if len(numbers) > 2 and len(set(numbers)) == 1 and _moves(held):
        yield Evidence(
            "media",
            "frames-frozen",
            f"all {len(numbers)} frames of {subject.split(' is ')[0]} are frame {numbers[0]} of "
            f"{known['file']}",
            row=item.row,
            values={**known, "numbers": numbers},
        )
        return
    times = Counter(numbers)
    if min(times.values()) > 1 and len(numbers) <= total and _moves(held):
        yield Evidence(
            "media",
            "frames-repeated",
            f"{subject} with each of its {len(times)} frames {max(times.values())} times: "
            f"{spacing(numbers)} of {total}",
            row=item.row,
            values={**known, "numbers": numbers},
        )
        return
    right = _right_numbers(item, held)
    if len(numbers) != len(right) or numbers == right or not has_settings(case):
        return  # another number of frames, or others at even steps, is a recipe
    if numbers == tuple(k * total // len(numbers) for k in range(len(numbers))):
        how, said = "library", ", those that transformers samples when it decodes a path"
    elif numbers == (right[:1] + right[:-1]):
        how, said = "one-before", ", each the one before"
    else:
        return
    yield Evidence(
        "media",
        "frames-sampled",
        f"row {item.row} gets frames {spacing(numbers)} of the {total} of {known['file']}{said}; "
        f"the settings give {spacing(right)}",
        row=item.row,
        values={**known, "how": how, "numbers": numbers},
        severity="differs",
    )


def _moves(held: FileFrames) -> bool:
    pictures = held.pictures.float()
    return bool((pictures - pictures[:1]).abs().flatten(1).mean(1).max() > 1)


# --------------------------------------------------------------------------- rate


def look_rate(case: Case) -> Iterator[Evidence]:
    """Each clip's time positions follow the rate at which its frames were really taken."""
    for one in rendered_batches(case):
        for call in one.processed:
            every = _once(shown(one, call, case))
            rates = [
                (item, *found) for item in every if (found := _rates(call, item, every)) is not None
            ]
            if rates:
                note_judged(case, "media")
            off = [one for one in rates if abs(one[1] / one[2] - 1) > _OTHER_RATE]
            if not off:
                continue
            item, took, true = max(off, key=lambda one: abs(one[1] / one[2] - 1))
            passed = rate_of(call.keywords)
            wrong = abs(took / true - 1) > _WRONG_RATE and len(off) == len(rates)
            yield Evidence(
                "media",
                "rate-differs",
                f"{item.given.shape[0]} frames of {PurePath(item.ref.path).name} were sampled at "
                f"{true:g} per second, but the processor "
                + (f"got fps={took:g}" if passed is not None else f"assumes {took:g}")
                + (
                    f"; {len(off)} of {len(rates)} clips of the call have another rate than that"
                    if len(rates) > 1
                    else ""
                ),
                row=item.row,
                values={"told": passed, "took": took, "true": true},
                severity="breaks" if wrong else "differs",
            )


def _rates(call: ProcessorCall, item: Shown, every: Sequence[Shown]) -> tuple[float, float] | None:
    """Frames a second that the processor assumes of a clip, and the true number; ``None`` where it
    is another row's clip, of ``every`` one."""
    if item.ref.modality != "video" or item.media is None or not item.given.shape:
        return None
    clip, number = item.media.videos[0], item.given.shape[0]
    passed = rate_of(call.keywords)
    took = DEFAULT_RATE if passed is None else passed
    seconds = call.outputs.get("video_second_per_grid", torch.empty(0)).flatten()
    for own, clip_seconds in zip(call.videos, seconds.tolist(), strict=False):
        if own is item.given and clip_seconds > 0 and len(seconds) == len(call.videos):
            took = 2 / clip_seconds
    rates = [clip.sample_fps] * (number == len(clip.frames))
    values = array(item.given)
    held = None if values is None or values.dim() != 4 else _held(item, values)
    if values is not None and held is not None and number > 1:
        given = levels(values, call.keywords)
        match = matched(given, held.pictures)
        if not match.is_found and _twin(item, given, match, every) is not None:
            return None
        length = held.times[match.numbers[-1]] - held.times[match.numbers[0]]
        if match.is_found and match.in_order and length > 0:
            rates.append((number - 1) / length)
    # a sampler may count the time from its first frame to its last, or all of the clip's
    rates.append(number / max(clip.duration, 1e-6))
    return took, next((r for r in rates if abs(took / r - 1) <= _OTHER_RATE), rates[0])


# --------------------------------------------------------------------------- helpers


def _media(call: ProcessorCall) -> tuple[MediumSeen, ...]:
    return (*call.images, *call.videos, *call.audios)


def _once(found: Sequence[Shown]) -> list[Shown]:
    """Without the copies of a group."""
    kept: dict[object, Shown] = {}
    for item in found:
        kept.setdefault((item.ref, item.given.sha256), item)
    return list(kept.values())


def _all_empty(one: RenderedBatch, call: ProcessorCall, case: Case) -> Iterator[Evidence]:
    """Where files cannot be matched to rows: a single blank or silent clip may be in the data, but
    not all of them."""
    for what, media in (("blank", (*call.videos, *call.images)), ("silent", call.audios)):
        if media and all(map(is_empty, media)):
            full = _some_file_is_not(one, media[0].modality, case)
            yield Evidence(
                "media",
                f"medium-{what}",
                f"all {len(media)} {media[0].modality} items of the call are {what}"
                + ("; their files are not" if full else ""),
                origin="added" if full else "unknown",
                values={"modality": media[0].modality},
            )


def _some_file_is_not(one: RenderedBatch, modality: Modality, case: Case) -> bool:
    """Whether a file that the conversations name is neither blank nor silent."""
    for prompt in one.prompts:
        for ref in replay_media.wanted(prompt.media, interleaved=modality == "audio")[modality]:
            read = read_file(ref, case)
            values = None if read is None else array_of(read, modality)
            if values is not None and not is_flat(values, modality):
                return True
    return False


LOOKS: tuple[Look, ...] = (look_content, look_rate)
