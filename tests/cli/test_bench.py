"""``omni-grpo bench`` on the tiny model: every part of every way, and their agreement."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version("4.57"), reason="no attention functions"
)

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--prompt", 100, "--groups", 1, "--group", 2, "--tokens", 3)


def test_three_ways_side_by_side(run_cli: Run, tmp_path: Path) -> None:
    code, out, err = run_cli("bench", *SMALL, "--out", tmp_path / "bench.json", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found == json.loads((tmp_path / "bench.json").read_text())
    (point,) = found["points"]
    assert point["failed"] == {}
    assert list(point["ways"]) == ["usual", "plain", "fast"]
    for way, measured in point["ways"].items():
        parts = {"towers", "sampling", "scoring", "update", "step"}
        assert measured["seconds"].keys() >= parts, way
        assert measured["times_the_floor"] > 0
    agreement = point["agreement"]
    assert agreement["equal_completions"] == agreement["completions"] == 2
    # float32, as in tests/fast
    assert agreement["logprob_max"] < 1e-4
    assert agreement["gradient_relative_max"] < 1e-3


@pytest.mark.slow
def test_a_table_and_a_chosen_way(run_cli: Run) -> None:
    code, out, err = run_cli("bench", *SMALL, "--way", "fast", "--no-checkpointing")
    assert code == 0, err
    assert "| seconds | fast | floor |" in out
    assert "| **step** |" in out
