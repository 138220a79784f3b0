from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from omni_grpo_core.errors import ConfigError, DataError, RewardError
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.compose import Component, Composition, Gate
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.rewards.parse import render
from omni_grpo_core.types import Score

Function = Callable[..., Any]


def paying(name: str, *values: Any) -> Function:
    def function(prompts: list[str], completions: list[str], **columns: Any) -> Any:
        return list(values)

    function.__name__ = name
    return function


def totals(*components: Component, rows: int = 1) -> list[float | None]:
    return Composition(components)(["q"] * rows, ["t"] * rows)


def test_the_weighted_mean() -> None:
    assert totals(Component(paying("a", 1.0), 3.0), Component(paying("b", 0.0))) == [0.75]


def test_unscored_rewards_are_left_out_of_the_mean() -> None:
    a, b = Component(paying("a", 1.0, None), 3.0), Component(paying("b", 0.5, 0.5))
    assert totals(a, b, rows=2) == [3.5 / 4, 0.5]
    assert totals(Component(paying("a", None))) == [None]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_unscored_and_named(value: float) -> None:
    both = Composition([Component(paying("a", value)), Component(paying("b", 0.5))])
    report = both.report(["q"], ["t"])
    assert report.scores["a"] == (Score(None, f"the function returned {value}"),)
    assert report.total[0].value == 0.5


@pytest.mark.parametrize(
    ("context", "total"),
    [
        (0.4, (0.4 + 0.8) / 2),
        (0.39, 0.39 / 2),  # closed: reasoning counts as 0 and stays in the mean
        (None, None),  # the state of the gate is unknown
    ],
)
def test_reasoning_counts_only_with_enough_context(
    context: float | None, total: float | None
) -> None:
    assert totals(
        Component(paying("context", context)),
        Component(paying("reasoning", 0.8), gate=Gate.read("context >= 0.4")),
    ) == [total]


def test_lowering_the_gates_own_reward_never_pays() -> None:
    """If a closed gate left the mean, a poor context would hide poor reasoning."""

    def total(context: float) -> float:
        gated = Component(paying("reasoning", 0.1), gate=Gate("context", 0.4))
        [value] = totals(Component(paying("context", context)), gated)
        assert value is not None
        return value

    values = [total(i / 100) for i in range(101)]
    assert values == sorted(values)


def test_everything_is_reported() -> None:
    completions = [render("c", "t", "A"), "garbage"]
    report = Composition([Component(Format()), Component(Accuracy())]).report(
        ["q"] * 2, completions, problem_type=["judge"] * 2, solution=["<answer>yes</answer>"] * 2
    )
    assert [score.value for score in report.scores["format"]] == [1.0, 0.0]
    assert report.scores["accuracy"][0].reason == "'A' is neither yes nor no"
    assert report.total[0] == Score(0.5, "format 1, accuracy 0")


def test_an_exception_is_reported_and_never_a_zero() -> None:
    def broken(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [undefined_scorer(text) for text in completions]  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(RewardError, match=r"reward 'broken': found NameError") as caught:
        totals(Component(broken))
    assert isinstance(caught.value.__cause__, NameError)


def test_a_data_error_propagates_unchanged() -> None:
    with pytest.raises(DataError, match="row 0"):
        Composition([Component(Accuracy())])(
            ["q"], ["t"], problem_type=["judge"], solution=["no tags"]
        )


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ((1.0, 1.0), "found a list of 2, wanted a list of 1"),
        ((), "found a list of 0"),
        (("1.0",), "completion 0: found '1.0'"),
        ((1.5,), "completion 0: found 1.5"),
        ((-0.1,), "completion 0: found -0.1"),
        (([1],), r"completion 0: found \[1\]"),
    ],
)
def test_a_broken_contract_names_the_function(values: tuple[Any, ...], match: str) -> None:
    with pytest.raises(RewardError, match=match):
        totals(Component(paying("a", *values)))


def test_a_single_number_is_a_broken_contract() -> None:
    with pytest.raises(RewardError, match="found a float"):
        totals(Component(lambda **_: 1.0))


def test_async_functions_and_numpy_numbers_work() -> None:
    import numpy as np

    async def later(prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
        return [np.float32(0.5) for _ in completions]

    assert totals(Component(later)) == [0.5]


@pytest.mark.parametrize(
    ("components", "match"),
    [
        ([], "at least one reward"),
        ([Component(paying("a", 1)), Component(paying("a", 1))], "the name twice"),
        ([Component(paying("a", 1), 0.0)], "weight 0.0"),
        ([Component(paying("a", 1), float("nan"))], "weight nan"),
        ([Component(paying("a", 1), gate=Gate("b", 0.4))], "a gate on 'b'"),
        ([Component(paying("a", 1), gate=Gate("a", 0.4))], "a gate on 'a'"),
    ],
)
def test_compositions_that_cannot_work(components: list[Component], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Composition(components)


@pytest.mark.parametrize("text", ["context", "context > 0.4", ">= 0.4", "context >= -1", ""])
def test_gates_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match="NAME >= NUMBER"):
        Gate.read(text)


def test_a_partial_reward_is_scored_and_may_open_a_gate_but_is_not_in_the_total() -> None:
    context = Component(paying("context", 0.25, 0.75), partial=True)
    whole = Component(paying("accuracy", 1.0, 1.0), gate=Gate("context", 0.5))
    report = Composition([context, whole]).report(["q", "q"], ["a", "b"])
    assert [score.value for score in report.scores["context"]] == [0.25, 0.75]
    assert [score.value for score in report.total] == [0.0, 1.0]


@pytest.mark.parametrize(
    "parts",
    [
        [Component(paying("a", 1.0), partial=True)],
        [Component(paying("a", 1.0)), Component(paying("b", 1.0), 1.0, Gate("a", 0.5), True)],
    ],
)
def test_a_partial_reward_needs_a_whole_one_and_has_no_gate(parts: list[Component]) -> None:
    with pytest.raises(ConfigError):
        Composition(parts)
