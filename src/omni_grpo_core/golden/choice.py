"""Which rows of a data set a new suite takes: one of every kind that is there.

A row's kind is its modalities, how the sound of its video reaches the model, its problem type, and
whether its prompt is short, medium or long among the data's. Only rows and file headers are read:
nothing is decoded and no model is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal, get_args

from omni_grpo_core.core.conversation import build_conversation
from omni_grpo_core.core.media import probe
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.training.headers import Header
from omni_grpo_core.training.prompt_estimate import (
    FileHeaders,
    prompt_sizes,
    read_headers,
    token_shape,
)
from omni_grpo_core.types import (
    MODALITIES,
    PROBLEM_TYPES,
    AudioInVideo,
    Conversation,
    Modality,
    ProblemType,
    Sample,
    audio_words,
)

MOST_CASES = 60
"""Rows that a suite takes unless told otherwise."""
_CHECKED = 8
_MOST_PADDED = 4
Length = Literal["short", "medium", "long"]
LENGTHS: tuple[Length, ...] = get_args(Length)
_AUDIO: tuple[AudioInVideo, ...] = get_args(AudioInVideo)


@dataclass(frozen=True, slots=True)
class RowKind:
    """How a row travels through the pipeline. ``audio``: of the row's video, ``None`` without
    one."""

    modalities: tuple[Modality, ...]
    audio: str | None
    problem_type: ProblemType
    length: Length

    @property
    def name(self) -> str:
        """
        >>> RowKind(("video",), "interleaved", "multiple choice", "long").name
        'video-interleaved-multiple-choice-long'
        """
        parts = ["+".join(self.modalities) or "text", *self._audio]
        return "-".join((*parts, self.problem_type.replace(" ", "-").lower(), self.length))

    @property
    def words(self) -> str:
        """
        >>> RowKind(("image", "audio"), None, "OCR", "short").words
        'image + audio, OCR, short'
        """
        parts = [" + ".join(self.modalities) or "text", *self._audio]
        return ", ".join((*parts, self.problem_type, self.length))

    @property
    def _audio(self) -> tuple[str, ...]:
        return () if self.audio is None else (self.audio,)

    @property
    def values(self) -> frozenset[tuple[str, object]]:
        """Each of its values, with the name of what it is a value of."""
        return frozenset((name, getattr(self, name)) for name in self.__slots__)

    @property
    def pairs(self) -> frozenset[frozenset[tuple[str, object]]]:
        """Every two of its values."""
        return frozenset(map(frozenset, combinations(self.values, 2)))

    @property
    def order(self) -> tuple[object, ...]:
        """Text first, then by modality, audio mode, problem type and length."""
        return (
            len(self.modalities),
            [MODALITIES.index(modality) for modality in self.modalities],
            -1 if self.audio is None else _AUDIO.index(self.audio),
            PROBLEM_TYPES.index(self.problem_type),
            LENGTHS.index(self.length),
        )


@dataclass(frozen=True, slots=True)
class ChosenRow:
    """``row``: in the data file, from 0. ``tokens``: estimated length of its prompt. ``alike``: how
    many rows are of its kind."""

    row: int
    kind: RowKind
    tokens: int
    alike: int

    @property
    def why(self) -> str:
        """
        >>> ChosenRow(3, RowKind(("video",), "separate", "judge", "long"), 410, 12).why
        'first of 12, ≈ 410 tokens'
        """
        which = "the only one" if self.alike == 1 else f"first of {self.alike}"
        return f"{which}, ≈ {self.tokens} tokens"


@dataclass(frozen=True, slots=True)
class Choice:
    """``taken``: a row of each kind, in the kinds' order. ``left_out``: the kinds that found no
    place. ``rows``: of the data set. ``lengths``: the least and most tokens of each class."""

    taken: tuple[ChosenRow, ...]
    left_out: tuple[RowKind, ...]
    rows: int
    lengths: Mapping[Length, tuple[int, int]]

    @property
    def kinds(self) -> int:
        return len(self.taken) + len(self.left_out)

    @property
    def shortest(self) -> ChosenRow:
        return min(self.taken, key=lambda one: one.tokens)

    @property
    def checked(self) -> tuple[ChosenRow, ...]:
        """At most eight rows, one of each modality and audio mode first."""
        first = {(one.kind.modalities, one.kind.audio): one for one in reversed(self.taken)}
        ahead = [one for one in self.taken if one in first.values()]
        return tuple(dict.fromkeys((*ahead, *self.taken)))[:_CHECKED]

    @property
    def padded(self) -> tuple[ChosenRow, ...]:
        """The shortest and the longest row, with up to two that add a modality; none if all rows
        are alike."""
        longest = max(self.taken, key=lambda one: one.tokens)
        if longest.tokens == self.shortest.tokens:
            return ()
        found = [self.shortest, longest]
        for one in self.taken:
            there = {modality for other in found for modality in other.kind.modalities}
            if len(found) < _MOST_PADDED and not {*one.kind.modalities} <= there:
                found.insert(-1, one)
        return tuple(found)


def choose(
    samples: Sequence[Sample], settings: Settings, checkpoint: Path, most: int = MOST_CASES
) -> Choice:
    """The first row of every kind. With more kinds than ``most``, those are taken that cover every
    single value (each modality, audio mode, problem type and length), then every pair of values.

    Raises ``ConversationError`` for a row that contradicts the audio-in-video setting,
    ``MediaError`` for a broken file, ``CheckpointError`` for an invalid ``config.json``.
    """
    headers = _headers(samples)
    tracks = headers.tracks
    built = [
        build_conversation(sample, audio_in_video=settings.audio_in_video, tracks=tracks)
        for sample in samples
    ]
    sizes = prompt_sizes(samples, settings, token_shape(checkpoint), headers)
    tokens = [size.total for size in sizes]
    classes = length_classes(tokens)
    kinds = [
        _kind(sample, asked, classes[length])
        for sample, asked, length in zip(samples, built, tokens, strict=True)
    ]
    counts = Counter(kinds)
    first = {kind: row for row, kind in reversed(list(enumerate(kinds)))}
    covering = _covering(sorted(counts, key=lambda kind: first[kind]), most)
    bounds = {
        name: [length for length in tokens if classes[length] == name]
        for name in LENGTHS
        if name in classes.values()
    }
    return Choice(
        taken=tuple(
            ChosenRow(first[kind], kind, tokens[first[kind]], counts[kind])
            for kind in sorted(covering, key=lambda kind: kind.order)
        ),
        left_out=tuple(sorted({*counts} - {*covering}, key=lambda kind: kind.order)),
        rows=len(samples),
        lengths={name: (min(found), max(found)) for name, found in bounds.items()},
    )


def length_classes(lengths: Sequence[int]) -> dict[int, Length]:
    """The class of each length: the third of all rows, by length, that the middle one of the rows
    of just this length is in. Rows of one length are in one class.

    >>> length_classes([70, 90, 400]), length_classes([70, 70, 70])
    ({70: 'short', 90: 'medium', 400: 'long'}, {70: 'medium'})
    """
    classes: dict[int, Length] = {}
    shorter = 0
    for length, alike in sorted(Counter(lengths).items()):
        middle = (shorter + alike / 2) / len(lengths)
        classes[length] = LENGTHS[int(len(LENGTHS) * middle)]
        shorter += alike
    return classes


def _headers(samples: Sequence[Sample]) -> FileHeaders:
    """A clip whose header is in another format is read by the decoder, to its end."""
    headers = read_headers(samples)
    unknown = {path: probe(path) for path, clip in headers.clips.items() if clip is None}
    heard = {
        path: Header(audio_seconds=found.duration if found.has_audio else 0.0)
        for path, found in unknown.items()
    }
    return replace(headers, clips={**headers.clips, **heard})


def _kind(sample: Sample, conversation: Conversation, length: Length) -> RowKind:
    there = {ref.modality for ref in sample.media}
    return RowKind(
        modalities=tuple(modality for modality in MODALITIES if modality in there),
        audio=audio_words(conversation.audio_in_video) if "video" in there else None,
        problem_type=sample.problem_type,
        length=length,
    )


def _covering(kinds: Sequence[RowKind], most: int) -> list[RowKind]:
    """At most ``most`` kinds: each time the one with most values that none before it has, then the
    one with most such pairs, then the one whose row comes first."""
    left = {kind: (kind.values, kind.pairs) for kind in kinds}
    taken = list[RowKind]()
    values, pairs = set[object](), set[object]()
    while left and len(taken) < most:
        # the first of the best ones
        best = max(left, key=lambda kind: (len(left[kind][0] - values), len(left[kind][1] - pairs)))
        taken.append(best)
        shown, shown_together = left.pop(best)
        values |= shown
        pairs |= shown_together
    return taken
