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
    options = ("--micro-batch", 1, "--out", tmp_path / "bench.json", "--json")
    code, out, err = run_cli("bench", *SMALL, "--offload-gradients", *options)
    assert code == 0, err
    found = json.loads(out)
    assert found == json.loads((tmp_path / "bench.json").read_text())
    (point,) = found["points"]
    assert point["failed"] == {}
    assert list(point["ways"]) == ["usual", "plain", "fast"]
    for way, measured in point["ways"].items():
        seconds = measured["seconds"]
        assert seconds.keys() >= {"towers", "sampling", "scoring", "update"}, way
        assert seconds["step"] == seconds["sampling"] + seconds["update"]
        assert seconds["scored_step"] == pytest.approx(seconds["step"] + seconds["scoring"])
        assert measured["times_the_floor"] > 0
    assert found["offload_gradients"] is True
    # a ratio is never over the usual way's separate scoring pass unless it says so
    usual, fast = point["ways"]["usual"]["seconds"], point["ways"]["fast"]
    assert fast["faster_than_usual"] == usual["step"] / fast["seconds"]["step"]
    assert fast["faster_than_usual_scored"] == usual["scored_step"] / fast["seconds"]["step"]
    agreement = point["agreement"]
    assert agreement["equal_completions"] == agreement["completions"] == 2
    # float32, as in tests/fast
    assert agreement["logprob_max"] < 1e-4
    assert agreement["usual_logprob_max"] < 1e-4
    assert agreement["gradient_relative_max"] < 1e-3, "the fast ones from the host"


@pytest.mark.slow
def test_sweeps_rounding_and_a_picture_of_it(run_cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    ways = ("--way", "plain", "--way", "fast", "--no-checkpointing", "--dtype", "bfloat16")
    swept = [("--sweep", one) for one in ("group=1,2,4", "groups=1,2", "prompt=100")]
    sweeps = [word for pair in swept for word in pair]
    code, out, err = run_cli("bench", *SMALL, *ways, *sweeps, "--rounding", "--out", file)
    assert code == 0, err
    assert "| seconds | plain | fast | floor |" in out
    assert "| **step** (sampling, update) |" in out
    found = json.loads(file.read_text())
    assert [point["setting"]["group"] for point in found["sweeps"]["group"]] == [1, 2, 4]
    # twice the main setting: only what the fast way computes grows less
    ways_by_groups = [[*point["ways"]] for point in found["sweeps"]["groups"]]
    assert ways_by_groups == [["plain", "fast"], ["fast"]]
    assert all(not point["failed"] for points in found["sweeps"].values() for point in points)
    assert found["growth"].keys() == {"plain", "fast"}
    assert found["rounding"]["sides"].keys() == {"plain", "alone", "fast"}
    pytest.importorskip("matplotlib")
    pictured = ("--from", file, "--from", file, "--png", tmp_path / "bench.png")
    code, again, err = run_cli("bench", *pictured)
    assert code == 0, err
    assert again == out
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_what_no_benchmark_wrote_is_refused(run_cli: Run, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"points": []}')
    code, _, err = run_cli("bench", "--from", tmp_path / "other.json")
    assert code == 2
    assert "found format None, wanted 'omni-grpo bench 1'" in err


def test_a_sweep_of_something_else_is_refused(run_cli: Run) -> None:
    for wrong in ("tokens", "group=2,x", "groups=65"):
        code, _, err = run_cli("bench", *SMALL, "--sweep", wrong)
        assert code == 2
        assert f"found '{wrong}'" in err


def test_gradients_are_offloaded_in_the_fast_way_alone(run_cli: Run) -> None:
    code, _, err = run_cli("bench", *SMALL, "--way", "plain", "--offload-gradients")
    assert code == 2
    assert "found --way plain" in err


def test_rounding_is_none_in_float32(run_cli: Run) -> None:
    code, _, err = run_cli("bench", *SMALL, "--rounding")
    assert code == 2
    assert "add --dtype bfloat16" in err
