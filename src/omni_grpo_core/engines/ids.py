"""What an engine read against what the trainer reads: ids, span by span, and what made the
difference."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from omni_grpo_core.types import MODALITIES, Modality, Row, Stage


class Disagreement(NamedTuple):
    """``stage`` is the one to blame, ``name`` what is wrong, ``detail`` what was seen."""

    stage: Stage
    name: str
    detail: str


class Run(NamedTuple):
    """Adjacent placeholders of one modality; ``modality`` ``None``: text."""

    modality: Modality | None
    start: int
    length: int


def runs(ids: Sequence[int], placeholders: Mapping[Modality, int]) -> list[Run]:
    """Text and placeholders in token order.

    >>> runs([5, 9, 9, 6], {"image": 7, "video": 9, "audio": 8})[1]
    Run(modality='video', start=1, length=2)
    """
    of = {token: modality for modality, token in placeholders.items()}
    found, start = [], 0
    for modality, group in itertools.groupby(ids, of.get):
        length = len(list(group))
        found.append(Run(modality, start, length))
        start += length
    return found


def in_words(ids: Sequence[int], placeholders: Mapping[Modality, int]) -> str:
    """``"8 video, 50 audio"``: the placeholders in order."""
    media = [run for run in runs(ids, placeholders) if run.modality is not None]
    return ", ".join(f"{run.length} {run.modality}" for run in media) or "no media"


def compare_ids(
    rows: Sequence[Row],
    read: Sequence[tuple[int, ...]],
    placeholders: Mapping[Modality, int],
) -> list[Disagreement]:
    """What is wrong, each once, with the first row that shows it."""
    own = [tuple(row.input_ids.tolist()) for row in rows]
    if own != list(read) and Counter(own) == Counter(read):
        at = next(i for i, pair in enumerate(zip(own, read, strict=True)) if pair[0] != pair[1])
        return [
            Disagreement(
                "completion",
                "answers belong to their prompts",
                f"answer {at} is to the prompt of {rows[read.index(own[at])].sample_id}'s place: "
                "the engine's answers are in another order than its requests",
            )
        ]
    found: dict[tuple[Stage, str], list[str]] = {}
    for row, ours, theirs in zip(rows, own, read, strict=True):
        if ours != theirs:
            for one in _differences(row.sample_id, ours, theirs, placeholders):
                found.setdefault((one.stage, one.name), []).append(one.detail)
    return [
        Disagreement(*what, first + (f"; and {len(more)} more rows" if more else ""))
        for what, (first, *more) in found.items()
    ]


def _differences(
    sample: str, own: tuple[int, ...], read: tuple[int, ...], placeholders: Mapping[Modality, int]
) -> list[Disagreement]:
    media = set(placeholders.values())
    ours = {m: own.count(placeholders[m]) for m in MODALITIES}
    theirs = {m: read.count(placeholders[m]) for m in MODALITIES}
    at = next(
        (i for i, pair in enumerate(zip(own, read, strict=False)) if pair[0] != pair[1]),
        min(len(own), len(read)),
    )
    seen = (
        f"{sample}: token {at} is the first that differs; the engine reads "
        f"{in_words(read, placeholders)}, the trainer {in_words(own, placeholders)}"
    )
    lost = [m for m in MODALITIES if ours[m] and not theirs[m]]
    if lost:
        return [Disagreement("media", f"{m} reaches the engine", seen) for m in lost]
    if [t for t in own if t not in media] != [t for t in read if t not in media]:
        return [Disagreement("text", "the engine reads the batch's text", seen)]
    if ours == theirs:
        return [Disagreement("batch", "the engine interleaves as the batch does", seen)]
    items = Counter(run.modality for run in runs(own, placeholders))
    twice = [m for m in MODALITIES if theirs[m] == 2 * ours[m] - items[m] and ours[m] > 1]
    if twice:
        return [Disagreement("batch", "placeholders are expanded once", seen)]
    return [Disagreement("batch", "media have the batch's size in the engine", seen)]
