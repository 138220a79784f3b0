"""What pictures are of their file: its frames, unchanged and in order, or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from omni_grpo_core.doctor.checks.other_files import beside, near, others, swapped
from omni_grpo_core.doctor.evidence import Case, Evidence, note_missing
from omni_grpo_core.doctor.file_frames import FileFrames, Matched, frames_of, matched, spacing
from omni_grpo_core.doctor.media_similarity import looks_alike, same_levels
from omni_grpo_core.doctor.reproduce import plain, reproductions, told
from omni_grpo_core.doctor.shown_media import Shown, has_settings
from omni_grpo_core.types import Modality

if TYPE_CHECKING:
    from torch import Tensor

_AXES = ("frames", "channels", "height", "width")
_RESIZED = 0.05
"""Of a picture's deviation: resizers of the shipped clips differ by up to .02, which is no news."""


def pictures(
    case: Case, item: Shown, values: Tensor, every: Sequence[Shown], known: dict[str, Any],
    compared: set[Modality],
) -> Iterator[Evidence]:  # fmt: skip
    given = values if values.dim() == 4 else values[None]
    held = frames(item, given)
    if held is None or given.dim() != 4:
        note_missing(case, "a clip is too long, or of another form, to be compared with its file")
        return
    compared.add(item.ref.modality)
    own = matched(given, held.pictures)
    if own.gap > 1:
        twin = twin_of(item, given, own, near(item, every))
        found = () if twin else _changed(case, item, given, held, own)
        if not twin and not found and not own.is_found:
            twin = twin_of(item, given, own, beside(item, case))
        if twin is not None:
            yield from swapped(item, twin, every, known)
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
        yield from _order(case, item, held, own, known)


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


def frames(item: Shown, given: Tensor) -> FileFrames | None:
    return frames_of(item.ref, (int(given.shape[-2]), int(given.shape[-1])))


def twin_of(item: Shown, given: Tensor, own: Matched, every: Iterable[Shown]) -> Shown | None:
    """Another file, whose pictures these are rather than their own file's."""
    for other in others(item, every):
        same = other.ref.modality == item.ref.modality
        held = frames(other, given) if same else None
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
        again = frames(item, clip)
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
    case: Case, item: Shown, held: FileFrames, own: Matched, known: dict[str, Any]
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
    if len(numbers) > 2 and len(set(numbers)) == 1 and moves(held):
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
    if min(times.values()) > 1 and len(numbers) <= total and moves(held):
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


def moves(held: FileFrames) -> bool:
    pictures = held.pictures.float()
    return bool((pictures - pictures[:1]).abs().flatten(1).mean(1).max() > 1)
