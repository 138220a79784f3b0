"""Looks at media: all that the messages name, from the right file, neither blank nor silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from omni_grpo_core.core.batch import placeholder_ids
from omni_grpo_core.doctor.call_rows import GRIDS, PIXELS
from omni_grpo_core.doctor.checks.positions import Call, named_calls
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Origin, note_judged, note_missing
from omni_grpo_core.doctor.media_similarity import array, is_close, is_empty, is_flat, is_same
from omni_grpo_core.doctor.rendered import RenderedBatch, flag_of, rendered_batches
from omni_grpo_core.doctor.replay import media as replay_media
from omni_grpo_core.doctor.replay.batch import DEFAULT_RATE, audio_route, rate_of, sides, totals
from omni_grpo_core.doctor.shown_media import (
    Shown,
    array_of,
    has_settings,
    library_frames,
    read_file,
    shown,
    videos_with_sound,
    wanted_counts,
)
from omni_grpo_core.trace.calls import MediumSeen, ProcessorCall
from omni_grpo_core.types import MODALITIES, Modality

if TYPE_CHECKING:
    from torch import Tensor

_PATCH_AREA = 14 * 14
_LIMITS: Mapping[str, Callable[[MediumSeen], int]] = {
    "max_frames": lambda clip: clip.shape[0],
    "max_pixels": lambda clip: sides(clip)[0] * sides(clip)[1],
}
"""Limits that the reader of clips applies, and the quantity that each limits."""
_OTHER_LENGTH = 0.02
"""Of a sound's length; a sound that is off by less differs in another way."""
_OTHER_RATE = 0.15
"""Of the true frame rate, where it is only known as frames / seconds."""


def look_counts(case: Case) -> Iterator[Evidence]:
    """As many images, clips and sounds reach the processor as the messages name."""
    for one in rendered_batches(case):
        for call in one.processed:
            wanted = wanted_counts(one, call)
            if wanted is None:
                continue
            given = {
                "image": len(call.images), "video": len(call.videos), "audio": len(call.audios)
            }  # fmt: skip
            if any(wanted.values()) or any(given.values()):
                note_judged(case, "media")
            texts = totals(call, case)
            for modality in MODALITIES:
                allowed = {wanted[modality]}
                if modality == "audio":
                    if _audio_by_another_name(call):
                        continue
                    heard = videos_with_sound(one, call)
                    allowed |= {wanted["audio"] + wanted["video"], wanted["audio"] + heard}
                if given[modality] in allowed and not _sound_missing(call, case, modality):
                    continue
                fewer = given[modality] < max(allowed)
                # media of a text that lost its placeholders may have been removed on purpose
                origin: Origin = "inherited" if given[modality] == texts[modality] else "added"
                yield Evidence(
                    "media",
                    "media-missing" if fewer else "media-extra",
                    f"{given[modality]} {modality} items passed to the processor for "
                    f"{max(allowed) if fewer else min(allowed)} in the messages",
                    origin=origin,
                    values={"modality": modality, "got": given[modality], "want": max(allowed)},
                )


def look_limits(case: Case) -> Iterator[Evidence]:
    """Clips keep a limit passed to the processor, which neither drops nor shrinks frames that are
    already sampled and resized."""
    for call in case.processed:
        inner = call.keywords.get("videos_kwargs")
        keywords = {**(inner if isinstance(inner, Mapping) else {}), **call.keywords}
        for name, sizes in _LIMITS.items():
            limit = keywords.get(name)
            if not isinstance(limit, int) or isinstance(limit, bool):
                continue
            over = [m for m in call.videos if m.shape and sizes(m) > limit]
            made = call.outputs.get("video_grid_thw")
            if not over or (made is not None and _kept(name, limit, made)):
                continue
            yield Evidence(
                "media",
                "limit-ignored",
                f"the processor was called with {name}={limit}, but {len(over)} of its "
                f"{len(call.videos)} clips came with {sizes(over[0])} and were not changed: the "
                "limit has no effect",
                values={"limit": name, "told": limit, "got": sizes(over[0])},
            )


