"""What an engine read against what the trainer reads: ids, span by span, and what made the
difference."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from omni_grpo_core.types import MODALITIES, Disagreement, Modality, Row, RowSeen, Stage


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
    decode: Callable[[Sequence[int]], str] = str,
) -> list[Disagreement]:
    """What is wrong, each once, with all rows that show it."""
    own = [tuple(row.input_ids.tolist()) for row in rows]
    pairs = [
        (at, *pair) for at, pair in enumerate(zip(own, read, strict=True)) if pair[0] != pair[1]
    ]
    seen = {
        at: _seen(at, rows[at].sample_id, ours, theirs, placeholders, decode)
        for at, ours, theirs in pairs
    }
    if pairs and Counter(own) == Counter(read):
        at, _, theirs = pairs[0]
        return [
            Disagreement(
                "completion",
                "answers belong to their prompts",
                f"answer {at} is to the prompt of {rows[own.index(theirs)].sample_id} instead of "
                f"{rows[at].sample_id}: the engine's answers are in another order than its "
                "requests",
                rows=tuple(seen.values()),
            )
        ]
    found: dict[tuple[Stage, str], list[int]] = {}
    # the rows have each other's sizes
    exchanged = [
        modality
        for modality, token in placeholders.items()
        if Counter(ids.count(token) for ids in own) == Counter(ids.count(token) for ids in read)
    ]
    for at, ours, theirs in pairs:
        moved = [
            m for m in exchanged if ours.count(placeholders[m]) != theirs.count(placeholders[m])
        ]
        for what in _differences(ours, theirs, placeholders):
            if moved and what[0] == "batch":
                what = ("media", f"{moved[0]} stays with its row")
            found.setdefault(what, []).append(at)
    return [
        Disagreement(
            *what,
            seen[first].sentence + (f"; and {len(more)} more rows" if more else ""),
            rows=tuple(seen[at] for at in (first, *more)),
        )
        for what, (first, *more) in found.items()
    ]


def _seen(
    at: int,
    sample: str,
    own: tuple[int, ...],
    read: tuple[int, ...],
    placeholders: Mapping[Modality, int],
    decode: Callable[[Sequence[int]], str],
) -> RowSeen:
    """The first token that differs, and the spans of both sides."""
    pairs = itertools.zip_longest(own, read)
    token = next(i for i, pair in enumerate(pairs) if pair[0] != pair[1])
    sides = {"engine": read[token : token + 1], "trainer": own[token : token + 1]}
    spans = {"engine": in_words(read, placeholders), "trainer": in_words(own, placeholders)}
    engine, trainer = (f"{decode(ids)!r}" if ids else "the end" for ids in sides.values())
    return RowSeen(
        at,
        f"{sample}: token {token} is the first that differs: {engine} to the engine, {trainer} to "
        f"the trainer; the engine reads {spans['engine']}, the trainer {spans['trainer']}",
        {"sample": sample, "token": token, "ids": sides, "spans": spans},
    )


def _differences(
    own: tuple[int, ...], read: tuple[int, ...], placeholders: Mapping[Modality, int]
) -> list[tuple[Stage, str]]:
    media = set(placeholders.values())
    ours, theirs = _items(own, placeholders), _items(read, placeholders)
    lost = [m for m in MODALITIES if theirs[m] < ours[m]]
    if lost:
        return [("media", f"{m} reaches the engine") for m in lost]
    # the marks around media belong to them, as far as their number goes
    marks = media | _beside(own, media) | _beside(read, media)
    if [t for t in own if t not in marks] != [t for t in read if t not in marks]:
        return [("text", "the engine reads the batch's text")]
    sizes, seen = (
        Counter((run.modality, run.length) for run in runs(ids, placeholders) if run.modality)
        for ids in (own, read)
    )
    if theirs != ours and not (seen - sizes).keys() - sizes.keys():
        return [("media", "media are sent once")]
    counts = {m: (own.count(placeholders[m]), read.count(placeholders[m])) for m in MODALITIES}
    parts = Counter(run.modality for run in runs(own, placeholders))
    # of each item the first placeholder, wherever the marks that the engine adds leave the rest
    if any(now == 2 * was - parts[m] and was > 1 for m, (was, now) in counts.items()):
        return [("batch", "placeholders are expanded once")]
    if Counter(own) == Counter(read):
        return [("batch", "the engine interleaves as the batch does")]
    if [t for t in own if t not in media] != [t for t in read if t not in media]:
        return [("text", "the engine reads the batch's text")]
    return [("batch", "media have the batch's size in the engine")]


def _items(ids: Sequence[int], placeholders: Mapping[Modality, int]) -> Counter[Modality]:
    """How many items of each modality there are: a clip and the sound inside it are one of each."""
    of = {token: modality for modality, token in placeholders.items()}
    found: Counter[Modality] = Counter()
    for inside, group in itertools.groupby(ids, of.__contains__):
        if inside:
            found.update({of[token] for token in group})
    return found


def _beside(ids: Sequence[int], media: set[int]) -> set[int]:
    """The tokens next to media: the marks at which they begin and end."""
    return {
        token
        for before, token, after in zip((-1, *ids), ids, (*ids[1:], -1), strict=False)
        if before in media or after in media
    }
