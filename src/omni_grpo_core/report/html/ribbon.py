"""The token sequence of one row as a ribbon: runs of text, of special tokens, of each medium."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from omni_grpo_core.types import Modality, Row

Kind = Literal["text", "special", "image", "video", "audio"]
MOST_CELLS = 600
"""Cells of a ribbon; a longer row has several tokens a cell, so that the page stays small."""
_SPECIAL = re.compile(r"<\|[^|]*\|>")


@dataclass(frozen=True, slots=True)
class Cell:
    """One token, or a few alike. ``title`` tells all there is to know about it."""

    title: str


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring tokens of one kind. ``label`` names what they are and their range; ``note``
    tells the text, or where in time and picture the tokens of a medium stand."""

    kind: Kind
    label: str
    note: str
    cells: tuple[Cell, ...]


def tokens_a_cell(length: int) -> int:
    """How many tokens a cell of a ribbon of ``length`` tokens stands for, at the most.

    >>> tokens_a_cell(210), tokens_a_cell(2400)
    (1, 4)
    """
    return max(1, -(-length // MOST_CELLS))


def ribbon(
    row: Row, positions: Tensor | None, decode: Callable[[Sequence[int]], str]
) -> tuple[Run, ...]:
    """The runs of ``row`` in token order.

    ``positions``: (3, length): time, height, width of each token, without padding.
    ``decode``: ids -> text with special tokens kept.
    """
    ids: list[int] = row.input_ids.tolist()
    texts = {token: decode([token]) for token in set(ids)}
    per_cell = tokens_a_cell(len(ids))
    runs = []
    for kind, item, start, stop in _stretches(row, [texts[token] for token in ids]):
        name = kind if item is None else f"{kind} {item}"
        cells = []
        for first in range(start, stop, per_cell):
            last = min(first + per_cell, stop) - 1
            what = "".join(texts[token] for token in ids[first : last + 1])
            title = f"token {_range(first, last)} · {what!r} · id {_range(ids[first], ids[last])}"
            title += f" · {name}"
            if positions is not None:
                title += f" · position {_where(positions, first, last)}"
            cells.append(Cell(title))
        note = "" if positions is None else _where(positions, start, stop - 1)
        if kind == "special":
            name, note = " ".join(texts[token] for token in ids[start:stop]), ""
        elif kind == "text":
            note = " ".join(decode(ids[start:stop]).replace("\n", " ↵ ").split())
        runs.append(Run(kind, f"{name} · {_range(start, stop - 1)}", note, tuple(cells)))
    return tuple(runs)


def _stretches(row: Row, texts: Sequence[str]) -> Iterator[tuple[Kind, int | None, int, int]]:
    """(kind, item, first token, token after the last)."""
    owner: dict[int, tuple[Modality, int, int]] = {}
    for number, span in enumerate(row.spans):
        for token in range(span.start, span.start + span.length):
            owner[token] = (span.modality, span.item, number)

    def label(token: int) -> tuple[Kind, int | None, int]:
        if token in owner:
            return owner[token]
        return ("special" if _SPECIAL.fullmatch(texts[token]) else "text"), None, -1

    start = 0
    for token in range(1, len(texts) + 1):
        if token == len(texts) or label(token) != label(start):
            kind, item, _ = label(start)
            yield kind, item, start, token
            start = token


def _where(positions: Tensor, first: int, last: int) -> str:
    """``t`` is time, ``h`` and ``w`` the place in the picture."""
    part = positions[:, first : last + 1]
    axes = zip("thw", part.min(dim=1).values.tolist(), part.max(dim=1).values.tolist(), strict=True)
    return " ".join(f"{axis} {_range(low, high)}" for axis, low, high in axes)


def _range(first: float, last: float) -> str:
    return f"{first:.9g}" if first == last else f"{first:.9g}–{last:.9g}"
