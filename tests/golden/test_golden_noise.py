"""Noise is not reported as a change; two environments are crossed with two checkpoints."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from omni_grpo_core import tiny
from omni_grpo_core.golden.calibrate import VARIATIONS, run_golden

pytestmark = pytest.mark.slow
GOLDEN = Path(__file__).parent.parent.parent / "golden"
Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("variation", VARIATIONS, ids=lambda v: "-".join(v.values()))
def test_threads_and_vector_instructions_are_noise(variation: dict[str, str]) -> None:
    answer = run_golden(sys.executable, ["check", "--json", "--golden", str(GOLDEN)], variation)
    report = json.loads(answer)
    assert report["verdict"] in ("exact", "within"), [
        (case["case"], case["reason"]) for case in report["cases"]
    ]


def test_calibrate_reports_how_far_runs_differ(run_cli: Cli) -> None:
    code, out, _ = run_cli(
        "golden", "calibrate", "padded", "grpo", "-n", 2, "--golden", GOLDEN, "--json"
    )
    found = json.loads(out)
    assert (code, found["within"], found["runs"]) == (0, True, 2)
    assert {stage["stage"] for stage in found["stages"]} >= {"logits", "loss.2"}


def test_half_precision_is_noise_too(run_cli: Cli) -> None:
    """Sampled tokens flip where a draw lies at the edge of its slice; nothing else may."""
    options = ("--dtype", "bfloat16", "-n", 4, "--golden", GOLDEN, "--json")
    code, out, _ = run_cli("golden", "calibrate", "padded", "grpo", *options)
    found = json.loads(out)
    beyond = [stage for stage in found["stages"] if not stage["within"]]
    assert (code, beyond) == (0, [])
    # logprobs after a flipped token belong to different text, whole nats away
    assert max(stage["max_abs"] for stage in found["stages"]) < 1


def test_bisect_distinguishes_library_from_checkpoint(tmp_path: Path, run_cli: Cli) -> None:
    heavier = tmp_path / "heavier"
    shutil.copytree(tiny.checkpoint_dir(), heavier)
    file = heavier / "model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if n.endswith("layers.1.mlp.down_proj.weight"))
    save_file({**weights, name: weights[name] * 1.001}, file, metadata={"format": "pt"})
    code, out, _ = run_cli(
        *("golden", "bisect", sys.executable, sys.executable, "interleaved"),
        *("--golden", GOLDEN, "--new-checkpoint", heavier, "--json"),
    )
    found = json.loads(out)
    assert code == 1
    changes = {change["what"]: (change["verdict"], change["first"]) for change in found["changes"]}
    assert changes["library"] == ("exact", None)
    assert changes["checkpoint"] == changes["both"] == ("benign-drift", "logits")
    assert found["moved"]["logits"] == ["checkpoint"]
