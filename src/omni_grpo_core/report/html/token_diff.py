"""Two token sequences as ribbons side by side, with what only one of them has marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import groupby

from omni_grpo_core.golden.results import Tokens
from omni_grpo_core.report.html import number_range, tokens_a_cell
from omni_grpo_core.report.html.ribbon import Cell, Run, stretches
from omni_grpo_core.types import Modality

_MOST_STEPS = 4_000_000
"""Pairs of runs that are compared; what is longer and differs is marked as a whole."""


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


def diff_ribbon(tokens: Tokens, changed: set[int]) -> tuple[Run, ...]:
    """The runs of one side, in token order."""
    per_cell = tokens_a_cell(len(tokens.ids))
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
    """Spans that are gone, new, elsewhere or of another length, in the order of the golden: of
    which modality, which one, and its tokens before and now, empty where it is not."""
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
