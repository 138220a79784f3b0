"""What an update grows with, on seconds that are a straight line over one of the counts."""

from __future__ import annotations

from typing import Any

import pytest

from omni_grpo_core.bench.growth import growth, tokens

SETTINGS = [(2, 100), (4, 100), (8, 100), (8, 400), (8, 100, 100)]
"""Completions of 10 tokens for each prompt; the tokens of each prompt."""


def point(group: int, prompts: list[int], way: str, seconds: float) -> dict[str, Any]:
    setting = {"group": group, "tokens": 10}
    return {
        "setting": setting,
        "prompt_tokens": prompts,
        "ways": {way: {"seconds": {"update": seconds}}},
    }


def test_a_line_is_found_over_what_it_grows_with() -> None:
    """Half a second and a millisecond for each token of packed rows, 120 to 360 of them."""
    counts = [120, 140, 180, 480, 360]
    points = [
        point(group, prompts, "fast", 0.5 + 0.001 * count)
        for (group, *prompts), count in zip(SETTINGS, counts, strict=True)
    ]
    assert [tokens(one, "packed") for one in points] == counts
    found = growth(points)["fast"]
    assert found["packed"]["fixed_seconds"] == pytest.approx(0.5)
    assert found["packed"]["seconds_per_token"] == pytest.approx(0.001)
    assert found["packed"]["worst"] < 1e-9
    # copies: 220, 440, 880, 3280, 1760 tokens, which are no line
    assert found["copied"]["worst"] > 0.01


def test_a_way_that_ran_out_of_memory_is_fitted_to_the_rest() -> None:
    points = [point(group, prompts, "plain", 1.0) for group, *prompts in SETTINGS]
    points[-1]["ways"]["plain"]["seconds"].clear()
    assert growth(points)["plain"]["copied"]["worst"] < 1e-9
    points[-2]["ways"]["plain"]["seconds"].clear()
    assert growth(points) == {}
