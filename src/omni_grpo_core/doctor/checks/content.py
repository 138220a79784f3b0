"""Looks at what media hold: each is the file that its conversation names, unchanged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePath
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
    has_settings,
    shown,
)
from omni_grpo_core.trace.calls import MediumSeen, ProcessorCall
from omni_grpo_core.types import AUDIO_SAMPLING_RATE as RATE
from omni_grpo_core.types import MODALITIES, Modality

if TYPE_CHECKING:
    from torch import Tensor

_AXES = ("frames", "channels", "height", "width")
_EVEN = 2
"""Frames: qwen-omni-utils samples a multiple of it."""
_WRONG_RATE = 1 / 3
"""Of the true frame rate: a clip is shown at another speed."""
_OTHER_RATE = 0.02
"""The same, up to which a rate is the true one, rounded or of whole frames."""
_CHOICES = frozenset({"last-dropped", "first-dropped", "cropped", "padded"})
"""Changes of a sound that a recipe may make on purpose."""
_CLEARLY = 0.25
"""Of what its own file leaves of a sound: another that leaves less is what was really heard."""
_OF_THE_ROW = frozenset({"media-swapped", "sound-length"})
"""Facts that need to know which file a row should have got."""
_RATES = (8_000, 11_025, 12_000, 22_050, 24_000, 32_000, 44_100, 48_000)
"""Sampling rates of files and readers, in Hz, other than the model's."""
_RESIZED = 0.05
"""Of a picture's deviation: resizers of the shipped clips differ by up to .02, which is no news."""
_MOST_BESIDE = 16
"""Files of a folder that are read to find out which one was passed."""
_LOUD = 1.5
"""A float sound is between -1 and 1."""


def look_content(case: Case) -> Iterator[Evidence]:
    """Each media item is the file that its row names, neither blank nor silent."""
    # one prompt for all rows: it is the text that is wrong, and names other rows' files
    lost = any(look_one_for_all(case))
    calls = [(one, call) for one in rendered_batches(case) for call in one.processed]
    every = [item for one, call in calls for item in shown(one, call, case)]
    given = {medium.modality for _, call in calls for medium in _media(call)}
    compared: set[Modality] = set()
    for one, call in calls:
        yield from _values(call)
        found = shown(one, call, case)
        if any(medium.dtype == "path" for medium in _media(call)):
            note_missing(
                case,
                "the processor was passed paths and decoded them with whatever is installed: "
                "the frames and sound that it used were not recorded",
                "media",
            )
        for item in _once(found):
            if item.given.shape and item.media is not None:
                for evidence in _content(case, call, item, every, compared):
                    if item.opened and evidence.fact in _OF_THE_ROW:
                        continue
                    if item.opened and evidence.fact == "content-differs":
                        evidence = replace(evidence, severity="differs")
                    yield replace(evidence, origin="inherited") if lost else evidence
        if not any(item.media is not None for item in found):
            yield from _all_empty(one, call, case)
    left = [modality for modality in MODALITIES if modality in given - compared]
    if left:
        note_missing(
            case,
            f"no {' or '.join(left)} was compared with its file: neither the messages nor the "
            "columns that rewards got name one that is here and can be read",
            "media",
        )
    elif given:
        note_judged(case, "media")


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
    case: Case,
    call: ProcessorCall,
    item: Shown,
    every: Sequence[Shown],
    compared: set[Modality],
) -> Iterator[Evidence]:
    """``compared``: gets the modality, where values were."""
    reference = item.values
    if reference is None:
        return
    name = PurePath(item.ref.path).name
    known = {"file": name, "modality": item.ref.modality, "row": item.row}
    if is_empty(item.given):
        compared.add(item.ref.modality)
        if not is_flat(reference, item.ref.modality):
            yield _empty(item, name, known)
        return
    values = array(item.given)
    if values is None:
        note_missing(case, "some media were too large to keep: content not compared")
    elif item.ref.modality == "audio":
        compared.add("audio")
        yield from _sound(case, item, values, reference, every, known)
    else:
        yield from _pictures(case, item, levels(values, call.keywords), every, known, compared)


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


def _near(item: Shown, every: Sequence[Shown]) -> list[Shown]:
    """Those of the same row first."""
    return sorted(every, key=lambda other: other.row != item.row)


def _others(item: Shown, every: Iterable[Shown]) -> Iterator[Shown]:
    """Items of other files, each file once."""
    seen: set[object] = set()
    for other in every:
        if other.ref.path != item.ref.path and other.ref not in seen:
            seen.add(other.ref)
            yield other


