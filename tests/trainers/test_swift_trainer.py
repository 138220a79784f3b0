"""ms-swift's own GRPO trainer on tiny checkpoints of both families: nothing that breaks where it is
sound, and mistakes planted in it found at their stage.

``tox -e swift`` runs these; elsewhere they are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conformance import Lane
from plants import around
from swift_faults import (
    collated,
    four_frames_a_second,
    golds_rolled,
    in_train_mode,
    late,
    of_advantages,
    padded_right,
    padding_counted,
    resized_again,
    rolled_by_half,
    sampled_hotter,
    silent,
    while_scoring,
    without,
    without_adapter,
    zeros,
)
from swift_runs import Family, Kind, trained, whole_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("swift.rlhf_trainers", reason="ms-swift and its packages: tox -e swift")

RunCli = Callable[..., tuple[int, str, str]]
Checkpoints = Callable[[Family], Path]
Given = dict[str, Any]
OLD, NEW = get_args(Family)
LANE = Lane(
    "swift",
    "ms-swift GRPO",
    packages=("ms-swift", "trl", "transformers", "torch"),
    lines="class Recorded(SwiftRLHF):\n"
    "    def train(self, trainer):\n"
    '        omni_grpo_core.attach(trainer, "trace/")\n'
    "        return super().train(trainer)\n"
    "Recorded().main()",
)


def like_gold(completions: Sequence[str], solution: Sequence[str], **_: Any) -> list[float]:
    pairs = zip(completions, solution, strict=True)
    return [SequenceMatcher(None, one, gold).ratio() for one, gold in pairs]


def floored(completions: Sequence[str], **_: Any) -> list[float]:
    return [1.0 if one.startswith("<context>\n") else 0.1 for one in completions]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    made: dict[Family, Path] = {}

    def of(family: Family) -> Path:
        if family not in made:
            made[family] = whole_checkpoint(family, tmp_path_factory.mktemp("tiny") / family)
        return made[family]

    return of


def diagnosed(trace: Path, run_cli: RunCli) -> tuple[int, dict[str, Any]]:
    code, out, err = run_cli("doctor", trace, "--json")
    assert code < 2, err
    return code, json.loads(out)


def causes_at(report: dict[str, Any], severity: str) -> dict[str, list[str]]:
    return {
        found["stage"]: [cause["cause"] for cause in found["causes"]]
        for found in report["findings"]
        if found["severity"] == severity
    }


# --------------------------------------------------------------------------- sound runs

SOUND: dict[str, tuple[Family, Kind, Given]] = {
    **{f"{kind}": (OLD, kind, {}) for kind in get_args(Kind)},
    **{f"{kind}, qwen3": (NEW, kind, {}) for kind in get_args(Kind)},
    "record": (OLD, "audio in video", {"by": "record"}),
    "record, qwen3": (NEW, "video", {"by": "record"}),
    "a reference": (OLD, "text", {"beta": 0.04, "max_steps": 3}),
    "adapter": (OLD, "video", {"tuner_type": "lora"}),
    "accumulation": (
        OLD, "audio", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    ),
    "several updates": (OLD, "text", {"num_iterations": 2, "max_steps": 4}),
    "truncated left out": (OLD, "text", {"overlong_filter": True, "max_completion_length": 40}),
    "golds": (NEW, "audio in video", {"rewards": (like_gold,)}),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_nothing_breaks_a_sound_run(
    name: str, checkpoints: Checkpoints, tmp_path: Path, run_cli: RunCli
) -> None:
    family, kind, given = SOUND[name]
    code, report = diagnosed(trained(tmp_path, checkpoints(family), kind, **given), run_cli)
    LANE.sound(f"{family}, {kind}", name, report)
    assert (code, causes_at(report, "breaks"), report["raised"]) == (0, {}, None)
    states = {stage: held["state"] for stage, held in report["coverage"].items()}
    judged = {stage for stage, state in states.items() if state in ("sound", "differs")}
    seen = {"conversation", "text", "batch", "positions", "logits", "reward", "loss", "gradient"}
    assert seen <= judged
    assert kind == "text" or "media" in judged
    recipes = {"completion"} | ({"reward"} if "rewards" in given else set())
    assert causes_at(report, "differs").keys() <= recipes, "top_k of generate; a lenient reward"
    assert not [note for note in report["missing"] if "failed on this recording" in note]


@pytest.mark.parametrize(("family", "kind"), [(OLD, "audio in video"), (NEW, "video")])
def test_a_recording_changes_nothing(
    family: Family, kind: Kind, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Losses, completions and weights, bit for bit."""
    kept: list[Any] = []

    def keep(trainer: Any) -> None:
        weights = {name: w.detach().clone() for name, w in trainer.model.named_parameters()}
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        kept.append((losses, list(trainer._logs["completion"]), weights))

    for by in ("attach", None):
        (tmp_path / str(by)).mkdir()
        trained(tmp_path / str(by), checkpoints(family), kind, by=by, ended=keep)
    (losses, texts, weights), (own_losses, own_texts, own_weights) = kept
    assert losses == own_losses
    assert len(losses) == 2
    assert texts == own_texts
    assert all(torch.equal(weight, own_weights[name]) for name, weight in weights.items())


