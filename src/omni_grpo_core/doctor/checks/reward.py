"""Rewards: what each function returned, also for completions whose score is known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged
from omni_grpo_core.doctor.rollouts import rollouts
from omni_grpo_core.errors import OmniGrpoError
from omni_grpo_core.rewards import Reward
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.tolerances import EQUAL_RECORDED_REWARDS
from omni_grpo_core.trace.calls import RewardCall
from omni_grpo_core.types import Malformed

Kind = Literal["format", "accuracy", "other"]

_BARE_GOLD = "garbage against a gold without tags"
GARBAGE = (
    "empty",
    "repeated token",
    "the incident",
    "token salad",
    "tags without end",
    _BARE_GOLD,
)
"""Probe cases that must earn 0 from any reward, whatever it measures."""

_NEAR = 0.25
"""Of a case's score: graded rewards differ by less, a wrong one is off by the whole score."""


def calls_of(case: Case) -> Iterator[RewardCall]:
    """The last call of each function; probes are the same in all."""
    last: dict[str, RewardCall] = {}
    for call in case.rewards:
        last[call.name] = call
    yield from last.values()


def look_at_values(case: Case) -> Iterable[Evidence]:
    """Errors, missing values and non-finite values."""
    for call in case.rewards:
        if call.error is not None:
            yield Evidence(
                "reward", "raised", f"reward {call.name} raised {call.error}",
                values={"name": call.name, "error": call.error},
            )  # fmt: skip
            continue
        bad = [i for i, v in enumerate(call.values) if v is not None and not math.isfinite(v)]
        if bad:
            yield Evidence(
                "reward",
                "not-a-number",
                f"reward {call.name} returned {call.values[bad[0]]} for completion {bad[0]}"
                + (f" and {len(bad) - 1} others" if len(bad) > 1 else ""),
                row=bad[0],
                values={"name": call.name, "rows": bad},
            )
        if call.completions and len(call.values) != len(call.completions):
            yield Evidence(
                "reward",
                "count-differs",
                f"reward {call.name} returned {len(call.values)} values for "
                f"{len(call.completions)} completions",
                values={"name": call.name},
            )
        elif call.values and all(v is None for v in call.values):
            yield Evidence(
                "reward",
                "never-scored",
                f"reward {call.name} scored none of {len(call.values)} completions",
                "unknown",
                values={"name": call.name},
            )


# --------------------------------------------------------------------------- known answers


def kind_of(call: RewardCall) -> Kind:
    """What a function measures, by its name."""
    names = f"{call.name} {call.source.rpartition('.')[2]}".lower()
    if "format" in names:
        return "format"
    return "accuracy" if "acc" in names or "correct" in names else "other"


def look_at_probes(case: Case) -> Iterable[Evidence]:
    """What a function gives to completions whose score is known."""
    for call in calls_of(case):
        if not call.probe or _broken(call):
            continue
        kind = kind_of(call)
        top = _top(call.probe, kind)
        note_judged(case, "reward")
        for name, probed in call.probe.items():
            yield from _judged(call, kind, top, name, probed)
        yield from _together(call)


def _broken(call: RewardCall) -> bool:
    """Whether the recorded rows already show non-finite values."""
    return any(v is not None and not math.isfinite(v) for v in call.values)


def look_at_constants(case: Case) -> Iterable[Evidence]:
    """One value for everything: different completions, and gold and garbage where probed."""
    for call in calls_of(case):
        values = {v for v in call.values if v is not None}
        if (
            len(values) != 1
            or len(call.values) != len(call.completions)
            or kind_of(call) != "other"
        ):
            continue
        if len(set(call.completions)) < 2:
            continue
        (value,) = values
        probed = [result["alone"] for result in call.probe.values()]
        if any(v != value for v in probed):
            continue
        warnings = [w for step in case.steps for w in step.warnings if _about(w, call)]
        yield Evidence(
            "reward",
            "constant",
            f"reward {call.name} gave {value:g} to all {len(call.values)} completions, "
            f"{len(set(call.completions))} of them different"
            + (
                f", and to each of {len(probed)} probe cases, gold and garbage alike"
                if probed
                else ""
            )
            + (f"; a warning of the step: {_short(warnings[0], 120)}" if warnings else ""),
            # a function that was not probed may be right about these, unless it reported a failure
            "added" if probed or any(map(_failed, warnings)) else "unknown",
            values={
                "name": call.name,
                "source": call.source,
                "value": value,
                "probed": bool(probed),
                "warnings": warnings[:3],
            },
        )


def _failed(warning: str) -> bool:
    words = ("fail", "error", "refused", "timed out", "cannot", "could not", "unreachable")
    return any(word in warning.lower() for word in words)


def _about(warning: str, call: RewardCall) -> bool:
    """Whether a warning may be about a reward: it mentions it, or a judge."""
    words = ("judge", "reward", "score", call.name.lower())
    return any(word in warning.lower() for word in words)


def _top(probe: Mapping[str, Any], kind: Kind) -> float:
    """A function's full reward, which may be more or less than 1."""
    golds = [
        probed["alone"]
        for probed in probe.values()
        if kind != "other" and probed[kind] == 1.0 and _number(probed["alone"])
    ]
    paid = [float(v) for v in golds if v > 0]
    return max(paid, key=paid.count) if paid else 1.0


