"""Suites, tolerances, rebuilt values and the kinds of differences."""

from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from small_traces import small_batch, small_trace

from omni_grpo_core.errors import ConfigError, TraceError
from omni_grpo_core.golden.bisect import python_of
from omni_grpo_core.golden.calibrate import Calibration, StageDrift, record_tolerances, run_golden
from omni_grpo_core.golden.classify import first_nonfinite, kind_of
from omni_grpo_core.golden.rebuild import Lost, rebuild
from omni_grpo_core.golden.results import CaseResult, GoldenReport, StageResult
from omni_grpo_core.golden.sidecar import fetch
from omni_grpo_core.golden.suite import load_suite
from omni_grpo_core.golden.text import format_golden, parse_golden
from omni_grpo_core.golden.tolerances import load_tolerances
from omni_grpo_core.trace.codec import equal
from omni_grpo_core.trace.compare import compare_leaves
from omni_grpo_core.trace.leaves import leaves


def kinds(stage: str, was: object, now: object) -> list[str]:
    before, after = leaves(was), leaves(now)
    return [kind_of(stage, d, before, after) for d in compare_leaves(before, after)]


@pytest.mark.parametrize(
    ("stage", "was", "now", "kind"),
    [
        ("batch", {"ids": (1, 2)}, {"ids": (1, 3)}, "meaning"),
        ("batch", {"x": torch.ones(3)}, {"x": torch.ones(3) * 2}, "float"),
        ("batch", {"x": torch.ones(3)}, {"x": torch.ones(3) + 1e-6}, "fine"),
        ("batch", {"x": torch.ones(3)}, {"x": torch.ones(3).double()}, "schema"),
        ("batch", {"x": torch.ones(3)}, {"x": torch.ones(4)}, "schema"),
        ("batch", {"x": torch.ones(2)}, {"x": torch.tensor([1.0, math.nan])}, "not finite"),
        ("batch", {"video_second_per_grid": 1.0}, {"video_second_per_grid": 0.5}, "meaning"),
        ("batch", {"audio": 1, "text": 1}, {"text": 1}, "meaning"),
        ("batch", {"text": 1}, {"audio": 1, "text": 1}, "schema"),
        ("text", {"text": "a"}, {"text": "b"}, "meaning"),
        ("reward", {"value": 1.0}, {"value": 0.5}, "meaning"),
        ("loss.2", {"loss": 1.0}, {"loss": 1.01}, "float"),
        ("loss.2", {"loss": 1.0}, {"loss": 1.05}, "training"),
        ("loss.1", {"u": {"clip_low": 0.05}}, {"u": {"clip_low": 0.06}}, "float"),
        ("loss.1", {"u": {"clip_low": 0.05}}, {"u": {"clip_low": 0.5}}, "training"),
        ("gradient.1", {"norm": (2.0, 4.0)}, {"norm": (2.0, 8.0)}, "training"),
    ],
)
def test_the_kind_of_a_difference(stage: str, was: object, now: object, kind: str) -> None:
    assert kinds(stage, was, now) == [kind]


def test_a_nonfinite_value_is_found_in_a_fingerprint_too() -> None:
    text = format_golden("x", {"a": torch.ones(100), "b": torch.full((100,), math.inf)})
    assert first_nonfinite(parse_golden(text).leaves) == "b"
    assert first_nonfinite(leaves({"a": torch.ones(2)})) is None


@pytest.mark.parametrize("stage", ["text", "positions", "completion", "parsed", "reward"])
def test_a_value_is_rebuilt_from_its_golden(stage: str) -> None:
    value = {str(record.stage): record.value for record in small_trace().stages}[stage]
    assert equal(rebuild(parse_golden(format_golden(stage, value)).leaves), value)


def test_a_fingerprint_needs_a_stand_in() -> None:
    batch = small_batch()
    stored = parse_golden(format_golden("batch", batch)).leaves
    with pytest.raises(Lost, match="pixel_values_videos"):
        rebuild(stored)
    assert equal(rebuild(stored, leaves(batch)), batch)


@pytest.mark.parametrize(
    ("packed", "named"),
    [
        (b"nonsense", "a safetensors file"),
        (save({"a#0": torch.ones(1), "a#1": torch.ones(1).double()}), "several dtypes at a"),
    ],
)
def test_an_invalid_sidecar_is_refused(packed: bytes, named: str, tmp_path: Path) -> None:
    digest = hashlib.sha256(packed).hexdigest()
    (tmp_path / f"{digest}.safetensors").write_bytes(packed)
    with pytest.raises(TraceError, match=named):
        fetch(tmp_path, {"sidecar": digest})
    (tmp_path / f"{digest}.safetensors").write_bytes(b"")
    with pytest.raises(TraceError, match=digest):
        fetch(tmp_path, {"sidecar": digest})
    assert fetch(tmp_path, {"sidecar": "0" * 64}) == {}


def test_a_sidecar_is_only_looked_up_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(save({"a#0": torch.ones(1)}))
    (tmp_path / "aside").mkdir()
    with pytest.raises(TraceError, match=r"named '\.\./secret'"):
        fetch(tmp_path / "aside", {"sidecar": "../secret"})


