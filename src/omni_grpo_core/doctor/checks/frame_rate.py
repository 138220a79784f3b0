"""The rate at which a clip's frames were taken, beside the one that its positions count by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import PurePath

import torch

from omni_grpo_core.doctor.checks.other_files import beside
from omni_grpo_core.doctor.checks.pictures import frames, moves, twin_of
from omni_grpo_core.doctor.evidence import Case, Evidence
from omni_grpo_core.doctor.file_frames import matched
from omni_grpo_core.doctor.media_similarity import array, levels
from omni_grpo_core.doctor.rendered import rendered_batches
from omni_grpo_core.doctor.replay.batch import DEFAULT_RATE, rate_of
from omni_grpo_core.doctor.shown_media import Shown, once, shown
from omni_grpo_core.trace.calls import ProcessorCall

_EVEN = 2
"""Frames: qwen-omni-utils samples a multiple of it."""
_WRONG_RATE = 1 / 3
"""Of the true frame rate: a clip is shown at another speed."""
_OTHER_RATE = 0.02
"""The same, up to which a rate is the true one, rounded or of whole frames."""


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
            items = once(shown(one, call, case))
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
    held = None if values is None or values.dim() != 4 else frames(item, values)
    if values is None or held is None or number < 2:
        return _Rate(item, took, even, even)
    given = levels(values, call.keywords)
    match = matched(given, held.pictures)
    if len({*match.numbers}) < number <= len(held.pictures) and moves(held):
        return None  # frames that come again, where the file has others, have no rate
    length = held.times[match.numbers[-1]] - held.times[match.numbers[0]]
    if not match.is_found and twin_of(item, given, match, chain(every, beside(item, case))):
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
