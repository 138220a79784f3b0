"""Two token sequences as ribbons side by side, with what only one of them has marked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

from omni_grpo_core.golden.results import Tokens
from omni_grpo_core.report.html.ribbon import Cell, Kind, tokens_a_cell
from omni_grpo_core.types import Modality

_SPECIAL = re.compile(r"<\|[^|]*\|>")
_MOST_STEPS = 4_000_000
"""Pairs of runs that are compared; what is longer and differs is marked as a whole."""


@dataclass(frozen=True, slots=True)
class DiffRun:
    """Neighbouring tokens of one kind, all of them on both sides or all on this one alone."""

    kind: Kind
    label: str
    note: str
    cells: tuple[Cell, ...]
    changed: bool


@dataclass(frozen=True, slots=True)
class SpanChange:
    """One stretch of a medium: ``was`` and ``now`` are token ranges, empty where there is none."""

    modality: Modality
    label: str
    was: str
    now: str


def changed_tokens(was: Sequence[int], now: Sequence[int]) -> tuple[set[int], set[int]]:
    """Indices of the ids of ``was`` that ``now`` has not, in order, and the other way round.

    A run of one id counts as one: of a placeholder that is repeated more often now, only what was
    added is marked.

    >>> changed_tokens([1, 7, 7, 2], [1, 7, 7, 7, 3])
    ({3}, {3, 4})
    """
    before, after = _runs(was), _runs(now)
    gone: set[int] = set()
    come: set[int] = set()
    for tag, i, j, k, m in _opcodes([run[0] for run in before], [run[0] for run in after]):
        kept = [0] * max(j - i, m - k)
        if tag == "equal":
            kept = [min(a[2], b[2]) for a, b in zip(before[i:j], after[k:m], strict=True)]
        for runs, marked in ((before[i:j], gone), (after[k:m], come)):
            for (_, start, count), both in zip(runs, kept, strict=False):
                marked.update(range(start + both, start + count))
    return gone, come


def _runs(ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """(id, first index, count)."""
    found, start = [], 0
    for token, group in groupby(ids):
        count = len(list(group))
        found.append((token, start, count))
        start += count
    return found


def _opcodes(was: list[int], now: list[int]) -> list[tuple[str, int, int, int, int]]:
    """As :meth:`difflib.SequenceMatcher.get_opcodes`, which is quadratic, with bounds."""
    shorter = min(len(was), len(now))
    head = next((i for i in range(shorter) if was[i] != now[i]), shorter)
    rest = shorter - head
    tail = next((i for i in range(rest) if was[-1 - i] != now[-1 - i]), rest)
    a, b = len(was) - tail, len(now) - tail
    if (a - head) * (b - head) > _MOST_STEPS:
        middle: list[tuple[str, int, int, int, int]] = [("replace", 0, a - head, 0, b - head)]
    else:
        matcher = SequenceMatcher(None, was[head:a], now[head:b], autojunk=False)
        middle = list(matcher.get_opcodes())
    shifted = [(tag, i + head, j + head, k + head, m + head) for tag, i, j, k, m in middle]
    return [
        ("equal", 0, head, 0, head),
        *shifted,
        ("equal", a, len(was), b, len(now)),
    ]


def diff_ribbon(tokens: Tokens, changed: set[int]) -> tuple[DiffRun, ...]:
    """The runs of one side, in token order."""
    per_cell = tokens_a_cell(len(tokens.ids))
    runs = []
    for kind, item, marked, start, stop in _stretches(tokens, changed):
        name = kind if item is None else f"{kind} {item}"
        text = "".join(tokens.words[start:stop])
        cells = []
        for first in range(start, stop, per_cell):
            last = min(first + per_cell, stop) - 1
            what = "".join(tokens.words[first : last + 1])
            ids = _range(tokens.ids[first], tokens.ids[last])
            cells.append(Cell(f"token {_range(first, last)} · {what!r} · id {ids} · {name}"))
        if kind == "special":
            label, note = text, ""
        else:
            label, note = name, " ".join(text.replace("\n", " ↵ ").split())
            note = note if kind == "text" else ""
        runs.append(DiffRun(kind, f"{label} · {_range(start, stop - 1)}", note, tuple(cells),
                            marked))  # fmt: skip
    return tuple(runs)


def _stretches(
    tokens: Tokens, changed: set[int]
) -> Iterator[tuple[Kind, int | None, bool, int, int]]:
    owner: dict[int, tuple[Modality, int, int]] = {}
    for number, span in enumerate(tokens.spans):
        for token in range(span.start, span.start + span.length):
            owner[token] = (span.modality, span.item, number)

    def label(token: int) -> tuple[Kind, int | None, int, bool]:
        marked = token in changed
        if token in owner:
            return (*owner[token], marked)
        special = _SPECIAL.fullmatch(tokens.words[token])
        return ("special" if special else "text"), None, -1, marked

    start = 0
    for (kind, item, _, marked), group in groupby(range(len(tokens.ids)), key=label):
        stop = start + len(list(group))
        yield kind, item, marked, start, stop
        start = stop


def span_changes(was: Tokens | None, now: Tokens | None) -> tuple[SpanChange, ...]:
    """Spans that are gone, new, elsewhere or of another length, in the order of the golden."""
    before, after = _parts(was), _parts(now)
    found = []
    for key in {**before, **after}:
        old, new = before.get(key, ""), after.get(key, "")
        if old != new:
            modality, item, part = key
            label = f"{modality} {item}" + (f", part {part}" if part else "")
            found.append(SpanChange(modality, label, old, new))
    return tuple(found)


def _parts(tokens: Tokens | None) -> dict[tuple[Modality, int, int], str]:
    seen: Counter[tuple[Modality, int]] = Counter()
    found = {}
    for span in () if tokens is None else tokens.spans:
        item = (span.modality, span.item)
        last = span.start + span.length - 1
        found[(*item, seen[item])] = f"{_range(span.start, last)} ({span.length} tokens)"
        seen[item] += 1
    return found


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"