def test_a_suite_is_read_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(
        "checkpoint: model\nsettings: {max_new_tokens: 5}\n"
        "cases: {clip: {rows: [0, 3]}, steps: {rows: [1], steps: 2}}\n"
    )
    suite = load_suite(tmp_path)
    assert suite.checkpoint_dir() == tmp_path / "model"
    assert (suite.cases["clip"].rows, suite.cases["steps"].steps) == ((0, 3), 2)
    assert suite.run_settings("clip").max_new_tokens == 5
    with pytest.raises(ConfigError, match="no case of that name"):
        suite.chosen(["clop"])


@pytest.mark.parametrize(
    "text", ["casess: {}", "cases: {a: {row: [0]}}", "cases: [a]", "checkpoint: 3"]
)
def test_an_invalid_suite_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"suite\.yaml"):
        load_suite(tmp_path)


def test_a_row_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text("cases: {a: {rows: [99]}, b: {}}")
    suite = load_suite(tmp_path)
    with pytest.raises(ConfigError, match="found row 99, wanted rows from 0 to"):
        suite.samples(["a"])
    with pytest.raises(ConfigError, match="found no rows"):
        suite.samples(["b"])


def calibration(within: bool, max_abs: float) -> Calibration:
    return Calibration("cpu-fp32", 3, (StageDrift("logits", max_abs, within),))


def atol(folder: Path, platform: str, stage: str) -> float:
    return load_tolerances(folder, platform).of(stage).of("float32").atol


def test_tolerances_are_recorded_once_and_never_widened(tmp_path: Path) -> None:
    assert atol(tmp_path, "cpu-fp32", "logits") == 1e-5
    record_tolerances(tmp_path, calibration(False, 1e-3))
    assert atol(tmp_path, "cpu-fp32", "logits") == pytest.approx(2e-3)
    # one stage's tolerance applies to no other stage and no other platform
    assert atol(tmp_path, "cpu-fp32", "loss.1") == 1e-5
    assert atol(tmp_path, "cuda-sm90-bf16", "logits") == 5e-2
    with pytest.raises(ConfigError, match="a recorded tolerance is never widened"):
        record_tolerances(tmp_path, calibration(False, 1e-2))
    record_tolerances(tmp_path, calibration(True, 1e-4))
    assert atol(tmp_path, "cpu-fp32", "logits") == pytest.approx(2e-3)


def test_tolerances_under_their_old_name_are_read_with_a_warning(tmp_path: Path) -> None:
    """Golden folders of 0.1 hold ``lanes.yaml``; a recalibration writes the new name."""
    record_tolerances(tmp_path, calibration(False, 1e-3))
    (tmp_path / "tolerances.yaml").rename(tmp_path / "lanes.yaml")
    with pytest.warns(FutureWarning, match="lanes.yaml is called tolerances.yaml"):
        assert atol(tmp_path, "cpu-fp32", "logits") == 2e-3
    with pytest.warns(FutureWarning):
        record_tolerances(tmp_path, calibration(True, 1e-4))
    assert atol(tmp_path, "cpu-fp32", "logits") == 2e-3


def test_a_tolerance_with_an_unknown_name(tmp_path: Path) -> None:
    (tmp_path / "tolerances.yaml").write_text("cpu-fp32: {gradients: {atol: 1.0, rtol: 0.0}}")
    with pytest.raises(ConfigError, match=r"found gradients, wanted a dtype .* or a stage"):
        load_tolerances(tmp_path, "cpu-fp32")


def test_an_environment_by_its_folder_interpreter_or_tox_name(tmp_path: Path) -> None:
    for folder in (tmp_path / "venv", tmp_path / ".tox" / "tf4576"):
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").touch()
    venv = str(tmp_path / "venv" / "bin" / "python")
    assert python_of(str(tmp_path / "venv"), tmp_path, tmp_path) == venv
    assert python_of(venv, tmp_path, tmp_path) == venv
    tox = str(tmp_path / ".tox" / "tf4576" / "bin" / "python")
    assert python_of("tf4576", tmp_path, tmp_path) == tox
    with pytest.raises(ConfigError, match="tox -e tf9999 --notest"):
        python_of("tf9999", tmp_path, tmp_path)


def case(first: str | None) -> CaseResult:
    stage = StageResult("loss.1", "harmful", "why", "added", (), "a/loss.1.txt")
    return CaseResult("a", "harmful", "why", first, (stage,))


def test_the_earliest_stage_of_all_cases_comes_first() -> None:
    report = GoldenReport(
        "golden", "cpu-fp32", (case("completion.2"), case("loss.1"), case(None)), 0.5
    )
    assert report.first == "loss.1"
    assert GoldenReport("g", "k", (case("loss.1"), case("logits")), 0.0).first == "logits"
    shown = report.to_json()
    assert (shown["verdict"], shown["first"]) == ("harmful", "loss.1")
    assert shown["cases"][0]["stages"][0]["origin"] == "added"


def test_another_processs_output_is_utf_8_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "utf-16")
    assert "Usage" in run_golden(sys.executable, ["calibrate", "--help"], {})
