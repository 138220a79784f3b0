"""What a reward function measures, learned from what it paid for completions of known worth."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omni_grpo_core.trace.calls import RewardCall

Kind = Literal["accuracy", "inverted", "format", "other", "unknown"]
"""``accuracy``: a completion earns less where the gold is another one, and so does another answer.
``inverted``: it earns more, and so does another answer.
``format``: it pays for a form, with any content, and less for the same words without it. ``other``:
neither, such as a length. ``unknown``: it was not probed."""

Place = tuple[str, str]
"""A problem type and a form."""
_MARKUP = re.compile(r"</\w+>|\\boxed\{")
_LEAST = 1e-6
"""Difference between two scores that is none."""


@dataclass(frozen=True, slots=True)
class Learned:
    """``form``: that it pays best. ``top``: what a right answer earns in it; ``low``: a wrong one,
    or garbage. ``raised``: the error of a function that raised for every case."""

    kind: Kind
    form: str = ""
    top: float = 0.0
    low: float = 0.0
    raised: str = ""

    def share(self, value: float) -> float:
        """Of the way from ``low`` to ``top``."""
        return (value - self.low) / (self.top - self.low) if self.top > self.low else 0.0


def learned(call: RewardCall) -> Learned:
    """What the function of a recorded call measures."""
    if not call.probe:
        return Learned("unknown")
    values = {name: v for name, case in call.probe.items() if (v := number(case)) is not None}
    if not values:
        errors = [case["alone"] for case in call.probe.values() if isinstance(case["alone"], str)]
        return Learned("unknown", raised=errors[0] if errors else "")
    right, wrong, foreign = (dict(by_place(call, role)) for role in ("right", "wrong", "foreign"))
    gains = {
        at: right[at] - max(foreign[at], wrong.get(at, foreign[at]))
        for at in right
        if at in foreign
    }
    best = max(gains, key=lambda at: gains[at], default=None)
    if best is not None and gains[best] > _LEAST:
        return Learned("accuracy", best[1], right[best], foreign[best])
    garbage = [v for _, case in cases(call, "garbage") if (v := number(case)) is not None]
    for at in gains:
        # one that is paid by length pays a longer answer more, and an empty text least
        bad = min(foreign[at], wrong.get(at, right[at]))
        if bad > right[at] + _LEAST and min(garbage, default=bad) >= right[at] - _LEAST:
            return Learned("inverted", at[1], wrong[at], right[at])
    most = max(values.values())
    for place, paid in right.items():
        if paid == most and _is_form(call, place, paid, garbage):
            return Learned("format", place[1], paid, min(garbage))
    return Learned("other", low=min(garbage, default=0.0), top=most)


def _is_form(call: RewardCall, place: Place, paid: float, garbage: Sequence[float]) -> bool:
    """Whether it is a form that is paid: whatever is thought in it, and not its words without the
    markup, nor garbage."""
    thoughts, words = (
        [value for at, value in by_place(call, role) if at == place]
        for role in ("content", "bare words")
    )
    same = bool(thoughts) and all(abs(value - paid) <= _LEAST for value in thoughts)
    return same and bool(words and garbage) and max(*words, *garbage) < paid - _LEAST


def needed_markup(call: RewardCall) -> set[str]:
    """Closing tags, and boxes, without which no right answer earns the most."""
    paid = [
        (value, case) for _, case in cases(call, "right") if (value := number(case)) is not None
    ]
    most = max((value for value, _ in paid), default=0.0)
    if learned(call).kind not in ("accuracy", "format"):
        return set()
    found = [
        set(_MARKUP.findall(case["completion"])) for value, case in paid if value > most - _LEAST
    ]
    return set.intersection(*found) if found else set()


def title(call: RewardCall) -> str:
    """The function's own names, in lower case."""
    return f"{call.name} {call.source.rpartition('.')[2]}".lower()


def cases(call: RewardCall, *roles: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Probe cases of these roles, by name."""
    return ((name, case) for name, case in call.probe.items() if case["role"] in roles)


def number(case: Mapping[str, Any]) -> float | None:
    """What a case earned in a call of its own, if that was a number."""
    value = case["alone"]
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable else None


def by_place(call: RewardCall, role: str) -> Iterator[tuple[Place, float]]:
    """What a role's cases earned, by problem type and form."""
    for _, case in cases(call, role):
        value = number(case)
        if value is not None:
            yield place_of(case), value


def place_of(case: Mapping[str, Any]) -> Place:
    return str(case["problem_type"]), str(case["form"])