def _kept(name: str, limit: int, grids: Tensor) -> bool:
    """Whether the processor itself enforced a limit: grids count frames in pairs, sides of 14."""
    times, high, wide = grids.unbind(-1)
    size = 2 * times if name == "max_frames" else high * wide * _PATCH_AREA
    return bool((size <= limit).all())


def look_passed_on(case: Case) -> Iterator[Evidence]:
    """The processor's features of each modality are passed to generate and every forward with
    placeholders for it."""
    if not case.processed:
        return
    every = set.intersection(*({*call.outputs, *call.large} for call in case.processed))
    some = {key for call in case.processed for key in (*call.outputs, *call.large)}
    for name, call in named_calls(case):
        has = {*call.inputs, *call.large}
        for modality in MODALITIES:
            pixels = PIXELS[modality]
            asked = _asked(case, call, modality)
            if pixels in some:
                note_judged(case, "media")
            # without a checkpoint placeholders are unknown: only what every batch has is certain
            if pixels in has or pixels not in (every if asked is None else some):
                continue
            if asked is False and pixels not in every:
                continue
            yield Evidence(
                "media",
                "media-not-passed",
                f"the processor made {pixels}, but {name} did not get it: the model gets no "
                f"{modality}",
                values={"modality": modality, "call": name, "grid": GRIDS[modality] in has},
            )


def _asked(case: Case, call: Call, modality: Modality) -> bool | None:
    """Whether a call's tokens have placeholders of a modality; ``None`` where unknown."""
    if case.reference is None:
        return None
    token = placeholder_ids(case.reference.policy.processor)[modality]
    return bool((call.inputs["input_ids"] == token).any())


def look_content(case: Case) -> Iterator[Evidence]:
    """Each media item is the file that its conversation names, neither blank nor silent."""
    for one in rendered_batches(case):
        for call in one.processed:
            found = shown(one, call, case)
            if call.videos and not found:
                note_missing(case, "media could not be matched to messages: files not compared")
            if any(item.media is None for item in found):
                note_missing(case, "some media files were not found: content not compared")
            if any(medium.dtype == "path" for medium in (*call.videos, *call.audios)):
                note_missing(
                    case,
                    "the processor was passed paths and decoded them with whatever is installed: "
                    "the frames and sound that it used were not recorded",
                )
            for item in _once(found):
                if item.given.shape:
                    note_judged(case, "media")
                    yield from _content(case, item, found)
            if not any(item.media is not None for item in found):
                yield from _all_empty(one, call, case)


def look_rate(case: Case) -> Iterator[Evidence]:
    """The frame rate passed to the processor is the one at which frames were sampled."""
    for one in rendered_batches(case):
        for call in one.processed:
            passed = rate_of(call.keywords)
            for item in _once(shown(one, call, case)):
                if item.ref.modality != "video" or item.media is None:
                    continue
                clip = item.media.videos[0]
                frames = item.given.shape[0]
                exact = frames == len(clip.frames)
                true = clip.sample_fps if exact else frames / max(clip.duration, 1e-6)
                rate = DEFAULT_RATE if passed is None else passed
                # float rounding of a quotient, where the frames are the reference's
                if abs(rate - true) <= (1e-6 if exact else _OTHER_RATE) * true:
                    continue
                yield Evidence(
                    "media",
                    "rate-differs",
                    f"{frames} frames of {PurePath(item.ref.path).name} were sampled at {true:g} "
                    "per second, but the processor "
                    + (f"got fps={rate:g}" if passed is not None else f"assumes {rate:g}"),
                    row=item.row,
                    values={"told": passed, "took": rate, "true": true},
                )
                break


