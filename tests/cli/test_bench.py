"""``omni-grpo bench`` on the tiny model: every part of every way, and their agreement."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
    swept = [("--sweep", one) for one in ("group=1,2,4", "groups=1,2", "prompt=100,1024")]
    sweeps = [word for pair in swept for word in pair]
    code, out, err = run_cli("bench", *SMALL, *ways, *sweeps, "--rounding", "--out", file)
    assert code == 0, err
    heads = [cell.strip() for cell in out.splitlines()[2].split("|")]
    assert heads == ["", "seconds", "plain", "fast", "floor", ""]
    assert max(map(len, out.splitlines())) <= 80
    found = json.loads(file.read_text())
    assert [point["setting"]["group"] for point in found["sweeps"]["group"]] == [1, 2, 4]
    ways_by_groups = [[*point["ways"]] for point in found["sweeps"]["groups"]]
    assert ways_by_groups == [["plain", "fast"]] * 2
    assert all(not point["failed"] for points in found["sweeps"].values() for point in points)
    assert found["growth"].keys() == {"plain", "fast"}
    assert found["rounding"]["sides"].keys() == {"plain", "alone", "fast"}
    pytest.importorskip("matplotlib")
    pictured = ("--from", file, "--from", file, "--png", tmp_path / "bench.png")
    code, again, err = run_cli("bench", *pictured)
    assert code == 0, err
    assert again == out
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


WAY = {
    "seconds": {"sampling": 7.2, "update": 5.0, "step": 12.2}, "gib": {"update": 39.4},
    "tokens_per_second": 284.0, "step_tokens_per_second": 167.0, "times_the_floor": 12.2,
    "faster_than_usual": 2.0, "faster_than_usual_scored": None, "held_gib": 31.0,
}  # fmt: skip
POINT = {
    "setting": {"group": 8, "groups": 1, "prompt": 3457, "tokens": 256, "size": "7b"},
    "prompt_tokens": [3456], "failed": {}, "agreement": {"logprob_max": 1e-6},
    "floor_seconds": {"update": 0.4, "step": 1.0}, "ways": {"plain": WAY},
}  # fmt: skip
RESULT = {
    "format": "omni-grpo bench 1", "device": "cpu", "dtype": "float32", "points": [POINT],
    "sweeps": {"group": [POINT]}, "growth": {}, "rounding": {},
}  # fmt: skip


def test_an_earlier_result_by_hand(run_cli: Run, tmp_path: Path) -> None:
    """As people read it, in a terminal of 80 columns: a row for each way at each point."""
    failed = {"usual": "update: OutOfMemoryError: " + "out of memory " * 9}
    three = {**POINT, "ways": dict.fromkeys(("usual", "plain", "fast"), WAY), "failed": failed}
    (tmp_path / "bench.json").write_text(json.dumps({**RESULT, "points": [three]}))
    code, out, err = run_cli("bench", "--from", tmp_path / "bench.json")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    assert out.split("\n\n")[-1].splitlines() == [
        "| group |   way | sampling | update |   step | GiB, update |",
        "|-------|------:|---------:|-------:|-------:|------------:|",
        "| 8     | plain |    7.200 |  5.000 | 12.200 |        39.4 |",
        "| 8     | floor |        – |  0.400 |  1.000 |           – |",
    ]


BROKEN: dict[str, Any] = {
    "another format": {"format": "omni-grpo bench 0"},
    "no point": {"points": []},
    "two points": {"points": [POINT, POINT]},
    "a point that is none": {"points": ["point"]},
    "no ways": {"points": [{**POINT, "ways": None}]},
    "no setting": {"points": [{k: v for k, v in POINT.items() if k != "setting"}]},
    "a number that is none": {"points": [{**POINT, "ways": {"plain": {**WAY, "held_gib": "?"}}}]},
    "sweeps of something else": {"sweeps": {"pixels": [POINT]}},
    "a sweep that is none": {"sweeps": {"group": "all"}},
    "half a rounding": {"rounding": {"sides": {}}},
}


@pytest.mark.parametrize("changes", BROKEN.values(), ids=BROKEN)
def test_a_result_that_was_changed_is_refused(
    run_cli: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """It ended in a traceback."""
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({**RESULT, **changes}))
    code, _, err = run_cli("bench", "--from", file, "--out", tmp_path / "again.json")
    assert code == 2
    assert str(file) in err
    assert "pass what" in err
    assert not (tmp_path / "again.json").exists()


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(
    run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed without a word."""
    monkeypatch.setattr("omni_grpo_core.bench.shapes.device_memory", lambda device: 2**30)
    code, _, err = run_cli("bench", "--size", "7b")
    assert code == 2
    assert "GiB of weights and gradients, wanted no more than the 1 GiB free on the cpu" in err


def test_sweeps_of_another_machine_are_not_shown_in_one_table(run_cli: Run, tmp_path: Path) -> None:
    """They were, with a line through the updates of both."""
    files = [tmp_path / "one.json", tmp_path / "other.json"]
    for file, device in zip(files, ("cpu", "NVIDIA H200"), strict=True):
        file.write_text(json.dumps({**RESULT, "device": device}))
    code, _, err = run_cli("bench", "--from", files[0], "--from", files[1])
    assert code == 2
    assert "other.json: found size 7b on NVIDIA H200 in float32, wanted size 7b on cpu in" in err


def test_what_is_only_shown_is_not_measured(run_cli: Run, tmp_path: Path) -> None:
    """``--size 7b`` beside ``--from`` was ignored, and so was a sweep."""
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(RESULT))
    code, _, err = run_cli("bench", "--from", file, "--size", "tiny", "--sweep", "group=2")
    assert code == 2
    assert "--from: found --size, --sweep, wanted what was measured before" in err


def test_what_no_benchmark_wrote_is_refused(run_cli: Run, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"points": []}')
    code, _, err = run_cli("bench", "--from", tmp_path / "other.json")
    assert code == 2
    assert "found format None, wanted 'omni-grpo bench 1'" in err


def test_a_sweep_of_something_else_is_refused(run_cli: Run) -> None:
    for wrong in ("tokens", "group=2,x", "groups=65", "prompt=99"):
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
