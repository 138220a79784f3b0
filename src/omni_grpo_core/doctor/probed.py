"""What a reward function measures, learned from what it paid for completions of known worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omni_grpo_core.trace.calls import RewardCall

Kind = Literal["accuracy", "format", "other", "unknown"]
"""``accuracy``: the same completion earns less where the gold is another one. ``format``: it pays
for a form, and nothing for garbage. ``other``: neither, such as a length. ``unknown``: it was not
probed."""

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
    right, foreign = (dict(_by_place(call, role)) for role in ("right", "foreign"))
    gains = {at: right[at] - foreign[at] for at in right if at in foreign}
    best = max(gains, key=lambda at: gains[at], default=None)
    if best is not None and gains[best] > _LEAST:
        return Learned("accuracy", best[1], right[best], foreign[best])
    garbage = list(dict(_by_name(call, "garbage")).values())
    paid = set(values.values())
    # a gold itself may be paid for more than its form
    made = {at: value for at, value in right.items() if at[1] != "verbatim"}
    place = max(made, key=lambda at: made[at], default=None)
    formal = len(paid) == 2 and len(set(garbage)) == 1 and max(paid) in set(made.values())
    formal = formal and max(paid) not in garbage
    named = any(word in title(call) for word in ("format", "tags"))
    if place is not None and (formal or (named and right[place] > min(paid))):
        return Learned("format", place[1], right[place], min(garbage, default=min(paid)))
    return Learned("other", low=min(garbage, default=0.0), top=max(paid))


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


def _by_place(call: RewardCall, role: str) -> Iterator[tuple[tuple[str, str], float]]:
    """What a role earns, by problem type and form."""
    for _, case in cases(call, role):
        value = number(case)
        if value is not None:
            yield (str(case["problem_type"]), str(case["form"])), value


def _by_name(call: RewardCall, role: str) -> Iterator[tuple[str, float]]:
    return ((name, v) for name, case in cases(call, role) if (v := number(case)) is not None)
