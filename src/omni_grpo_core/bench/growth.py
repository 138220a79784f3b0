"""What an update's seconds grow with: the tokens of packed rows, or those of copies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np

Counted = Literal["packed", "copied"]
COUNTS: tuple[Counted, ...] = ("packed", "copied")
"""``packed``: P + G · C for each group of G completions of C tokens, after a prompt of P;
``copied``: G · (P + C)."""


class Line(TypedDict):
    """``fixed_seconds + seconds_per_token * tokens``. ``worst``: the largest residual, as a share
    of what was measured."""

    fixed_seconds: float
    seconds_per_token: float
    worst: float


def tokens(point: Mapping[str, Any], counted: Counted) -> int:
    """Of all groups in an update. ``point``: :meth:`~omni_grpo_core.bench.run.Measured.to_json`.

    >>> point = {"setting": {"group": 4, "tokens": 10}, "prompt_tokens": [100, 200]}
    >>> tokens(point, "packed"), tokens(point, "copied")
    (380, 1280)
    """
    copies = point["setting"]["group"] if counted == "copied" else 1
    completions: int = point["setting"]["group"] * point["setting"]["tokens"]
    return sum(copies * prompt + completions for prompt in point["prompt_tokens"])


def growth(points: Sequence[Mapping[str, Any]]) -> dict[str, dict[Counted, Line]]:
    """For each way, the line through its updates' seconds over either count. Least squares of
    relative residuals; nothing for a way with fewer than four points."""
    ways = dict.fromkeys(way for point in points for way in point["ways"])
    found: dict[str, dict[Counted, Line]] = {}
    for way in ways:
        updated = [p for p in points if "update" in p["ways"].get(way, {}).get("seconds", {})]
        if len(updated) >= 4:
            seconds = [point["ways"][way]["seconds"]["update"] for point in updated]
            found[way] = {
                counted: _line((tokens(point, counted) for point in updated), seconds)
                for counted in COUNTS
            }
    return found


def _line(counts: Iterable[int], measured: Sequence[float]) -> Line:
    x, y = np.array(list(counts), dtype=float), np.array(measured)
    slope, fixed = np.polyfit(x, y, 1, w=1 / y)
    return Line(
        fixed_seconds=float(fixed),
        seconds_per_token=float(slope),
        worst=float(np.abs((fixed + slope * x) / y - 1).max()),
    )
