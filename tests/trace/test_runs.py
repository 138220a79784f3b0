"""Runs are short where integers are regular, and only text in their format is parsed."""

from __future__ import annotations

import pytest

from omni_grpo_core.trace.runs import parse_runs, runs


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], ""),
        ([5], "5"),
        ([1, 1], "1, 1"),
        ([1, 1, 1], "1×3"),
        ([1, 2, 3], "1, 2, 3"),
        ([3, 2, 1, 0, -1], "3..-1 step -1"),
        ([0, 1, 2, 3, 3, 3], "0..3 step 1, 3, 3"),
        ([0, 1, 2, 3, 4, 4, 4], "0..3 step 1, 4×3"),
        ([4, 4, 4, 5, 6, 7, 8], "4×3, 5..8 step 1"),
        ([0, 25, 50, 75, 7], "0..75 step 25, 7"),
        ([0, 2**63], "0, 9223372036854775808"),
    ],
)
def test_runs_by_hand(values: list[int], text: str) -> None:
    assert ", ".join(map(str, runs(values))) == text
    assert parse_runs(text, len(values)) == values


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("1, x, 2", "'x, 2' is not a number"),
        ("1..4", r"'\.\.4' is not a number"),
        ("0..5 step 2", "does not reach"),
        ("0..5 step 0", "does not reach"),
        ("5..0 step 1", "does not reach"),
        ("1×999999999999", "more than 10 numbers"),
        ("1, 2 three", "'three' is not"),
    ],
)
def test_invalid_runs_are_refused(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_runs(text, 10)
