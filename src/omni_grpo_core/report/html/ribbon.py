"""The token sequence of one row as a ribbon: runs of text, special tokens and each medium."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from torch import Tensor

from omni_grpo_core.report.html import Decode, number_range, tokens_per_cell
from omni_grpo_core.types import Modality, Row, Span

Kind = Literal["text", "special", "image", "video", "audio"]
_SPECIAL = re.compile(r"<\|[^|]*\|>")


@dataclass(frozen=True, slots=True)
class Cell:
    """One token, or several of the same kind. ``title`` gives everything known about it."""

    title: str


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring tokens of one kind. ``label``: what they are, and their range; ``note``: the
    text, or the position in time and picture of a medium's tokens. ``changed``: in a comparison of
    two sides, these tokens are only on this one."""

    kind: Kind
    label: str
    note: str
    cells: tuple[Cell, ...]
    changed: bool = False


def ribbon(row: Row, positions: Tensor | None, decode: Decode) -> tuple[Run, ...]:
    """The runs of ``row`` in token order.

    ``positions``: (3, length): time, height and width of each token, without padding.
    ``decode``: ids -> text with special tokens kept.
    """
    ids: list[int] = row.input_ids.tolist()
    texts = {token: decode([token]) for token in set(ids)}
    per_cell = tokens_per_cell(len(ids))
    runs = []
    for kind, item, _, start, stop in stretches(row.spans, [texts[token] for token in ids]):
        name = kind if item is None else f"{kind} {item}"
        cells = []
        for first in range(start, stop, per_cell):
            last = min(first + per_cell, stop) - 1
            what = "".join(texts[token] for token in ids[first : last + 1])
            which = number_range(ids[first], ids[last])
            title = f"token {number_range(first, last)} · {what!r} · id {which} · {name}"
            if positions is not None:
                title += f" · position {_where(positions, first, last)}"
            cells.append(Cell(title))
        note = "" if positions is None else _where(positions, start, stop - 1)
        if kind == "special":
            name, note = " ".join(texts[token] for token in ids[start:stop]), ""
        elif kind == "text":
            note = " ".join(decode(ids[start:stop]).replace("\n", " ↵ ").split())
        runs.append(Run(kind, f"{name} · {number_range(start, stop - 1)}", note, tuple(cells)))
    return tuple(runs)


def stretches(
    spans: Sequence[Span], texts: Sequence[str], changed: Collection[int] = ()
) -> Iterator[tuple[Kind, int | None, bool, int, int]]:
    """(kind, item, whether in ``changed``, first token, token after the last) of each run."""
    owner: dict[int, tuple[Modality, int, int]] = {}
    for number, span in enumerate(spans):
        for token in range(span.start, span.start + span.length):
            owner[token] = (span.modality, span.item, number)

    def label(token: int) -> tuple[Kind, int | None, int, bool]:
        marked = token in changed
        if token in owner:
            return (*owner[token], marked)
        special = _SPECIAL.fullmatch(texts[token])
        return ("special" if special else "text"), None, -1, marked

    start = 0
    for (kind, item, _, marked), group in groupby(range(len(texts)), key=label):
        stop = start + len(list(group))
        yield kind, item, marked, start, stop
        start = stop


def _where(positions: Tensor, first: int, last: int) -> str:
    """``t`` is time, ``h`` and ``w`` the position in the picture."""
    part = positions[:, first : last + 1]
    axes = zip("thw", part.min(dim=1).values.tolist(), part.max(dim=1).values.tolist(), strict=True)
    return " ".join(f"{axis} {number_range(low, high)}" for axis, low, high in axes)
