"""Two token sequences as ribbons side by side, with one-sided tokens marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import groupby

from omni_grpo_core.golden.results import Tokens
from omni_grpo_core.report.html import number_range, tokens_per_cell
from omni_grpo_core.report.html.ribbon import Cell, Run, stretches
from omni_grpo_core.types import Modality

_MOST_STEPS = 4_000_000
"""Pairs of runs to compare; beyond that the differing stretch is marked as a whole."""


def changed_tokens(was: Sequence[int], now: Sequence[int]) -> tuple[set[int], set[int]]:
    """Indices of the ids in ``was`` but not in ``now``, in order, and vice versa.

    A run of equal ids counts as one: if a placeholder is repeated more often now, only the added
    tokens are marked.

    >>> changed_tokens([1, 7, 7, 2], [1, 7, 7, 7, 3])
    ({3}, {3, 4})
    """
    before, after = _runs(was), _runs(now)
    removed: set[int] = set()
    added: set[int] = set()
    for tag, i, j, k, m in _opcodes([run[0] for run in before], [run[0] for run in after]):
        kept = [0] * max(j - i, m - k)
        if tag == "equal":
            kept = [min(a[2], b[2]) for a, b in zip(before[i:j], after[k:m], strict=True)]
        for runs, marked in ((before[i:j], removed), (after[k:m], added)):
            for (_, start, count), both in zip(runs, kept, strict=False):
                marked.update(range(start + both, start + count))
    return removed, added


def _runs(ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """(id, first index, count)."""
    found, start = [], 0
    for token, group in groupby(ids):
        count = len(list(group))
        found.append((token, start, count))
        start += count
    return found


def _opcodes(was: list[int], now: list[int]) -> list[tuple[str, int, int, int, int]]:
    """As :meth:`difflib.SequenceMatcher.get_opcodes`, which is quadratic, but bounded."""
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


def diff_ribbon(tokens: Tokens, changed: set[int]) -> tuple[Run, ...]:
    """The runs of one side, in token order."""
    per_cell = tokens_per_cell(len(tokens.ids))
    runs = []
    for kind, item, marked, start, stop in stretches(tokens.spans, tokens.words, changed):
        name = kind if item is None else f"{kind} {item}"
        text = "".join(tokens.words[start:stop])
        cells = []
        for first in range(start, stop, per_cell):
            last = min(first + per_cell, stop) - 1
            what = "".join(tokens.words[first : last + 1])
            ids = number_range(tokens.ids[first], tokens.ids[last])
            cells.append(Cell(f"token {number_range(first, last)} · {what!r} · id {ids} · {name}"))
        if kind == "special":
            label, note = text, ""
        else:
            label, note = name, " ".join(text.replace("\n", " ↵ ").split())
            note = note if kind == "text" else ""
        runs.append(Run(kind, f"{label} · {number_range(start, stop - 1)}", note, tuple(cells),
                            marked))  # fmt: skip
    return tuple(runs)


def span_changes(
    was: Tokens | None, now: Tokens | None
) -> tuple[tuple[Modality, str, str, str], ...]:
    """Spans that are gone, new, moved or of another length, in the golden's order: modality, label,
    and tokens before and now (empty if absent)."""
    before, after = _parts(was), _parts(now)
    found = []
    for key in {**before, **after}:
        old, new = before.get(key, ""), after.get(key, "")
        if old != new:
            modality, item, part = key
            label = f"{modality} {item}" + (f", part {part}" if part else "")
            found.append((modality, label, old, new))
    return tuple(found)


def _parts(tokens: Tokens | None) -> dict[tuple[Modality, int, int], str]:
    seen: Counter[tuple[Modality, int]] = Counter()
    found = {}
    for span in () if tokens is None else tokens.spans:
        item = (span.modality, span.item)
        last = span.start + span.length - 1
        found[(*item, seen[item])] = f"{number_range(span.start, last)} ({span.length} tokens)"
        seen[item] += 1
    return found
