"""A prompt as pieces: stretches of text, and media with the marks around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from omni_grpo_core.core.batch import placeholder_ids
from omni_grpo_core.types import Modality

Kind = Literal["text", "image", "video", "audio", "both"]
"""``both``: a video with its track inside it."""


@dataclass(frozen=True, slots=True)
class Names:
    """Token ids: each modality's placeholder, the marks around vision and audio, and padding."""

    placeholder: dict[Modality, int]
    vision: tuple[int, int]
    audio: tuple[int, int]
    padding: int | None = None

    def kind_of(self, token: int) -> Modality | None:
        return next((kind for kind, own in self.placeholder.items() if own == token), None)


def names_of(processor: Any) -> Names:
    """The names of a processor."""
    marks = processor.tokenizer.convert_tokens_to_ids(
        [
            processor.vision_bos_token,
            processor.vision_eos_token,
            processor.audio_bos_token,
            processor.audio_eos_token,
        ]
    )
    return Names(
        placeholder_ids(processor),
        (marks[0], marks[1]),
        (marks[2], marks[3]),
        processor.tokenizer.pad_token_id,
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """Text, or one run of placeholders with the marks directly around it. ``body``: the
    placeholders; for text, everything."""

    kind: Kind
    body: tuple[int, ...]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        return self.before + self.body + self.after

    def collapsed(self, names: Names) -> tuple[int, ...]:
        """The piece as the chat template writes it: one placeholder per medium. The marks of the
        sound inside a video are written when it is expanded."""
        if self.kind == "text":
            return self.body
        modality: Modality = "video" if self.kind == "both" else self.kind
        body = (names.placeholder[modality],)
        if modality == "audio":
            return self.before + body + self.after
        before = tuple(token for token in self.before if token not in names.audio)
        after = tuple(token for token in self.after if token not in names.audio)
        return before + body + after


def parse(ids: Sequence[int], names: Names) -> tuple[Piece, ...]:
    """The pieces of a prompt, in order.

    >>> names = Names({"image": 1, "video": 2, "audio": 3}, (10, 11), (20, 21))
    >>> [(p.kind, p.ids) for p in parse([7, 10, 20, 2, 2, 3, 21, 11, 8], names)]
    [('text', (7,)), ('both', (10, 20, 2, 2, 3, 21, 11)), ('text', (8,))]
    """
    runs = [list(run) for _, run in groupby(ids, lambda token: names.kind_of(token) is not None)]
    pieces: list[Piece] = []
    for index, run in enumerate(runs):
        kinds = {names.kind_of(token) for token in run}
        if not run:  # marks of the medium before it
            continue
        if None in kinds:
            pieces.append(Piece("text", tuple(run)))
            continue
        before = _taken(runs[index - 1], names, last=True) if index else ()
        after = _taken(runs[index + 1], names, last=False) if index + 1 < len(runs) else ()
        if before:  # they were counted as text
            text = pieces.pop().body[: -len(before)]
            pieces += [Piece("text", text)] if text else []
        if after:
            del runs[index + 1][: len(after)]
        found = sorted(kind for kind in kinds if kind)
        kind: Kind = "both" if found == ["audio", "video"] else found[0]
        pieces.append(Piece(kind, tuple(run), before, after))
    return tuple(piece for piece in pieces if piece.ids)


def _taken(run: Sequence[int], names: Names, *, last: bool) -> tuple[int, ...]:
    """The marks at one end of a stretch of text: begins before a medium, ends after it."""
    marks = (names.vision[0], names.audio[0]) if last else (names.vision[1], names.audio[1])
    taken: list[int] = []
    for token in reversed(run) if last else run:
        if token not in marks or token in taken:
            break
        taken.append(token)
    return tuple(reversed(taken)) if last else tuple(taken)


def flat(pieces: Sequence[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.ids]


def runs_of(
    ids: Sequence[int], names: Names
) -> Iterator[tuple[Modality | Literal["text"], int, int]]:
    """(kind, first token, number of tokens) of each run of placeholders or of other tokens."""
    start = 0
    for kind, run in groupby(ids, names.kind_of):
        length = len(list(run))
        yield kind or "text", start, length
        start += length


def described(ids: Sequence[int], names: Names) -> str:
    """The media of a prompt in a few words.

    >>> names = Names({"image": 1, "video": 2, "audio": 3}, (10, 11), (20, 21))
    >>> described([7, 10, 20, 2, 2, 3, 21, 11, 8], names)
    '2 video, 1 audio'
    """
    parts = [f"{n} {kind}" for kind, _, n in runs_of(ids, names) if kind != "text"]
    return ", ".join(parts) or "no media"
