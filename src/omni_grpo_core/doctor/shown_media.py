"""Which conversation each row of a processor call belongs to, and which media it should have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from omni_grpo_core.doctor.asked import rewarded
from omni_grpo_core.doctor.bundles import FedRow, rows_in
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.opened_files import opened_files
from omni_grpo_core.doctor.rendered import RenderedBatch, RenderedPrompt, order_of, paths_of
from omni_grpo_core.doctor.replay import media as replay_media
from omni_grpo_core.doctor.replay.batch import Given, audio_route, given_rows
from omni_grpo_core.doctor.replay.text import collapsed, marks
from omni_grpo_core.doctor.rollouts import same_media
from omni_grpo_core.pipeline.settings import CHECKPOINT_SETTINGS
from omni_grpo_core.trace.calls import MediumSeen, ProcessorCall
from omni_grpo_core.types import MODALITIES, Media, MediaRef, Modality

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """One media item of one row: what was passed, and its file: the one that the messages name, or
    else the columns that rewards got with the row's completions, or else the one that the loop
    ``opened``, of which nobody said that it should be this. ``media``: that file as the
    reference reads it, ``None`` where it cannot be read here. ``asked``: paths that conversations
    of the row's very text name, where there are several: any may be meant."""

    row: int
    number: int
    given: MediumSeen
    ref: MediaRef
    media: Media | None
    asked: frozenset[str] = frozenset()
    opened: bool = False

    @property
    def values(self) -> Tensor | None:
        """The reference's array: an image's pixels, a clip's frames, a sound's samples."""
        return None if self.media is None else replay_media.array_of(self.media, self.ref.modality)


def owners(
    one: RenderedBatch, call: ProcessorCall, case: Case
) -> tuple[RenderedPrompt, ...] | None:
    """The conversation of each row of a call; ``None`` where unknown.

    By the order that gives most rows their own conversation's text, and most copies of a
    conversation the same media: texts may be lost or changed while media are right. A call on some
    of the conversations only is matched by its texts.
    """
    prompts, names = one.prompts, marks(case)
    texts = [collapsed(text, names) for text in call.texts]
    fits: list[tuple[int, int, tuple[RenderedPrompt, ...]]] = []
    for order in order_of(len(prompts), len(texts)).values():
        rows = tuple(prompts[number] for number in order)
        own = sum(prompt.text == text for prompt, text in zip(rows, texts, strict=True))
        fits.append((own, _same_copies(call, case, order), rows))
    best = max(fits, key=lambda fit: fit[:2], default=None)
    if best is not None and (best[0] or len(one.processed) == 1):
        return best[2]
    found = [_of_text(text, one, call) for text in texts]
    return tuple(found) if all(found) else None  # type: ignore[arg-type]


def _of_text(text: str, one: RenderedBatch, call: ProcessorCall) -> RenderedPrompt | None:
    """The conversation with this text; where several have it, the one in the place of the call."""
    same = {prompt.media: prompt for prompt in one.prompts if prompt.text == text}
    if len(same) == 1:
        return next(iter(same.values()))
    at = next((n for n, other in enumerate(one.processed) if other is call), None)
    one_each = len(one.processed) == len(one.prompts)
    return one.prompts[at] if same and one_each and at is not None else None


def has_settings(case: Case) -> bool:
    """Whether the checkpoint configures picture sizes; otherwise any size is accepted."""
    if case.reference is None:
        return False
    return (Path(case.reference.policy.checkpoint) / CHECKPOINT_SETTINGS).is_file()


def wanted_counts(one: RenderedBatch, call: ProcessorCall) -> dict[Modality, int] | None:
    """Media in the conversations of a call, over all its rows, without sounds inside videos."""
    prompts, rows = one.prompts, len(call.texts)
    if not prompts or rows % len(prompts):
        return None
    count: dict[Modality, int] = {"image": 0, "video": 0, "audio": 0}
    for prompt in prompts:
        for ref in prompt.media:
            count[ref.modality] += rows // len(prompts)
    return count


