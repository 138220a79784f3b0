"""The real TRL ``GRPOTrainer`` on tiny checkpoints: nothing that breaks where it is sound, and
mistakes planted in it found at their stage.

``tox -e trl`` runs these; elsewhere they are skipped unless TRL is new enough.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from trl_faults import (
    SCORE,
    around,
    doubled,
    flipped_while_scoring,
    in_train_mode,
    its_own_reference,
    late,
    of_rollout,
    padded_right,
    pixels_of_generate,
    rolled,
    sampled_hotter,
    without_adapter,
    without_pixels,
    zeroed_while_scoring,
)
from trl_runs import ROWS, SYSTEM, letters, text_of, text_rows, trained

from omni_grpo_core import tiny
from omni_grpo_core.core.policy import Policy

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 and its packages: tox -e trl")
pytest.importorskip("datasets", reason="TRL 1.16 and its packages: tox -e trl")

RunCli = Callable[..., tuple[int, str, str]]
Found = tuple[int, dict[str, Any]]
KINDS = ("a thing", "a person", "a place", "a reason")
QUESTIONS = [row | {"kind": kind} for row, kind in zip(text_rows(), KINDS, strict=True)]
ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}


def pictures(each: int = 1) -> list[dict[str, Any]]:
    """Two questions on shipped pictures, four times; ``each``: pictures of a row."""
    shown = [row for row in ROWS if row["data_type"] == "image"]
    opened = [Image.open(tiny.data_file().parent / row["path"]).convert("RGB") for row in shown]
    return [
        {
            "prompt": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": "\n".join([row["problem"], *row["options"]])},
            ],
            "images": (opened[at:] + opened[:at])[:each],
        }
        for at, row in enumerate(shown)
    ] * 4


def by_kind(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Reads a column of the data."""
    kinds = columns["kind"]
    return [len(text_of(c)) / 100 + len(k) for c, k in zip(completions, kinds, strict=True)]


