"""Which of the files that a loop opened each array is that a processor got.

A loop that reads its media itself passes arrays, and nothing says whose. What an array holds tells
its file; one that was changed is none of them, and is known by the order in which both came.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.file_frames import frames_of, matched
from omni_grpo_core.doctor.media_similarity import OTHER_WAVE, array, unexplained
from omni_grpo_core.doctor.replay.batch import sides
from omni_grpo_core.doctor.replay.media import has_track, read_file
from omni_grpo_core.trace.calls import MediumSeen, ProcessorCall
from omni_grpo_core.types import MODALITIES, MediaRef, Modality

_MOST = 64
"""Files that arrays are compared with, the last that were opened."""


def opened_files(case: Case) -> Mapping[tuple[Modality, str], str]:
    """Paths by the modality and ``sha256`` of a recorded array; only of those that can be told."""
    return case.once(_opened_files)


def _opened_files(case: Case) -> Mapping[tuple[Modality, str], str]:
    found: dict[tuple[Modality, str], str] = {}
    for modality in MODALITIES:
        arrays = {
            medium.sha256: medium for call in case.processed for medium in _given(call, modality)
            if medium.values is not None
        }  # fmt: skip
        if not arrays:
            continue
        held = [ref for ref in _refs(case, modality) if read_file(ref, case) is not None]
        own = {sha: ref.path for sha, one in arrays.items() if (ref := _same(one, held, case))}
        unknown = [sha for sha in arrays if sha not in own]
        now = [path for call in case.processed for path in call.opened]
        left = [ref.path for ref in held if ref.path in now and ref.path not in own.values()]
        if len(left) == len(unknown):
            own |= dict(zip(unknown, left, strict=True))
        found |= {(modality, sha): path for sha, path in own.items()}
    return found


def _given(call: ProcessorCall, modality: Modality) -> tuple[MediumSeen, ...]:
    return {"image": call.images, "video": call.videos, "audio": call.audios}[modality]


def _refs(case: Case, modality: Modality) -> list[MediaRef]:
    paths = list(dict.fromkeys(_paths(case)))[-_MOST:]
    return [
        MediaRef(modality, path) for path in paths
        if modality == "image" or has_track(path) is not None
    ]  # fmt: skip


def _paths(case: Case) -> Iterator[str]:
    if case.before is not None:
        yield from _paths(case.before)
    for call in case.processed:
        yield from call.opened


def _same(medium: MediumSeen, refs: list[MediaRef], case: Case) -> MediaRef | None:
    """The file whose content an array is, whatever its size, rate or loudness."""
    apart = {ref: gap for ref in refs if (gap := _gap(medium, ref, case)) is not None}
    return min(apart, key=lambda ref: apart[ref], default=None)


def _gap(medium: MediumSeen, ref: MediaRef, case: Case) -> float | None:
    """How far they are apart; ``None``: they are not the same."""
    values, read = array(medium), read_file(ref, case)
    if values is None or read is None:
        return None
    if medium.modality == "audio":
        rest = unexplained(values, read.audios[0].samples)
        return rest if rest <= OTHER_WAVE else None
    held = frames_of(ref, sides(medium))
    given = values if values.dim() == 4 else values[None]
    if held is None or given.dim() != 4 or given.shape[1:] != held.pictures.shape[1:]:
        return None
    found = matched(given, held.pictures)
    return found.gap if found.is_found else None
