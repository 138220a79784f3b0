"""HumanOmniV2's own ``grpo_qwenomni.py`` on the tiny checkpoint, with the flags of its last stage.

Changed from outside, as the checkpoint knows no other: the wording of prompts, frames of 56 pixels
at 4 a second, and the ids of the tags between which partial rewards count. The judge is a formula.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omni_grpo_core import tiny
from omni_grpo_core.core.conversation import INSTRUCTIONS, SYSTEM_PROMPT

FLAGS = {
    "max_completion_length": 48, "num_generations": 2, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1, "freeze_vision_modules": True, "logging_steps": 1,
    "data_seed": 42, "scale_rewards": False, "use_audio_in_video": True, "num_iterations": 1,
    "gradient_checkpointing": True, "attn_implementation": "eager", "torch_dtype": "float32",
    "learning_rate": 1e-4, "max_steps": 3, "use_cpu": True, "ddp_backend": "gloo",
    "save_strategy": "no", "disable_tqdm": True, "report_to": "none", "bf16": False,
    "beta": 0.04, "max_pixels": 3136, "min_pixels": 3136,
}  # fmt: skip
REWARDS = ("format", "accuracy")
JUDGED = ("format", "accuracy", "context", "reasoning")
_TAGS = {
    (34528,): ("", "<context>"), (522, 2147): ("x.", "</context>"),
    (13708, 766): ("x>", "<think>"), (522, 26865): ("x.", "</think>"),
}  # fmt: skip
"""What is before a tag, and the tag, by the ids in Qwen's vocabulary that the trainer looks for."""


def run(folder: Path, wrap: Callable[[type], type], rewards: Sequence[str], **flags: Any) -> None:
    """``wrap``: makes the class of trainer that the script uses from its own."""
    os.environ |= {"API": "none", "API_KEY": "none"}
    script: Any = importlib.import_module("open_r1.grpo_qwenomni")
    checkpoint = folder / "qwen-omni-tiny"  # the script reads the family in the path
    if not checkpoint.exists():
        checkpoint.symlink_to(tiny.checkpoint_dir())
    _sizes()
    _judge()
    _tags()
    script.LazySupervisedDataset._make_conversation_image_and_video = _conversation
    script.VLMGRPOTrainer = wrap(script.VLMGRPOTrainer)
    given = FLAGS | flags | {
        "output_dir": folder / "out", "model_name_or_path": checkpoint,
        "dataset_name": _rows(folder),
    }  # fmt: skip
    sys.argv = ["grpo_qwenomni.py", *(f"--{name}={value}" for name, value in given.items())]
    sys.argv += ["--reward_funcs", *rewards]
    parser = script.TrlParser(
        (script.GRPOScriptArguments, script.GRPOConfig, script.GRPOModelConfig)
    )
    script.main(*parser.parse_args_and_config())


def _rows(folder: Path) -> Path:
    """Clips with sound."""
    rows = json.loads(tiny.data_file().read_text(encoding="utf-8"))
    shown = [
        row | {"path": str(tiny.data_file().parent / row["path"])}
        for row in rows
        if row["data_type"] == "video" and isinstance(row["path"], str)
        if "No sound" not in row["solution"]
    ]
    file = folder / f"rows-{os.environ.get('RANK', 0)}.json"
    file.write_text(json.dumps(shown), encoding="utf-8")
    return file


def _conversation(dataset: Any, example: Any, use_audio_in_video: bool) -> list[dict[str, Any]]:
    lines = ["You are given a video and an audio recording.", example["problem"]]
    lines += [*example["options"], INSTRUCTIONS["multiple choice"]]
    parts = [
        {"type": "video", "video": example["path"]},
        {"type": "audio", "audio": example["path"]},
        {"type": "text", "text": "\n".join(lines)},
    ]
    system = [{"type": "text", "text": SYSTEM_PROMPT}]
    return [{"role": "system", "content": system}, {"role": "user", "content": parts}]


def _sizes() -> None:
    from qwen_omni_utils.v2_5 import vision_process

    vision_process.FPS = 4.0
    vision_process.VIDEO_MIN_TOKEN_NUM = vision_process.VIDEO_MAX_TOKEN_NUM = 4


def _judge() -> None:
    module: Any = importlib.import_module("open_r1.vlm_modules.qwenomni_module")
    module.gpt_api = lambda prompt, model_name: str(sum(map(ord, prompt)) % 6)


def _tags() -> None:
    from transformers import AutoTokenizer

    module: Any = importlib.import_module("open_r1.trainer.grpo_trainer")
    tokenizer = AutoTokenizer.from_pretrained(tiny.checkpoint_dir())
    mask = module.generate_2d_mask
    ids = {
        of_qwen: tokenizer.encode(before + tag)[len(tokenizer.encode(before)) : -1]
        for of_qwen, (before, tag) in _TAGS.items()
    }

    def masked(tokens: Any, begin: list[int], end: list[int]) -> Any:
        return mask(tokens, ids[tuple(begin)], ids[tuple(end)])

    module.generate_2d_mask = masked
