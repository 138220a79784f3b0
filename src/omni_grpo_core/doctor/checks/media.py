"""Looks at media: all that the messages name reach the processor, and the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from omni_grpo_core.doctor.checks import content
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Origin
from omni_grpo_core.doctor.rendered import flag_of, rendered_batches
from omni_grpo_core.doctor.replay.batch import audio_route, sides, totals
from omni_grpo_core.doctor.shown_media import videos_with_sound, wanted_counts
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


def _sound_missing(call: ProcessorCall, case: Case, modality: Modality) -> bool:
    """Whether there is no sound at all although audio-in-video is on."""
    if modality != "audio" or not flag_of(call.keywords) or call.audios:
        return False
    return audio_route(call, case) == "items" and bool(totals(call, case)["video"])


def _audio_by_another_name(call: ProcessorCall) -> bool:
    return "audios" in call.ignored or "audios" in call.keywords


LOOKS: tuple[Look, ...] = (look_counts, look_limits, *content.LOOKS)