def _swapped(
    item: Shown, twin: Shown, every: Sequence[Shown], known: Mapping[str, Any]
) -> Iterator[Evidence]:
    if twin.ref.path in item.asked:
        return
    other = PurePath(twin.ref.path).name
    of = f" of row {twin.row}" if twin in every else ""
    if of and twin.row == item.row:
        of = ", its own at another place,"
    yield Evidence(
        "media",
        "media-swapped",
        f"row {item.row} gets {other}{of} where {known['file']} should be",
        row=item.row,
        values={**known, "shown": other},
    )


# --------------------------------------------------------------------------- sound


def _sound(
    case: Case, item: Shown, values: Tensor, reference: Tensor, every: Sequence[Shown],
    known: dict[str, Any],
) -> Iterator[Evidence]:  # fmt: skip
    if same_wave(reference, values):
        return
    rest = unexplained(values, reference)
    better = min(rest * _CLEARLY, OTHER_WAVE)
    for other in _other_sounds(item, every):
        if other.values is not None and unexplained(values, other.values) < better:
            yield from _swapped(item, other, every, known)
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
        for other in () if found else _beside(item, case):
            if other.values is not None and unexplained(values, other.values) < better:
                yield from _swapped(item, other, every, known)
                return
    yield _sound_differs(item, values, reference, found, known)


def _other_sounds(item: Shown, every: Sequence[Shown]) -> list[Shown]:
    return [other for other in _others(item, _near(item, every)) if other.ref.modality == "audio"]


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
    case: Case, item: Shown, values: Tensor, every: Sequence[Shown], known: dict[str, Any],
    compared: set[Modality],
) -> Iterator[Evidence]:  # fmt: skip
    given = values if values.dim() == 4 else values[None]
    held = _frames(item, given)
    if held is None or given.dim() != 4:
        note_missing(case, "a clip is too long, or of another form, to be compared with its file")
        return
    compared.add(item.ref.modality)
    own = matched(given, held.pictures)
    if own.gap > 1:
        twin = _twin(item, given, own, _near(item, every))
        found = () if twin else _changed(case, item, given, held, own)
        if not twin and not found and not own.is_found:
            twin = _twin(item, given, own, _beside(item, case))
        if twin is not None:
            yield from _swapped(item, twin, every, known)
            return
        if found:
            subject = f"{item.ref.modality} {item.number} of row {item.row} is {known['file']}"
            yield Evidence(
                "media", "content-changed", told(subject, found), row=item.row,
                values={**known, **plain(found)},
            )  # fmt: skip
            return
        if own.share > _RESIZED:
            yield _off(item, own, known)
        if not own.is_found:
            return
    yield from _size(case, item, given, known)
    if item.ref.modality == "video":
        yield from _order(case, item, given, held, own, known)


def _off(item: Shown, own: Matched, known: Mapping[str, Any]) -> Evidence:
    return Evidence(
        "media",
        "content-differs",
        f"row {item.row} gets pictures that are {own.gap:.3g} grey levels off the nearest of "
        f"{known['file']}" + (": another decoder or resizer" if own.is_found else ""),
        row=item.row,
        values={**known, "gap": own.gap},
        severity="differs" if own.is_found else "breaks",
    )


def _frames(item: Shown, given: Tensor) -> FileFrames | None:
    return frames_of(item.ref, (int(given.shape[-2]), int(given.shape[-1])))


def _beside(item: Shown, case: Case) -> Iterator[Shown]:
    """The other files of its folder, the first of them by name."""
    path = Path(item.ref.path)
    others = sorted(other for other in path.parent.iterdir() if other.suffix == path.suffix)
    for other in others[:_MOST_BESIDE]:
        ref = replace(item.ref, path=str(other))
        yield Shown(item.row, item.number, item.given, ref, replay_media.read_file(ref, case))


def _twin(item: Shown, given: Tensor, own: Matched, every: Iterable[Shown]) -> Shown | None:
    """Another file, whose pictures these are rather than their own file's."""
    for other in _others(item, every):
        same = other.ref.modality == item.ref.modality
        held = _frames(other, given) if same else None
        match = None if held is None else matched(given, held.pictures)
        if match is not None and match.is_found and match.gap < 0.5 * own.gap:
            return other
    return None


def _changed(case: Case, item: Shown, given: Tensor, held: FileFrames, own: Matched) -> Any:
    """A change of every picture: of the nearest frames, of those that the settings give, or of
    those that common samplers take."""
    total, number = len(held.pictures), len(given)
    pictures = held.pictures.float()
    same_light = (given - given.mean()) / given.std() * pictures.std() + pictures.mean()
    selections = [own.numbers if own.is_found else matched(same_light, pictures).numbers]
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
        again = _frames(item, clip)
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
        f"row {item.row} gets {known['file']} at {got[0]} x {got[1]} pixels; the checkpoint's "
        f"settings give {high} x {wide}",
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
        # a frame that comes again is in no order of the file's
        want = torch.tensor(sorted({*numbers}))
        found = reproductions(want, torch.tensor(numbers), axes=("frames",))
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
        how, said = "library", ", as transformers samples when it decodes a path, and a stride"
    elif numbers == (right[:1] + right[:-1]):
        how, said = "one-before", ", each the one before"
    else:
        return
    yield Evidence(
        "media",
        "frames-sampled",
        f"row {item.row} gets frames {spacing(numbers)} of the {total} of {known['file']}{said}; "
        f"the checkpoint's settings give {spacing(right)}",
        row=item.row,
        values={**known, "how": how, "numbers": numbers},
        severity="differs",
    )