# --------------------------------------------------------------------------- planted

FRAMES = "pixel_values_videos"
SOUNDS = "input_features"
FOUR = {"num_generations": 4, "per_device_train_batch_size": 8}
"""With two completions of a prompt, every wrong order of advantages is a sign."""

PLANTED: dict[str, tuple[Family, Kind, Given, str, str]] = {
    "every sound is zeros": (OLD, "audio", {"plant": silent}, "media", "media.silent"),
    "every sound of a video is zeros": (
        OLD, "audio in video", {"plant": silent}, "media", "media.silent"
    ),
    "every sound is zeros, qwen3": (NEW, "audio", {"plant": silent}, "media", "media.silent"),
    "every sound of a video is zeros, qwen3": (
        NEW, "audio in video", {"plant": silent}, "media", "media.silent"
    ),
    "features of sounds zeroed": (
        OLD, "audio in video", {"plant": collated(zeros(SOUNDS))}, "batch", "batch.zero"
    ),
    "frames blanked while sampling": (
        NEW, "video", {"plant": collated(zeros(FRAMES), training=False)}, "batch", "batch.zero"
    ),
    "frames dropped while scoring": (
        OLD, "video", {"plant": while_scoring(without(FRAMES, "video_grid_thw"))},
        "media", "media.video-dropped",
    ),
    "sounds dropped while scoring": (
        OLD, "audio", {"plant": while_scoring(without(SOUNDS, "feature_attention_mask"))},
        "media", "media.audio-dropped",
    ),
    "frames of the other prompt while scoring": (
        NEW, "video", {"plant": while_scoring(rolled_by_half(FRAMES))},
        "media", "media.exchanged-in-scoring",
    ),
    "sounds of the other prompt while sampling": (
        OLD, "audio", {"plant": collated(rolled_by_half(SOUNDS), training=False)},
        "batch", "batch.rows-exchanged",
    ),
    "wrong pad side": (
        OLD, "text", {"plant": collated(padded_right, training=False)},
        "batch", "batch.right-padding",
    ),
    "train mode while sampling": (
        OLD, "text", {"plant": in_train_mode}, "completion", "gen.checkpointing-train"
    ),
    "temperature": (OLD, "text", {"plant": sampled_hotter}, "completion", "gen.temperature"),
    "adapter off while sampling": (
        OLD, "text",
        {
            "tuner_type": "lora", "lora_dropout": 0.0, "learning_rate": 5e-2, "max_steps": 3,
            "plant": around("_generate_completions", without_adapter),
        },
        "completion", "gen.weights-stale",
    ),
    "reward floor": (OLD, "text", {"rewards": (floored,)}, "reward", "reward.floor"),
    "the other prompt's gold": (
        NEW, "video",
        {
            "rewards": (like_gold,),
            "plant": around("_compute_rewards_per_func", golds_rolled),
        },
        "reward", "reward.by-position",
    ),
    "stale completions": (
        OLD, "text", {"plant": around("_compute_rewards_per_func", late)},
        "reward", "reward.stale",
    ),
    "advantages rolled": (
        OLD, "text", {"plant": of_advantages(lambda held: held.roll(1)), **FOUR},
        "advantage", "adv.rolled",
    ),
    "advantages negated": (
        OLD, "text", {"plant": of_advantages(torch.neg), **FOUR}, "advantage", "adv.negated"
    ),
    "padding in the loss": (
        OLD, "text", {"plant": around("compute_loss", padding_counted)},
        "loss", "loss.after-eos",
    ),
    "learning rate 0": (OLD, "text", {"learning_rate": 0.0}, "gradient", "step.rate-zero"),
    "4 frames a second": (
        NEW, "video", {"plant": four_frames_a_second}, "positions", "pos.cast-integer"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found_at_its_stage(
    name: str, checkpoints: Checkpoints, tmp_path: Path, run_cli: RunCli
) -> None:
    family, kind, given, stage, cause = PLANTED[name]
    code, report = diagnosed(trained(tmp_path, checkpoints(family), kind, **given), run_cli)
    LANE.fault(f"{family}, {kind}", name, report, stage=stage)
    broken = causes_at(report, "breaks")
    assert (code, report["headline"]["stage"]) == (1, stage)
    assert list(broken) == [stage], "and nothing else is blamed"
    assert cause in broken[stage]


def test_frames_that_are_resized_twice_are_another_recipe(
    checkpoints: Checkpoints, tmp_path: Path, run_cli: RunCli
) -> None:
    trace = trained(tmp_path, checkpoints(OLD), "video", plant=resized_again)
    code, report = diagnosed(trace, run_cli)
    assert (code, causes_at(report, "breaks")) == (0, {})
    assert "batch.resized-again" in causes_at(report, "differs")["batch"]


def test_its_completions_are_a_dump(
    checkpoints: Checkpoints, tmp_path: Path, run_cli: RunCli
) -> None:
    trained(tmp_path, checkpoints(OLD), "text", by=None, log_completions=True)
    [written] = (tmp_path / "out").rglob("completions.jsonl")
    code, out, err = run_cli("doctor", "--dump", "swift", written, "--json")
    assert (code, json.loads(out or "{}").get("findings")) == (0, []), err
