"""Calls reward functions written by others, and checks everything they return."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from omni_grpo_core.errors import OmniGrpoError, RewardError
from omni_grpo_core.types import Score

RewardFunction = Callable[..., Any]
"""TRL's signature: ``prompts``, ``completions``, the columns as keyword lists; may be async."""

T = TypeVar("T")


def name_of(function: RewardFunction) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def values_of(
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Any],
) -> list[float | None]:
    """The function's value for each completion; may be NaN, or outside [0, 1].

    Raises :class:`~omni_grpo_core.errors.RewardError` if it does not return a number or ``None``
    per completion; its own exceptions propagate.
    """
    result = function(prompts=prompts, completions=completions, **columns)
    if inspect.iscoroutine(result):
        result = run_async(result)
    # a tensor or an array
    result = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(result, Sequence) or len(result) != len(completions):
        size = f" of {len(result)}" if isinstance(result, Sequence) else ""
        raise RewardError(
            f"reward {name_of(function)!r}",
            got=f"a {type(result).__name__}{size}",
            want=f"a list of {len(completions)}, one value for each completion",
            fix="return one number or None for each completion",
        )
    return [_number(function, i, value) for i, value in enumerate(result)]


def scores_of(
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Any],
) -> list[Score]:
    """One :class:`~omni_grpo_core.types.Score` per completion; NaN and infinity are unscored.

    Raises :class:`~omni_grpo_core.errors.RewardError` naming the function if it raises, returns
    anything other than numbers or ``None``, or a number outside [0, 1]. An exception never
    becomes 0: nobody would notice during a whole training.
    """
    explain = getattr(function, "explain", None)
    try:
        if explain is not None:
            scores: list[Score] = explain(prompts, completions, **columns)
            return scores
        values = values_of(function, prompts, completions, columns)
    except OmniGrpoError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"reward {name_of(function)!r}",
            got=f"{type(error).__name__}: {error}",
            want="a score or None for any completion",
            fix="run `omni-grpo rewards test` to see it fail",
        ) from error
    return [_score(function, i, value) for i, value in enumerate(values)]


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, with or without a running event loop in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    # a notebook or trainer runs a loop in this thread: use another thread
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _number(function: RewardFunction, i: int, value: object) -> float | None:
    if value is None:
        return None
    # one-element tensors and numpy numbers convert to float; texts must not
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise _bad_value(function, i, repr(value)[:40])
    return float(value)


def _score(function: RewardFunction, i: int, value: float | None) -> Score:
    if value is None:
        return Score(None, "the function left it unscored")
    if not math.isfinite(value):
        return Score(None, f"the function returned {value}")
    if not 0 <= value <= 1:
        raise _bad_value(function, i, f"{value:g}")
    return Score(value, f"{value:g} from {name_of(function)}")


def _bad_value(function: RewardFunction, i: int, got: str) -> RewardError:
    return RewardError(
        f"reward {name_of(function)!r}, completion {i}",
        got=got,
        want="a number in [0, 1] or None",
        fix="scale the reward; put weights in the composition",
    )