def floored(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    return [1.0 if text_of(one).startswith("<context>\n") else 0.1 for one in completions]


def lora() -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def pictured() -> None:
    pytest.importorskip(
        "transformers", minversion="5.23", reason="TRL needs last_hidden_state of the thinker"
    )


def diagnosed(trace: Path, run_cli: RunCli) -> Found:
    code, out, err = run_cli("doctor", trace, "--json")
    assert code < 2, err
    return code, json.loads(out)


def broken(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [
        (found["stage"], [cause["cause"] for cause in found["causes"]])
        for found in report["findings"]
        if found["severity"] == "breaks"
    ]


# --------------------------------------------------------------------------- sound runs

SOUND: dict[str, dict[str, Any]] = {
    "text": {},
    "attach": {"by": "attach", "rows": QUESTIONS, "rewards": (letters, by_kind)},
    "accumulation": {**ACCUMULATED, "loss_type": "grpo"},
    "several updates": {"num_iterations": 2, "max_steps": 4},
    "sequence ratios": {
        "importance_sampling_level": "sequence", "num_iterations": 2, "max_steps": 4
    },
    "lora": {"peft": lora},
    "masked truncation": {"mask_truncated_completions": True, "max_completion_length": 60},
    "reference": {"beta": 0.04, "max_steps": 3},
    "no checkpointing": {"gradient_checkpointing": False},
    "weighted rewards": {
        "rows": QUESTIONS, "rewards": (letters, by_kind), "reward_weights": [1.0, 0.3]
    },
    "unscaled": {"scale_rewards": "none", "loss_type": "dr_grpo"},
    "picture": {"rows": pictures},
    "two pictures": {"rows": lambda: pictures(2)},
    "picture, lora": {"rows": pictures, "peft": lora},
    "picture, accumulation": {"rows": pictures, **ACCUMULATED},
    "picture, attach": {"rows": pictures, "by": "attach"},
}  # fmt: skip


def run(folder: Path, policy: Any, **given: Any) -> Path:
    if callable(rows := given.pop("rows", text_rows)):
        rows = rows()
    if any("images" in row for row in rows):
        pictured()
    peft = given.pop("peft", None)
    return trained(
        folder, policy.model, policy.processor, rows, peft=peft and peft(), **given
    )  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_nothing_breaks_a_sound_run(
    name: str, policy: Policy, tmp_path: Path, run_cli: RunCli
) -> None:
    code, report = diagnosed(run(tmp_path, policy, **SOUND[name]), run_cli)
    assert (code, broken(report), report["raised"]) == (0, [], None)
    judged = {stage for stage, held in report["coverage"].items() if held["state"] == "sound"}
    assert {"text", "batch", "positions", "logits", "completion", "gradient"} <= judged
    assert not [note for note in report["missing"] if "failed on this recording" in note]


@pytest.mark.parametrize("each", [0, 1, 2])
def test_a_family_without_a_reference(each: int, tmp_path: Path, run_cli: RunCli) -> None:
    """A tiny Qwen2.5-VL."""
    from tiny_vl import model_and_processor

    pictured()
    rows = pictures(each) if each else text_rows()
    code, report = diagnosed(trained(tmp_path, *model_and_processor(), rows), run_cli)
    assert (code, broken(report)) == (0, [])
    assert report["coverage"]["advantage"]["state"] == "sound"
    assert report["coverage"]["loss"]["state"] == "sound"


@pytest.mark.parametrize("rows", [text_rows, pictures])
def test_a_recording_changes_nothing(
    rows: Callable[[], list[dict[str, Any]]], policy: Policy, tmp_path: Path
) -> None:
    """Losses, completions and weights, bit for bit."""
    import trl
    import trl_runs

    kept: list[Any] = []

    class Kept(trl.GRPOTrainer):  # type: ignore[misc]
        def train(self, *given: Any, **more: Any) -> Any:
            made = super().train(*given, **more)
            weights = {name: w.detach().clone() for name, w in self.model.named_parameters()}
            losses = [log["loss"] for log in self.state.log_history if "loss" in log]
            kept.append((losses, list(self._logs["completion"]), weights))
            return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl, "GRPOTrainer", Kept)
        run(tmp_path / "with", policy, rows=rows, logging_steps=1)
        patch.setattr(trl_runs, "record", lambda *_, **__: nullcontext())
        run(tmp_path / "without", policy, rows=rows, logging_steps=1)
    (losses, texts, weights), (own_losses, own_texts, own_weights) = kept
    assert losses == own_losses
    assert len(losses) == 2
    assert texts == own_texts
    assert all(torch.equal(weight, own_weights[name]) for name, weight in weights.items())


# --------------------------------------------------------------------------- planted

PLANTED: dict[str, tuple[dict[str, Any], str, str]] = {
    "advantages rolled": (
        {"plant": of_rollout(lambda made: {"advantages": made["advantages"].roll(1)})},
        "advantage", "adv.rolled",
    ),
    "advantages negated": (
        {"plant": of_rollout(lambda made: {"advantages": -made["advantages"]})},
        "advantage", "adv.negated",
    ),
    "learning rate 0": ({"learning_rate": 0.0}, "gradient", "step.rate-zero"),
    "reward floor": ({"rewards": (floored,)}, "reward", "reward.floor"),
    "stale completions": (
        {"plant": around("_calculate_rewards", late)}, "reward", "reward.stale",
    ),
    "other rows' columns": (
        {
            "by": "attach", "rows": QUESTIONS, "rewards": (letters, by_kind),
            "plant": around("_calculate_rewards", rolled),
        },
        "reward", "reward.by-position",
    ),
    "wrong pad side": (
        {"plant": around("_generate_single_turn", padded_right)}, "batch", "batch.right-padding",
    ),
    "padding in the loss": (
        {
            "plant": of_rollout(
                lambda made: {"completion_mask": torch.ones_like(made["completion_mask"])}
            ),
            "max_completion_length": 120,
        },
        "loss", "loss.after-eos",
    ),
    "temperature": ({"plant": sampled_hotter}, "completion", "gen.temperature"),
    "reference is the policy": (
        {"by": "attach", "beta": 0.04, "plant": its_own_reference},
        "loss", "loss.reference-is-policy",
    ),
    "accumulation": (
        {**ACCUMULATED, "plant": around("_compute_loss", doubled)},
        "loss", "step.accumulation",
    ),
    "adapter off while sampling": (
        {
            "peft": lora, "learning_rate": 5e-2, "max_steps": 3,
            "plant": around("_generate_single_turn", without_adapter),
        },
        "completion", "gen.weights-stale",
    ),
    "picture dropped while scoring": (
        {"rows": pictures, "plant": around(SCORE, without_pixels)}, "media", "media.image-dropped",
    ),
    "picture blanked while scoring": (
        {"rows": pictures, "plant": zeroed_while_scoring}, "media", "media.zero",
    ),
    # of the whole batch: each row gets another row's
    "patches reversed while scoring": (
        {"rows": pictures, "plant": flipped_while_scoring}, "media", "media.exchanged-in-scoring",
    ),
    "picture blanked while sampling": (
        {"rows": pictures, "plant": pixels_of_generate(torch.zeros_like)}, "batch", "batch.zero",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found_at_its_stage(
    name: str, policy: Policy, tmp_path: Path, run_cli: RunCli
) -> None:
    given, stage, cause = PLANTED[name]
    code, report = diagnosed(run(tmp_path, policy, **given), run_cli)
    assert code == 1
    assert report["headline"]["stage"] == stage
    assert [found for found, _ in broken(report)] == [stage], "and nothing else is blamed"
    assert cause in dict(broken(report))[stage]


def test_generation_in_train_mode_under_checkpointing(
    policy: Policy, tmp_path: Path, run_cli: RunCli
) -> None:
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) >= Version("5.24"):
        pytest.skip("transformers 5.24 keeps the cache")
    trace = run(tmp_path, policy, plant=in_train_mode)
    code, report = diagnosed(trace, run_cli)
    assert code == 1
    assert report["headline"]["stage"] == "completion"
    assert "gen.checkpointing-train" in dict(broken(report))["completion"]


def test_its_completion_tables_are_a_dump(policy: Policy, tmp_path: Path, run_cli: RunCli) -> None:
    run(tmp_path, policy, log_completions=True, logging_steps=1)
    code, out, _ = run_cli("doctor", "--dump", "trl", tmp_path / "out", "--json")
    report = json.loads(out)
    assert (code, report["steps"], report["findings"]) == (0, 2, [])
    assert report["coverage"]["advantage"]["state"] == "sound"
