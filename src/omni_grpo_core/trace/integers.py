"""Differences of values that must agree exactly: ids, masks, positions, grids, spans."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from omni_grpo_core.trace.divergence import Difference
from omni_grpo_core.trace.leaves import Numbers, Spans
from omni_grpo_core.trace.place import element, holds_ids, name, row_of
from omni_grpo_core.trace.shifts import shifts
from omni_grpo_core.types import Span

Decode = Callable[[Sequence[int]], str]
"""Token ids to their text, special tokens included."""

_SHOWN = 8
"""Ids quoted in one sentence."""
_MOST_GROUPS = 32
"""Rows along the last axis that are reported one by one; a frame's pixels have thousands."""


def integer_differences(
    path: str, was: Numbers, now: Numbers, decode: Decode | None
) -> Iterator[Difference]:
    """At most one difference per batch row and axis; none if all agree. The dtypes must already
    agree."""
    before, after = as_integers(was.parts[0]), as_integers(now.parts[0])
    words = {**was.words, **now.words}
    if before.shape != after.shape:
        # a batch of one row of ids, as from a processor, is reported like the row itself
        alone = (
            holds_ids(path) and before.ndim == after.ndim == 2 and len(before) == len(after) == 1
        )
        if before.ndim == after.ndim == 1 or alone:
            yield _spliced(path, before.flatten().tolist(), after.flatten().tolist(), words, decode)
        else:
            yield Difference(
                path,
                "differs",
                f"{name(path)}: shape is {list(after.shape)}, was {list(before.shape)}",
                row_of(path),
            )
        return
    differing = (before != after).nonzero().tolist()
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for index in map(tuple, differing):
        # the last axis runs along the tokens; the axes before it say whose tokens they are
        groups.setdefault(index[:-1], []).append(index)
    if len(groups) > _MOST_GROUPS:
        groups = {(): [index for found in groups.values() for index in found]}
    for found in groups.values():
        first = found[0]
        where, row = element(path, first)
        # adjacent ids are quoted as one text
        quoted = _adjacent(found) if holds_ids(path) else found[:1]
        is_, was_ = (
            _quote([int(side[index]) for index in quoted], path, words, decode)
            for side in (after, before)
        )
        total = before.numel() if len(groups) == 1 else before.shape[-1]
        more = f", the first of {len(found)} differences in {total}" if len(found) > 1 else ""
        if more and len(groups) <= _MOST_GROUPS and () not in groups:
            more += _shifted(path, before[first[:-1]], after[first[:-1]])
        yield Difference(path, "differs", f"{where} is {is_}, was {was_}{more}", row, first)


def _adjacent(found: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The first indices of ``found`` that are adjacent on the last axis."""
    start = found[0]
    steps = ((*start[:-1], start[-1] + offset) for offset in range(len(found)))
    return [index for index, step in zip(found, steps, strict=True) if index == step]


def _shifted(path: str, before: torch.Tensor, after: torch.Tensor) -> str:
    how = "" if holds_ids(path) else shifts(before.tolist(), after.tolist())
    return f"; {how}" if how else ""


def _spliced(
    path: str,
    before: list[int],
    after: list[int],
    words: Mapping[int, str],
    decode: Decode | None,
) -> Difference:
    short = min(len(before), len(after))
    start = next((i for i in range(short) if before[i] != after[i]), short)
    tail = next((i for i in range(short - start) if before[-1 - i] != after[-1 - i]), short - start)
    removed, added = before[start : len(before) - tail], after[start : len(after) - tail]
    where, row = element(path, (start,))
    old, new = (_quote(ids, path, words, decode) for ids in (removed, added))
    if not removed:
        what = f"{len(added)} added: {new}"
    elif not added:
        what = f"{len(removed)} removed: {old}"
    else:
        what = f"{new} instead of {old}"
    sentence = f"{where}: {what} (length is {len(after)}, was {len(before)})"
    return Difference(path, "differs", sentence, row, (start,))


def _quote(ids: list[int], path: str, words: Mapping[int, str], decode: Decode | None) -> str:
    rest = f" … ({len(ids)} in all)" if len(ids) > _SHOWN else ""
    plain = " ".join(map(str, ids[:_SHOWN])) + rest
    if not holds_ids(path):
        return plain
    if decode is not None:
        text = decode(ids)
    elif all(i in words for i in ids):
        text = "".join(words[i] for i in ids)
    else:
        return plain
    return f"{plain} {json.dumps(text[:80], ensure_ascii=False)}"


def span_differences(path: str, was: Spans, now: Spans) -> Iterator[Difference]:
    """Spans are matched by modality, item and their number within that item.

    >>> before = Spans((Span("video", 0, 12, 8),))
    >>> after = Spans((Span("video", 0, 14, 8),))
    >>> [d.sentence for d in span_differences("rows[2].spans", before, after)]
    ['row 2: span video 0 starts at 14, was 12']
    """
    before, after = _by_part(was.spans), _by_part(now.spans)
    row = row_of(path)
    head = f"row {row}: " if row is not None else ""
    for key in before | after:
        old, new = before.get(key), after.get(key)
        label = f"{head}span {key[0]} {key[1]}" + (f", part {key[2]}" if key[2] else "")
        if old and new:
            changes = [
                f"{verb} {getattr(new, field)}, was {getattr(old, field)}"
                for field, verb in (("start", "starts at"), ("length", "has length"))
                if getattr(new, field) != getattr(old, field)
            ]
            what = " and ".join(changes)
        else:
            what = "is new" if new else "is missing"
        span = new or old
        if what and span:
            extent = "" if old and new else f" (start {span.start}, length {span.length})"
            yield Difference(path, "differs", f"{label}{extent} {what}", row, (span.start,))
    if list(before) != list(after) and before == after:
        yield Difference(path, "differs", f"{head}spans are reordered", row)


def _by_part(spans: tuple[Span, ...]) -> dict[tuple[str, int, int], Span]:
    seen: Counter[tuple[str, int]] = Counter()
    found: dict[tuple[str, int, int], Span] = {}
    for span in spans:
        item = (span.modality, span.item)
        found[(*item, seen[item])] = span
        seen[item] += 1
    return found


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Any integer or boolean tensor as int64, for counting and comparing; uint64 wraps around,
    which keeps distinct numbers distinct."""
    return tensor.to(torch.int64)
