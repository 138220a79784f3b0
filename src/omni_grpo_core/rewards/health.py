"""Is the reward alive? Plain values of a training's last steps in, alarms out.

An alarm is raised only for what held in *every* one of the last ``patience`` steps; before that
many steps there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from omni_grpo_core.tolerances import EQUAL_REWARDS, equal_rewards

AlarmName = Literal[
    "constant", "pinned", "never-scored", "not-a-number", "format-zero", "zero-variance", "capped"
]

TOP = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """Rewards of one step. All sequences have one value per completion, in the same order.

    ``scores``: by reward name. ``totals``: what the policy is trained on. ``group_ids``: the
    sample of each completion. ``capped``: whether it reached the length cap.
    """

    scores: Mapping[str, Sequence[float | None]]
    totals: Sequence[float | None]
    group_ids: Sequence[str]
    capped: Sequence[bool]


@dataclass(frozen=True, slots=True)
class Alarm:
    """``reward``: the reward function concerned; ``None`` for the total or all of them."""

    name: AlarmName
    reward: str | None
    detail: str


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of scored values; ``None`` if there are none.

    >>> mean([1.0, None, 0.0]), mean([None])
    (0.5, None)
    """
    scored = [value for value in values if value is not None]
    return sum(scored) / len(scored) if scored else None


def alarms(steps: Sequence[Step], *, patience: int = 5, share: float = 0.9) -> tuple[Alarm, ...]:
    """What is wrong with the rewards of the last ``patience`` steps.

    * ``not-a-number``: a reward gave NaN or infinity (any step is enough).
    * ``never-scored``: a reward scored nothing.
    * ``constant``: all values of a reward, or of the total, are one value below the top. A reward
      that every completion earns in full is no alarm by itself.
    * ``pinned``: the total is constant and comes from a single reward, which pays a default for
      anything while the others pay nothing: the incident's 0.10.
    * ``format-zero``: the reward named ``format`` paid nothing.
    * ``zero-variance``: in at least ``share`` of the groups all totals are equal: no advantage.
    * ``capped``: at least ``share`` of the completions reached the length cap.

    >>> step = Step({"format": [0, 0]}, [0, 0], ["a", "a"], [False, False])
    >>> [alarm.name for alarm in alarms([step], patience=1)]
    ['constant', 'format-zero', 'constant', 'zero-variance']
    """
    window = steps[-patience:]
    if not window:
        return ()
    found = [_not_a_number(window)]
    if len(window) == patience:
        names = sorted({name for step in window for name in step.scores})
        values = {
            name: _scored(v for s in window for v in s.scores.get(name, ())) for name in names
        }
        totals = _scored(value for step in window for value in step.totals)
        for name in names:
            found += [_never(name, values[name]), _constant(name, values[name], patience)]
        if "format" in names:
            found.append(_format_zero(values["format"], patience))
        found += [_constant(None, totals, patience), _pinned(values, totals, patience)]
        found += [_zero_variance(window, share), _capped(window, share)]
    return tuple(alarm for alarm in found if alarm)


def _scored(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _not_a_number(window: Sequence[Step]) -> Alarm | None:
    for step in window:
        for name, values in step.scores.items():
            bad = [v for v in values if v is not None and not math.isfinite(v)]
            if bad:
                return Alarm("not-a-number", name, f"{len(bad)} of {len(values)} are {bad[0]}")
    return None


def _never(name: str, values: Sequence[float]) -> Alarm | None:
    return None if values else Alarm("never-scored", name, "not one completion was scored")


def _constant(name: str | None, values: Sequence[float], patience: int) -> Alarm | None:
    if not equal_rewards(values) or values[0] >= TOP - EQUAL_REWARDS:
        return None
    detail = f"{values[0]:g} for all {len(values)} completions of {patience} steps"
    return Alarm("constant", name, detail)


def _pinned(
    values: Mapping[str, Sequence[float]], totals: Sequence[float], patience: int
) -> Alarm | None:
    paying = [name for name, v in values.items() if any(value > EQUAL_REWARDS for value in v)]
    if not equal_rewards(totals) or totals[0] <= EQUAL_REWARDS or totals[0] >= TOP - EQUAL_REWARDS:
        return None
    if len(paying) != 1 or not equal_rewards(values[paying[0]]):
        return None
    return Alarm(
        "pinned",
        paying[0],
        f"the total is {totals[0]:g} for {patience} steps: {paying[0]} pays "
        f"{values[paying[0]][0]:g} to anything, the others pay nothing",
    )


def _format_zero(values: Sequence[float], patience: int) -> Alarm | None:
    if not values or max(values) > EQUAL_REWARDS:
        return None
    return Alarm("format-zero", "format", f"no well-formed completion in {patience} steps")


def _zero_variance(window: Sequence[Step], share: float) -> Alarm | None:
    groups: dict[tuple[int, str], list[float | None]] = {}
    for at, step in enumerate(window):
        for group, total in zip(step.group_ids, step.totals, strict=True):
            groups.setdefault((at, group), []).append(total)
    sized = [scores for scores in map(_scored, groups.values()) if len(scores) > 1]
    flat = sum(map(equal_rewards, sized))
    if not sized or flat < share * len(sized):
        return None
    return Alarm("zero-variance", None, f"{flat} of {len(sized)} groups have equal rewards")


def _capped(window: Sequence[Step], share: float) -> Alarm | None:
    capped = [flag for step in window for flag in step.capped]
    if not capped or sum(capped) < share * len(capped):
        return None
    return Alarm("capped", None, f"{sum(capped)} of {len(capped)} completions ran into the cap")
