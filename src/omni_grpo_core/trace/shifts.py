"""Simple changes of a row of integers: an offset or a factor."""

from __future__ import annotations

from collections.abc import Sequence

_FACTORS = (2.0, 0.5, 3.0, 4.0, 1.5, 0.25, 0.75)
_MOST = 3
"""Ranges reported; a change with more of them is not simple."""


def shifts(before: Sequence[int], after: Sequence[int]) -> str:
    """How ``after`` follows from ``before``, (n,) both, in a few words, or ``""``.

    A factor is relative to the last number on which both agree, and allows for the rounding of each
    number; an offset is exact.

    >>> shifts([0, 1, 2, 5, 6], [0, 1, 2, 8, 9])
    '+3 from index 3'
    >>> shifts([7, 7, 7, 19, 32, 44, 9, 10], [7, 7, 7, 32, 57, 82, 9, 10])
    '×2 at indices 3–5'
    >>> shifts([0, 5, 1, 9], [0, 7, 0, 2])
    ''
    """
    parts: list[str] = []
    if not set(before) - {0, 1}:
        return ""  # a mask is not a count
    start = _next_difference(before, after, 0)
    while start is not None:
        offset = after[start] - before[start]
        end = start
        while end < len(before) and after[end] - before[end] == offset:
            end += 1
        what = f"{offset:+d}"
        if start and before[start - 1] == after[start - 1]:
            origin = before[start - 1]
            for factor in _FACTORS:
                stop = _stretched(before, after, start, origin, factor)
                if stop > end or (stop == end and not what.startswith("×")):
                    end, what = stop, f"×{factor:g}"
        if end - start < 2 and len(before) > 2:
            return ""
        last = end == len(before)
        parts.append(
            f"{what} from index {start}" if last else f"{what} at indices {start}–{end - 1}"
        )
        start = _next_difference(before, after, end)
        if start is not None and len(parts) == _MOST:
            return ""
    return ", then ".join(parts)


def _next_difference(before: Sequence[int], after: Sequence[int], start: int) -> int | None:
    return next((i for i in range(start, len(before)) if before[i] != after[i]), None)


def _stretched(
    before: Sequence[int], after: Sequence[int], start: int, origin: int, factor: float
) -> int:
    """One past the last differing number that the factor explains."""
    stop = start
    for at in range(start, len(before)):
        apart = (after[at] - origin) - factor * (before[at] - origin)
        # each side was truncated to an integer, the new one after scaling
        if before[at] == after[at] or not -1 < apart < max(factor, 1e-9):
            break
        stop = at + 1
    return stop