def videos_with_sound(one: RenderedBatch, call: ProcessorCall) -> int:
    """Videos in the conversations of a call, over all its rows, except those whose file is known to
    have no track."""
    prompts = one.prompts
    heard = sum(
        ref.modality == "video" and replay_media.has_track(ref.path) is not False
        for prompt in prompts
        for ref in prompt.media
    )
    return heard * (len(call.texts) // max(len(prompts), 1))


def shown(one: RenderedBatch, call: ProcessorCall, case: Case) -> tuple[Shown, ...]:
    """Every media item of a call with its file; none where rows or counts cannot be matched."""
    rows, prompts = given_rows(call, case), owners(one, call, case)
    if rows is None:
        return ()
    found: list[Shown] = []
    for row, prompt in zip(rows, prompts or (None,) * len(rows), strict=True):
        interleaved = audio_route(call, case) == "interleaved" and bool(row.media["video"])
        named = _files(row, prompt, interleaved, call, case)
        every = _with_opened(named, row, case)
        said = {ref.path for ref in named}
        refs = replay_media.wanted(every, interleaved)
        for modality, media in row.media.items():
            if len(media) != len(refs[modality]):
                continue  # reported by the counts
            for index, (given, ref) in enumerate(zip(media, refs[modality], strict=True)):
                read = replay_media.read_file(ref, case)
                asked = _asked(one, call.texts[row.index], case) if prompts is None else ()
                opened = ref.path not in said
                found.append(Shown(row.index, index, given, ref, read, frozenset(asked), opened))
    return tuple(found)


def _asked(one: RenderedBatch, text: str, case: Case) -> Iterator[str]:
    wanted = collapsed(text, marks(case))
    for prompt in one.prompts:
        if prompt.text == wanted:
            yield from (ref.path for ref in prompt.media)


def _files(
    row: Given, prompt: RenderedPrompt | None, interleaved: bool, call: ProcessorCall, case: Case
) -> tuple[MediaRef, ...]:
    """A row's media in order, by the files that its messages name. Trainers that pass pictures
    beside the messages write ``{"type": "image"}`` and keep the path in a column."""
    kinds = [m for m in MODALITIES if not (interleaved and m == "audio")]
    by_place = tuple(MediaRef(kind, "") for kind in kinds for _ in row.media[kind])
    refs = by_place if prompt is None else prompt.media
    fed = rows_in(case, call)
    if all(map(_is_here, refs)) or row.index >= len(fed):
        return refs
    return _with_files(refs, _listed(case, fed[row.index]))


def _is_here(ref: MediaRef) -> bool:
    return replay_media.file_of(ref.path) is not None


def _listed(case: Case, fed: FedRow) -> tuple[tuple[str, str], ...]:
    """(modality, path) of the media in the columns that rewards got with a row's completions; none
    where rows of equal content have others."""
    answers = [(one.completion, one.row) for one in rewarded(case) if one.completion is not None]
    same_ids = [one for one in answers if one[0].prompt.ids == fed.ids]
    same = [one for one in same_ids or answers if same_media(fed, one[0].prompt)] or same_ids
    in_place = [one for one in same if one[0].at == fed.at]
    for own in (same, in_place):
        listed = {paths_of(row) for _, row in own}
        if len(listed) == 1:
            return listed.pop()
    return ()


def _with_files(
    refs: Sequence[MediaRef], listed: Sequence[tuple[str, str]]
) -> tuple[MediaRef, ...]:
    """Media that name no file, with those listed for their modality; or for none, where only one
    modality is looked for."""
    lacking = [ref for ref in refs if not _is_here(ref)]
    single = len({ref.modality for ref in lacking}) == 1
    found: dict[int, MediaRef] = {}
    for modality in MODALITIES:
        own = [ref for ref in lacking if ref.modality == modality]
        paths = [path for kind, path in listed if kind == modality]
        if not paths and single:
            paths = [path for kind, path in listed if kind not in MODALITIES]
        if len(paths) == len(own):
            found |= {
                id(ref): replace(ref, path=path) for ref, path in zip(own, paths, strict=True)
            }
    return tuple(found.get(id(ref), ref) for ref in refs)


def _with_opened(refs: Sequence[MediaRef], row: Given, case: Case) -> tuple[MediaRef, ...]:
    """Media that name no file, with the one that the loop opened for them."""
    if all(map(_is_here, refs)):
        return tuple(refs)
    files, given = opened_files(case), {kind: iter(held) for kind, held in row.media.items()}
    found = []
    for ref in refs:
        medium = next(given[ref.modality], None)
        path = "" if medium is None else files.get((ref.modality, medium.sha256), "")
        found.append(replace(ref, path=path) if path and not _is_here(ref) else ref)
    return tuple(found)


def _same_copies(call: ProcessorCall, case: Case, order: tuple[int, ...]) -> int:
    """How many rows of one conversation have the same media: distinguishes 1122 from 1212 where
    texts are equal."""
    rows = given_rows(call, case)
    if rows is None:
        return 0
    first: dict[int, Mapping[Modality, list[str]]] = {}
    same = 0
    for row, owner in zip(rows, order, strict=True):
        hashes = _hashes(row)
        same += first.setdefault(owner, hashes) == hashes
    return same


def _hashes(row: Given) -> Mapping[Modality, list[str]]:
    return {modality: [m.sha256 for m in media] for modality, media in row.media.items()}


def once(found: Sequence[Shown]) -> list[Shown]:
    """Without the copies of a group."""
    kept: dict[object, Shown] = {}
    for item in found:
        kept.setdefault((item.ref, item.given.sha256), item)
    return list(kept.values())
