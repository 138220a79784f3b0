from __future__ import annotations

from collections.abc import Sequence

import pytest

from omni_grpo_core.errors import ConfigError, RewardError
from omni_grpo_core.losses.advantages import STD_EPSILON, GroupStats, Scale, group_advantages


def test_group_scale_by_hand() -> None:
    """(0, 2) and (1, 1, 4): means 1 and 2, unbiased std sqrt 2 and sqrt 3."""
    found = group_advantages([0, 1, 1, 2, 4], ["a", "b", "b", "a", "b"], "group")
    two, three = 2**0.5 + STD_EPSILON, 3**0.5 + STD_EPSILON
    assert found.values.tolist() == pytest.approx(
        [-1 / two, -1 / three, -1 / three, 1 / two, 2 / three],
        abs=1e-12,  # float64 rounding
    )


def test_batch_scale_keeps_the_group_mean() -> None:
    """Rewards 0 2 4 6 have std sqrt(20 / 3) whatever the groups."""
    found = group_advantages([0, 2, 4, 6], [7, 7, 8, 8], "batch")
    scale = (20 / 3) ** 0.5 + STD_EPSILON
    assert found.values.tolist() == pytest.approx(
        [-1 / scale, 1 / scale, -1 / scale, 1 / scale],
        abs=1e-12,  # float64 rounding
    )


def test_an_unscored_reward_does_not_count_in_the_mean_even_as_zero() -> None:
    found = group_advantages([4, None, 6], ["q"] * 3, "none")
    assert found.values.tolist() == [-1.0, 0.0, 1.0]
    assert found.usable.tolist() == [True, False, True]
    assert found.groups == (GroupStats("q", 2, 1, 5.0, 2**0.5, "live"),)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_zero_variance_is_reported_and_exactly_zero(scale: Scale) -> None:
    # 0.1 + 0.2 is not 0.3 in floating point, but the rewards are equal
    found = group_advantages([0.1 + 0.2, 0.3, 0.3, 1, 2], ["f"] * 3 + ["v"] * 2, scale)
    assert found.values[:3].tolist() == [0.0, 0.0, 0.0]
    assert found.usable.tolist() == [True] * 5
    assert found.informative.tolist() == [False] * 3 + [True] * 2
    assert [group.status for group in found.groups] == ["zero-variance", "live"]


@pytest.mark.parametrize("rewards", [[1.0], [None, 1.0], [None, None], [None]])
def test_nothing_to_compare_with(rewards: Sequence[float | None]) -> None:
    found = group_advantages(rewards, ["a"] * len(rewards), "group")
    assert found.values.tolist() == [0.0] * len(rewards)
    assert not found.usable.any()
    (group,) = found.groups
    assert (group.status, group.mean, group.std) == ("too-few", None, None)
    assert group.scored + group.unscored == len(rewards)


def test_no_rewards_no_groups() -> None:
    found = group_advantages([], [], "batch")
    assert found.groups == ()
    assert found.values.shape == found.usable.shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_rewards_are_refused(bad: float) -> None:
    with pytest.raises(RewardError, match="reward 1, group 'b'"):
        group_advantages([0.0, bad], ["a", "b"], "group")


def test_lengths_and_scale() -> None:
    with pytest.raises(RewardError, match="2 rewards for 1 group ids"):
        group_advantages([0.0, 1.0], ["a"], "group")
    with pytest.raises(ConfigError, match="advantage scale"):
        group_advantages([0.0, 1.0], ["a", "a"], "groups")  # type: ignore[arg-type]