def _judged(
    call: RewardCall, kind: Kind, top: float, name: str, probed: Mapping[str, Any]
) -> Iterator[Evidence]:
    value = probed["alone"]
    wanted = 0.0 if kind == "other" and name in GARBAGE else probed.get(kind)
    shown = {"name": call.name, "kind": kind, "case": name, "value": value, "wanted": wanted}
    completion = _short(str(probed.get("completion", "")))
    if isinstance(value, str) and name == _BARE_GOLD:
        return  # rejecting such a row is right
    if isinstance(value, str):
        yield Evidence(
            "reward", "probe-raised",
            f"reward {call.name} raises on {completion} ({name}): {value}", values=shown,
        )  # fmt: skip
    elif wanted is None or value is None:
        return
    elif not math.isfinite(value) or abs(value / top - wanted) > _NEAR:
        yield Evidence(
            "reward",
            "probe-differs",
            f"reward {call.name} gives {value:g} to {completion} ({name}; "
            f"{probed.get('problem_type')}, gold {_short(str(probed.get('solution', '')), 40)}); "
            f"it should give {wanted * top:g}",
            values={**shown, "problem_type": probed.get("problem_type")},
        )
    elif kind == "other" and value > EQUAL_RECORDED_REWARDS:
        yield Evidence(
            "reward",
            "probe-differs",
            f"reward {call.name} gives {value:g} to {completion} ({name}), which is garbage",
            values={**shown, "problem_type": probed.get("problem_type")},
        )


def _together(call: RewardCall) -> Iterator[Evidence]:
    """One row's reward must not depend on the other rows."""
    differ = [
        name
        for name, probed in call.probe.items()
        if _number(probed["alone"]) and not _equal(probed["alone"], probed["value"])
    ]
    if differ:
        first = call.probe[differ[0]]
        yield Evidence(
            "reward",
            "rows-depend",
            f"reward {call.name} gives {_as_text(first['alone'])} to a completion alone and "
            f"{_as_text(first['value'])} to the same one among others ({differ[0]}; {len(differ)} "
            f"of {len(call.probe)} cases): a row's reward depends on the other rows",
            values={
                "name": call.name,
                "cases": differ,
                "problem_types": sorted({str(call.probe[n].get("problem_type")) for n in differ}),
            },
        )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _equal(a: Any, b: Any) -> bool:
    if not (_number(a) and _number(b)):
        return bool(a == b)
    return abs(a - b) <= EQUAL_RECORDED_REWARDS or (math.isnan(a) and math.isnan(b))


# --------------------------------------------------------------------------- the recorded rows


def look_at_recomputed(case: Case) -> Iterable[Evidence]:
    """The built-in format and accuracy rewards on the recorded completions, where a function has
    the same task and agrees on every probe case."""
    measures: dict[Kind, Reward] = {"format": Format(), "accuracy": Accuracy()}
    for call in case.rewards:
        kind = kind_of(call)
        if kind == "other" or call.error is not None or len(call.values) != len(call.completions):
            continue
        if not call.probe or any(True for _ in _wrong(call, kind)):
            continue
        columns = {
            name: list(values)
            for name, values in call.columns.items()
            if name in ("problem_type", "options", "solution") and _rows(values, call)
        }
        try:
            own = measures[kind](list(call.prompts), list(call.completions), **columns)
        except OmniGrpoError:
            continue
        top = _top(call.probe, kind)
        for row, (given, wanted) in enumerate(zip(call.values, own, strict=True)):
            if given is None or wanted is None or abs(given / top - wanted) <= 2 * _NEAR:
                continue
            yield Evidence(
                "reward",
                "value-differs",
                f"reward {call.name} gave {given:g} to completion {row}, "
                f"{_short(call.completions[row])}; by its own rule it should give {wanted * top:g}",
                row=row,
                values={"name": call.name, "given": given, "wanted": wanted},
            )
            break


def _wrong(call: RewardCall, kind: Kind) -> Iterator[Evidence]:
    top = _top(call.probe, kind)
    for name, probed in call.probe.items():
        yield from _judged(call, kind, top, name, probed)
    yield from _together(call)


def _rows(values: Any, call: RewardCall) -> bool:
    return isinstance(values, list | tuple) and len(values) == len(call.completions)


# --------------------------------------------------------------------------- parsed


def look_at_structure(case: Case) -> Iterable[Evidence]:
    """Completions without the required structure: a reward of 0 is then right. Parsing is not at
    fault, so the origin is always ``inherited``."""
    for rollout in rollouts(case):
        if not rollout.rewards or not _asks_for_structure(rollout.rewards):
            continue
        texts = rollout.rewards[0].completions
        note_judged(case, "parsed")
        read = [parse(text) for text in texts]
        broken = [found for found in read if isinstance(found, Malformed)]
        if len(texts) > 1 and len(broken) == len(texts):
            yield Evidence(
                "parsed",
                "all-malformed",
                f"none of {len(texts)} completions has the required structure; the first has "
                f"{broken[0].what} at character {broken[0].where}",
                "inherited",
                values={"what": broken[0].what, "where": broken[0].where},
            )


def _asks_for_structure(calls: Sequence[RewardCall]) -> bool:
    return any(kind_of(call) == "format" for call in calls)


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[: most - 1] + "…")


def _as_text(value: Any) -> str:
    return f"{value:g}" if _number(value) else str(value)


LOOKS: tuple[Look, ...] = (
    look_at_values,
    look_at_probes,
    look_at_constants,
    look_at_recomputed,
    look_at_structure,
)
