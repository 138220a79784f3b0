"""Looks at what media hold: each is the file that its conversation names, unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from omni_grpo_core.doctor.checks.frame_rate import look_rate
from omni_grpo_core.doctor.checks.pictures import pictures
from omni_grpo_core.doctor.checks.sounds import sound
from omni_grpo_core.doctor.checks.text import look_one_for_all
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged, note_missing
from omni_grpo_core.doctor.media_similarity import array, is_empty, is_flat, levels
from omni_grpo_core.doctor.rendered import RenderedBatch, rendered_batches
from omni_grpo_core.doctor.replay import media as replay_media
from omni_grpo_core.doctor.shown_media import Shown, once, shown
from omni_grpo_core.trace.calls import MediumSeen, ProcessorCall
from omni_grpo_core.types import MODALITIES, Modality

_OF_THE_ROW = frozenset({"media-swapped", "sound-length"})
"""Facts that need to know which file a row should have got."""
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
        for item in once(found):
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
    for number, heard in enumerate(call.audios):
        values = heard.values
        largest = max(abs(heard.low), abs(heard.high))
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
        yield from sound(case, item, values, reference, every, known)
    else:
        yield from pictures(case, item, levels(values, call.keywords), every, known, compared)


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


def _media(call: ProcessorCall) -> tuple[MediumSeen, ...]:
    return (*call.images, *call.videos, *call.audios)


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
