"""VLM-R1's and R1-V's own trainers on a tiny Qwen2.5-VL with random weights, which answers
anything: beside theirs a reward that varies with the text, so that there is something to learn.

Rows are those that their scripts make. The scripts themselves need a data set from the hub (R1-V),
or a reward whose columns they don't pass (VLM-R1's ``grpo_rec.py``).
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from omni_grpo_core import tiny

FLAGS = {
    "max_completion_length": 16, "num_generations": 4, "per_device_train_batch_size": 8,
    "logging_steps": 1, "learning_rate": 1e-3, "max_steps": 2, "use_cpu": True, "bf16": False,
    "save_strategy": "no", "disable_tqdm": True, "report_to": [], "beta": 0.04,
    "gradient_checkpointing": True, "remove_unused_columns": False,
}  # fmt: skip
REWARDS = ("format", "accuracy", "letters")


def letters(completions: Sequence[Any], **_: Any) -> list[float]:
    return [sum(map(ord, one[0]["content"])) % 97 / 97 for one in completions]


def run(folder: Path, wrap: Callable[[type], type], rewards: Sequence[str], **flags: Any) -> None:
    """``wrap``: makes the class of trainer that is used from theirs."""
    trainers = importlib.import_module("open_r1.trainer")
    modules = sys.modules["open_r1.trainer"].__path__[0]
    checkpoint = folder / "Qwen2.5-VL-tiny"  # the trainers read the family in the path
    sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))
    from tiny_families import FAMILIES

    model, processor = FAMILIES["Qwen2.5-VL"]()
    text = model.config.get_text_config()
    text.rope_scaling, text.rope_theta = text.rope_parameters, 1e4  # names of transformers 4
    # of placeholders that are sampled, a forward over prompt and completion wants the pictures
    words = ("image_token_id", "video_token_id", "vision_start_token_id")
    model.generation_config.suppress_tokens = [getattr(model.config, name) for name in words]
    for part in (model, processor):
        part.save_pretrained(checkpoint)
    given = {**FLAGS, **flags, "output_dir": str(folder / "out")}
    more: dict[str, Any] = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    if (Path(modules).parent / "vlm_modules").is_dir():
        vlm = importlib.import_module("open_r1.vlm_modules").Qwen2VLModule
        theirs = {"format": vlm.format_reward_rec, "accuracy": vlm.iou_reward}
        base, config = trainers.VLMGRPOTrainer, trainers.GRPOConfig
        more |= {"vlm_module": vlm(), "torch_dtype": "float32"}
        question, solution, shown = vlm.get_question_template("rec"), "[4, 4, 40, 40]", _paths
    else:
        script = importlib.import_module("open_r1.grpo")
        theirs = {"format": script.format_reward, "accuracy": script.accuracy_reward}
        base, config = trainers.Qwen2VLGRPOTrainer, script.GRPOConfig
        question, solution, shown = "{Question} Output the answer.", "4", _opened
    trainer = wrap(base)(
        model=str(checkpoint),
        reward_funcs=[{**theirs, "letters": letters}[name] for name in rewards],
        args=config(**given),
        train_dataset=_Rows(question, solution, shown),
        attn_implementation="eager",
        **more,
    )
    trainer.train()


class _Rows(list[dict[str, Any]]):
    def __init__(
        self, question: str, solution: str, shown: Callable[[Path], dict[str, Any]]
    ) -> None:
        rows = json.loads(tiny.data_file().read_text(encoding="utf-8"))
        for row in (row for row in rows if row["data_type"] == "image"):
            text = question.format(Question=row["problem"])
            parts = [{"type": "image"}, {"type": "text", "text": text}]
            self.append(
                {
                    "prompt": [{"role": "user", "content": parts}],
                    "problem": row["problem"],
                    "solution": f"<answer> {solution} </answer>",
                    **shown(tiny.data_file().parent / row["path"]),
                }
            )


def _paths(path: Path) -> dict[str, Any]:
    return {"image_path": [str(path)]}


def _opened(path: Path) -> dict[str, Any]:
    return {"image": Image.open(path).convert("RGB")}
