from __future__ import annotations

from collections.abc import Sequence

import pytest

from omni_grpo_core.rewards.health import Alarm, Step, alarms

GROUPS = ["a", "a", "b", "b"]
NOT_CAPPED = [False] * 4
ALIVE = Step(
    {"format": [1.0, 0.0, 1.0, 1.0], "accuracy": [1.0, 0.0, 0.0, 1.0]},
    [1.0, 0.0, 0.5, 1.0],
    GROUPS,
    NOT_CAPPED,
)


def step(
    totals: Sequence[float | None],
    capped: Sequence[bool] = NOT_CAPPED,
    **scores: Sequence[float | None],
) -> Step:
    return Step(scores, totals, GROUPS, capped)


def names(found: tuple[Alarm, ...]) -> set[tuple[str, str | None]]:
    return {(alarm.name, alarm.reward) for alarm in found}


def test_a_living_reward_raises_no_alarm() -> None:
    assert alarms([ALIVE] * 5) == ()
    assert alarms([]) == ()


def test_the_incident() -> None:
    stuck = step([0.1] * 4, format=[0.0] * 4, accuracy=[0.0] * 4, people_focus=[0.3] * 4)
    found = alarms([stuck] * 5)
    assert names(found) == {
        ("constant", "format"),
        ("constant", "accuracy"),
        ("constant", "people_focus"),
        ("constant", None),
        ("format-zero", "format"),
        ("pinned", "people_focus"),
        ("zero-variance", None),
    }
    [pinned] = [alarm for alarm in found if alarm.name == "pinned"]
    assert pinned.detail == (
        "the total is 0.1 for 5 steps: people_focus pays 0.3 to anything, the others pay nothing"
    )


def test_patience() -> None:
    dead = step([0.0] * 4, accuracy=[0.0] * 4)
    assert alarms([dead] * 4) == ()
    assert ("constant", "accuracy") in names(alarms([dead] * 5))
    assert alarms([dead] * 4 + [ALIVE]) == ()
    assert ("constant", "accuracy") in names(alarms([dead], patience=1))


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (step([1.0, 0.0, 1.0, 0.0], format=[0.0] * 4),
         {("constant", "format"), ("format-zero", "format")}),
        # a reward that every completion earns in full is no alarm
        (step([1.0, 0.0, 1.0, 0.0], format=[1.0] * 4), set()),
        (step([1.0, 0.0, 1.0, 0.0], context=[None] * 4), {("never-scored", "context")}),
        (step([1.0, 0.0, 1.0, 0.0], context=[None, None, 0.5, None]), set()),
        (step([1.0, 0.0, 1.0, 0.0], a=[float("nan"), 0.0, 1.0, 0.0]), {("not-a-number", "a")}),
        (step([0.3, 0.3, 0.7, 0.7], a=[0.3, 0.3, 0.7, 0.7]), {("zero-variance", None)}),
        (step([0.3, 0.3, 0.7, 0.6], a=[0.3, 0.3, 0.7, 0.6]), set()),
        # 0.1 + 0.2 is not 0.3 in binary
        (step([0.1 + 0.2, 0.3, 0.7, 0.7], a=[0.1, 0.3, 0.7, 0.7]), {("zero-variance", None)}),
        (step([None, 0.3, 0.7, None], a=[None, 0.3, 0.7, None]), set()),
        (step([1.0, 0.0, 1.0, 0.0], [True] * 4, a=[1.0, 0.0, 1.0, 0.0]), {("capped", None)}),
        (step([1.0, 0.0, 1.0, 0.0], [True, True, True, False], a=[1.0, 0.0, 1.0, 0.0]), set()),
    ],
)  # fmt: skip
def test_each_alarm_alone(one: Step, expected: set[tuple[str, str | None]]) -> None:
    assert names(alarms([one], patience=1)) == expected


def test_shares() -> None:
    half = step([0.3, 0.3, 0.7, 0.6], [True, True, False, False], a=[0.3, 0.3, 0.7, 0.6])
    assert names(alarms([half], patience=1, share=0.5)) == {
        ("zero-variance", None),
        ("capped", None),
    }


def test_groups_are_distinguished_by_step() -> None:
    """The same sample in two steps is two groups: each is flat, although together they are not."""
    low, high = (step([value] * 4, a=[value] * 4) for value in (0.2, 0.8))
    assert names(alarms([low, high], patience=2)) == {("zero-variance", None)}