def _content(case: Case, item: Shown, every: Sequence[Shown]) -> Iterator[Evidence]:
    reference = item.values
    if reference is None:
        return
    name = PurePath(item.ref.path).name
    known = {"file": name, "modality": item.ref.modality, "row": item.row}
    if is_empty(item.given) and not is_flat(reference, item.ref.modality):
        what = "silent" if item.ref.modality == "audio" else "blank"
        yield Evidence(
            "media",
            f"medium-{what}",
            f"{item.ref.modality} {item.number} of row {item.row} is {what}, with all values "
            f"between {item.given.low:g} and {item.given.high:g}, while {name} is not",
            row=item.row,
            values=known,
        )
        return
    if is_same(item.given, reference):
        return
    twin = next(
        (
            other
            for other in every
            if other.values is not None
            and other.ref != item.ref
            and other.ref.modality == item.ref.modality
            and is_same(item.given, other.values)
        ),
        None,
    )
    if twin is not None:
        yield Evidence(
            "media",
            "media-swapped",
            f"row {item.row} gets {PurePath(twin.ref.path).name} of row {twin.row} where its "
            f"messages name {name}",
            row=item.row,
            values={**known, "shown": PurePath(twin.ref.path).name, "of": twin.row},
        )
        return
    yield from _form(case, item, reference, name)


def _form(case: Case, item: Shown, reference: Tensor, name: str) -> Iterator[Evidence]:
    """How an item that is not another row's differs from its file."""
    values, want = array(item.given), tuple(reference.shape)
    got = item.given.shape if values is None else tuple(values.shape)
    known: dict[str, Any] = {"file": name, "modality": item.ref.modality, "got": got, "want": want}
    other_size = item.ref.modality != "audio" and sides(item.given) != tuple(want[-2:])
    other_number = item.ref.modality == "video" and got[0] != want[0]
    if (other_size or other_number) and not has_settings(case):
        note_missing(case, "the checkpoint has no settings of its own: picture sizes unjudged")
        return
    if other_number:
        fact, sentence = "frames-number", f"{got[0]} frames of {name}; the settings give {want[0]}"
    elif other_size:
        high, wide = sides(item.given)
        fact = "picture-size"
        sentence = f"{name} at {high} x {wide} pixels; the settings give {want[-2]} x {want[-1]}"
    elif item.ref.modality == "audio" and abs(got[0] / want[0] - 1) > _OTHER_LENGTH:
        known["factor"] = got[0] / want[0]
        fact, sentence = "sound-length", f"{got[0]} samples of {name}, which has {want[0]}"
    elif values is None:
        fact = "content-differs"
        sentence = (
            f"other {item.ref.modality} content than {name}: its mean or standard deviation is off"
        )
    else:
        known["gap"] = gap = float((values - reference).abs().mean())
        fact = "content-differs"
        unit = "" if item.ref.modality == "audio" else " grey levels"
        sentence = f"other {item.ref.modality} content than {name}: {gap:.3g}{unit} off"
        if item.ref.modality != "audio" and is_close(values.flip(-3), reference, item.ref.modality):
            known["how"] = "channels"
            sentence = f"{name} with red and blue swapped"
        elif (numbers := library_frames(item, values, case)) is not None:
            known["how"] = "library"
            sentence = (
                f"the frames of {name} that transformers samples when it decodes a path: "
                f"{_few(numbers)}; those of the settings differ by {gap:.3g}{unit}"
            )
    yield Evidence("media", fact, f"row {item.row} gets {sentence}", row=item.row, values=known)


def _few(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return f"{shown}, …" if len(numbers) > 6 else shown


def _sound_missing(call: ProcessorCall, case: Case, modality: Modality) -> bool:
    """Whether there is no sound at all although audio-in-video is on."""
    if modality != "audio" or not flag_of(call.keywords) or call.audios:
        return False
    return audio_route(call, case) == "items" and bool(totals(call, case)["video"])


def _audio_by_another_name(call: ProcessorCall) -> bool:
    return "audios" in call.ignored or "audios" in call.keywords


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


LOOKS: tuple[Look, ...] = (look_counts, look_limits, look_passed_on, look_content, look_rate)
