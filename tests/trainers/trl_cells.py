"""Runs of TRL's trainer that are sound, and runs with a mistake planted, by name.

Nothing of TRL is imported here: the names are those of the stored results, wherever it is not
installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from plants import around, of_rollout, own_reference, sampled_hotter
from tiny_families import FAMILIES
from trl_faults import (
    SCORE,
    doubled,
    flipped_while_scoring,
    in_train_mode,
    late,
    padded_right,
    pictures_exchanged_while_sampling,
    pictures_exchanged_while_scoring,
    pixels_of_generate,
    rolled,
    without_adapter,
    without_pixels,
    zeroed_while_scoring,
)
from trl_runs import letters, pictures, text_of, text_rows, videos

KINDS = ("a thing", "a person", "a place", "a reason")
QUESTIONS = [row | {"kind": kind} for row, kind in zip(text_rows(), KINDS, strict=True)]
ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
Given = dict[str, Any]


def two_pictures() -> list[dict[str, Any]]:
    return pictures(2)


def by_kind(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Reads a column of the data."""
    kinds = columns["kind"]
    return [len(text_of(c)) / 100 + len(k) for c, k in zip(completions, kinds, strict=True)]


def floored(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    return [1.0 if text_of(one).startswith("<context>\n") else 0.1 for one in completions]


def lora() -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def modality_of(given: Mapping[str, Any]) -> str:
    """As the table of trainers calls the rows of a run, with the family if it has no reference."""
    kinds = ((pictures, "image"), (two_pictures, "several images"), (videos, "video"))
    shown = next((kind for rows, kind in kinds if rows is given.get("rows")), "text")
    return f"{shown}, {given['family']}" if "family" in given else shown


SOUND: Mapping[str, Given] = {
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
    **{
        name: {"loss_type": name, "num_iterations": 2, "max_steps": 4, "beta": 0.04}
        for name in ("sapo", "vespo")
    },
    "luspo": {
        "loss_type": "luspo", "importance_sampling_level": "sequence",
        "num_iterations": 2, "max_steps": 4,
    },
    "rewards normalised apart": {
        "rows": QUESTIONS, "rewards": (letters, by_kind), "reward_weights": [1.0, 0.3],
        "multi_objective_aggregation": "normalize_then_sum",
    },
    "off-policy mask": {
        "off_policy_mask_threshold": 0.01, "num_iterations": 4, "max_steps": 8,
        "learning_rate": 1e-3,
    },
    "unscaled": {"scale_rewards": "none", "loss_type": "dr_grpo"},
    "picture": {"rows": pictures},
    "two pictures": {"rows": two_pictures},
    "two pictures, several updates, lora": {
        "rows": two_pictures, "peft": lora, "num_iterations": 2, "max_steps": 4
    },
    "picture, lora": {"rows": pictures, "peft": lora},
    "picture, accumulation": {"rows": pictures, **ACCUMULATED},
    "picture, several updates": {"rows": pictures, "num_iterations": 2, "max_steps": 4},
    "picture, masked truncation": {
        "rows": pictures, "mask_truncated_completions": True, "max_completion_length": 60
    },
    "picture, attach": {"rows": pictures, "by": "attach"},
    **{
        f"{family}, {'picture' if rows is pictures else 'text'}": {"family": family, "rows": rows}
        for family in FAMILIES
        for rows in ((pictures,) if "VL" in family else (text_rows,))
    },
    "Qwen2.5-VL, text": {"family": "Qwen2.5-VL"},
    "Qwen2.5-VL, two pictures": {"family": "Qwen2.5-VL", "rows": two_pictures},
}  # fmt: skip

_ROLLED = of_rollout(lambda made: {"advantages": made["advantages"].roll(1)})
_NEGATED = of_rollout(lambda made: {"advantages": -made["advantages"]})
_LATE = around("_calculate_rewards", late)
_DROPPED = around(SCORE, without_pixels)

PLANTED: Mapping[str, tuple[Given, str, str]] = {
    "advantages rolled": ({"plant": _ROLLED}, "advantage", "adv.rolled"),
    "advantages negated": ({"plant": _NEGATED}, "advantage", "adv.negated"),
    "learning rate 0": ({"learning_rate": 0.0}, "gradient", "step.rate-zero"),
    "reward floor": ({"rewards": (floored,)}, "reward", "reward.floor"),
    "stale completions": ({"plant": _LATE}, "reward", "reward.stale"),
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
    "generate in train mode": ({"plant": in_train_mode}, "completion", "gen.checkpointing-train"),
    "reference is the policy": (
        {"by": "attach", "beta": 0.04, "plant": own_reference},
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
        {"rows": pictures, "plant": _DROPPED}, "media", "media.image-dropped",
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
    "a row's pictures exchanged while scoring": (
        {"rows": two_pictures, "plant": pictures_exchanged_while_scoring},
        "media", "media.exchanged-in-scoring",
    ),
    "a row's pictures exchanged while sampling": (
        {"rows": two_pictures, "plant": pictures_exchanged_while_sampling},
        "batch", "batch.rows-exchanged",
    ),
    "both pictures dropped while scoring, lora": (
        {"rows": two_pictures, "peft": lora, "plant": _DROPPED}, "media", "media.image-dropped",
    ),
    # nothing is planted: TRL 1.16 hands a clip to generate alone
    "its own: the clip is lost while scoring": ({"rows": videos}, "media", "media.video-dropped"),
    **{
        f"{family}, {name}": ({"family": family, "rows": pictures, "plant": plant}, stage, cause)
        for family in FAMILIES
        if "VL" in family
        for name, plant, stage, cause in (
            ("picture dropped while scoring", _DROPPED, "media", "media.image-dropped"),
            ("picture blanked while scoring", zeroed_while_scoring, "media", "media.zero"),
            ("advantages rolled", _ROLLED, "advantage", "adv.rolled"),
        )
    },
    **{
        f"{family}, {name}": ({"family": family, "plant": plant}, stage, cause)
        for family in ("Qwen2", "Llama")
        for name, plant, stage, cause in (
            ("stale completions", _LATE, "reward", "reward.stale"),
            ("temperature", sampled_hotter, "completion", "gen.temperature"),
            ("advantages negated", _NEGATED, "advantage", "adv.negated"),
        )
    },
}  # fmt: skip
"""By name: what is planted, the stage, and the cause that is to be among those shown."""

RANKS: Mapping[str, tuple[Given, str, str]] = {
    "two ranks": ({}, "", ""),
    "two ranks, pictures": ({"rows": pictures}, "", ""),
    "two ranks, advantages negated": ({"plant": _NEGATED}, "advantage", "adv.negated"),
}
"""As above, on two ranks; without a stage nothing is planted."""