def _moves(held: FileFrames) -> bool:
    pictures = held.pictures.float()
    return bool((pictures - pictures[:1]).abs().flatten(1).mean(1).max() > 1)


# --------------------------------------------------------------------------- rate


@dataclass(frozen=True, slots=True)
class _Rate:
    """Frames a second that the processor assumes of a clip, ``took``, and those that are ``true``:
    samplers count frames by the clip's length, or steps by the time from the first to the last, and
    what lies between is right."""

    item: Shown
    took: float
    true: float
    steps: float

    @property
    def off(self) -> float:
        """By how much it is wrong, as a factor's distance from 1."""
        low, high = sorted((self.true, self.steps))
        nearest = min(max(self.took, low), high)
        return abs(self.took / nearest - 1)


def look_rate(case: Case) -> Iterator[Evidence]:
    """Each clip's time positions follow the rate at which its frames were really taken."""
    for one in rendered_batches(case):
        for call in one.processed:
            items = _once(shown(one, call, case))
            rates = [rate for item in items if (rate := _rate(case, call, item, items)) is not None]
            off = [rate for rate in rates if rate.off > _OTHER_RATE]
            if not off:
                continue
            worst = max(off, key=lambda rate: rate.off)
            took, passed = worst.took, rate_of(call.keywords)
            yield Evidence(
                "media",
                "rate-differs",
                f"{worst.item.given.shape[0]} frames of {PurePath(worst.item.ref.path).name} were "
                f"sampled at {worst.true:g} per second, but the processor "
                + (f"got fps={took:g}" if passed is not None else f"assumes {took:g}")
                + (
                    f"; {len(off)} of {len(rates)} clips of the call have another rate than that"
                    if len(rates) > 1
                    else ""
                ),
                row=worst.item.row,
                values={"told": passed, "took": took, "true": worst.true},
                severity="breaks" if worst.off > _WRONG_RATE and len(off) == len(rates)
                else "differs",
            )  # fmt: skip


def _rate(case: Case, call: ProcessorCall, item: Shown, every: Sequence[Shown]) -> _Rate | None:
    """``None`` where it cannot be told, as for another file's frames."""
    if item.ref.modality != "video" or item.media is None or not item.given.shape:
        return None
    clip, number = item.media.videos[0], item.given.shape[0]
    took = rate_of(call.keywords) or DEFAULT_RATE
    seconds = call.outputs.get("video_second_per_grid", torch.empty(0)).flatten()
    for own, clip_seconds in zip(call.videos, seconds.tolist(), strict=False):
        if own is item.given and clip_seconds > 0 and len(seconds) == len(call.videos):
            took = 2 / clip_seconds
    even = number / max(clip.duration, 1e-6)
    if number == len(clip.frames):
        even = clip.sample_fps
    values = array(item.given)
    held = None if values is None or values.dim() != 4 else _frames(item, values)
    if values is None or held is None or number < 2:
        return _Rate(item, took, even, even)
    given = levels(values, call.keywords)
    match = matched(given, held.pictures)
    if len({*match.numbers}) < number <= len(held.pictures) and _moves(held):
        return None  # frames that come again, where the file has others, have no rate
    length = held.times[match.numbers[-1]] - held.times[match.numbers[0]]
    if not match.is_found and _twin(item, given, match, chain(every, _beside(item, case))):
        return None
    if len(set(match.numbers)) < number // 2 + 1:
        return None  # frames shown again, which say nothing of the others' rate
    if not (match.is_found and match.in_order and length > 0):
        return _Rate(item, took, even, even)
    steps, total = (number - 1) / length, len(held.pictures)
    if match.numbers[-1] - match.numbers[0] < total * (1 - 1 / number) - 1:
        return _Rate(item, took, steps, steps)  # of a part of the clip
    asked = took * clip.duration
    # samplers round the number of frames, down to an even one
    rounded = -1 < asked - number < _EVEN
    return _Rate(item, took, took if rounded else even, steps)


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
            read = replay_media.read_file(ref, case)
            values = None if read is None else replay_media.array_of(read, modality)
            if values is not None and not is_flat(values, modality):
                return True
    return False


LOOKS: tuple[Look, ...] = (look_content, look_rate)
