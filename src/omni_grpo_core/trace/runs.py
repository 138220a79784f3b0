"""Integers as readable runs: ``0..17 step 1, 18×8, 3``.

Position ids, masks and padded token ids are mostly counting or constant. Written as runs, a tensor
of thousands of numbers is one line in a code review, and every number can be read back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONSTANT_FROM = 3
"""Consecutive equal numbers from which they are written as ``7×3``."""
COUNTING_FROM = 4
"""Consecutive numbers with one step from which they are written as ``0..3 step 1``."""

_RUN = re.compile(r"(?P<first>-?\d+)(?:×(?P<times>\d+)|\.\.(?P<last>-?\d+) step (?P<step>-?\d+))?")


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` integers starting at ``first``, each ``step`` more than the one before it."""

    first: int
    step: int
    count: int

    def __str__(self) -> str:
        if self.count == 1:
            return str(self.first)
        if self.step == 0:
            return f"{self.first}×{self.count}"
        return f"{self.first}..{self.first + self.step * (self.count - 1)} step {self.step}"

    def values(self) -> list[int]:
        return [self.first + self.step * i for i in range(self.count)]


def runs(values: Sequence[int] | np.ndarray[Any, Any]) -> Iterator[Run]:
    """Split integers, (n,), into the longest runs, front to back; lazily, so that a caller can
    stop at too many.

    >>> [str(run) for run in runs([5, 0, 1, 2, 3, 9, 9, 9])]
    ['5', '0..3 step 1', '9×3']
    """
    # exact: the difference of two 64-bit integers may need more
    integers = np.asarray(values)
    if integers.dtype.kind == "f":  # numpy's choice for a list of numbers below and above 2**63
        integers = np.asarray(values, dtype=object)
    if integers.dtype.itemsize == 8:
        integers = integers.astype(object) if _is_wide(integers) else integers
    else:
        integers = integers.astype(np.int64)
    numbers, steps = integers.tolist(), np.diff(integers)
    stops = iter([*(np.flatnonzero(steps[1:] != steps[:-1]) + 2).tolist(), len(numbers)])
    start = stop = 0
    while start < len(numbers):
        while stop < min(start + 2, len(numbers)):
            stop = next(stops)
        run = _longest(numbers, start, stop)
        yield run
        start += run.count


def _is_wide(integers: np.ndarray[Any, Any]) -> bool:
    return integers.dtype == object or bool(
        len(integers) and (integers.max() >= 1 << 62 or integers.min() < -(1 << 62))
    )


def _longest(values: Sequence[int], start: int, stop: int) -> Run:
    """``stop``: where the step between the first two values first changes."""
    first, count = values[start], stop - start
    step = values[start + 1] - first if count > 1 else 0
    if count < (CONSTANT_FROM if step == 0 else COUNTING_FROM):
        return Run(first, 0, 1)
    # 1 2 3 4 4 4 4: the last number of the count belongs to the constant run that it starts
    if step and stop < len(values) and _constant_from(values, stop - 1) and count > COUNTING_FROM:
        count -= 1
    return Run(first, step, count)


def _constant_from(values: Sequence[int], start: int) -> bool:
    return len(set(values[start : start + CONSTANT_FROM])) == 1 and (
        start + CONSTANT_FROM <= len(values)
    )


def parse_runs(text: str, most: int) -> list[int]:
    """The inverse of :func:`runs`, as text; separators may be commas or spaces.

    Raises ``ValueError`` for text that is not runs, or for more than ``most`` integers.

    >>> parse_runs("0..6 step 2, 4×3", most=7)
    [0, 2, 4, 6, 4, 4, 4]
    """
    found: list[int] = []
    end = 0
    for match in _RUN.finditer(text):
        if text[end : match.start()].strip(" ,"):
            break
        end = match.end()
        run = _run_of(match)
        if len(found) + run.count > most:
            raise ValueError(f"more than {most} numbers")
        found += run.values()
    if text[end:].strip(" ,"):
        raise ValueError(f"{text[end:].strip(' ,')!r} is not a number or a run of them")
    return found


def _run_of(match: re.Match[str]) -> Run:
    first = int(match["first"])
    if match["times"] is not None:
        return Run(first, 0, int(match["times"]))
    if match["last"] is None:
        return Run(first, 0, 1)
    last, step = int(match["last"]), int(match["step"])
    if step == 0 or (last - first) % step or (last - first) // step < 1:
        raise ValueError(f"{match[0]!r}: the step does not reach the last number")
    return Run(first, step, (last - first) // step + 1)


def wrap(words: Iterable[str], width: int, separator: str) -> Iterator[str]:
    """Lines of at most ``width`` characters (a longer word has its own line).

    >>> list(wrap(["1", "22", "333"], width=5, separator=", "))
    ['1, 22', '333']
    """
    line = ""
    for word in words:
        longer = f"{line}{separator}{word}" if line else word
        if line and len(longer) > width:
            yield line
            longer = word
        line = longer
    if line:
        yield line
