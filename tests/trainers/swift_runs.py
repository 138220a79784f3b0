"""ms-swift's own GRPO trainer on the tiny checkpoints, recorded by ``attach`` from its pipeline."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from plants import Plant
from safetensors.torch import load_file, save_file
from trl_runs import ROWS, text_rows

from omni_grpo_core import attach, record, tiny

Family = Literal["qwen2_5_omni", "qwen3_omni"]
Kind = Literal["text", "image", "audio", "video", "audio in video"]
"""Changes a trainer before it trains, for as long as the context is open."""

_TYPES: dict[Family, tuple[str, str]] = {
    "qwen2_5_omni": ("qwen2_5_omni", "Qwen2_5OmniForConditionalGeneration"),
    "qwen3_omni": ("qwen3_omni_moe", "Qwen3OmniMoeForConditionalGeneration"),
}
_ENVIRONMENT = {
    "ENABLE_AUDIO_OUTPUT": "0", "SWIFT_AUDIO_LOAD_BACKEND": "soundfile_pyav",
    "FORCE_QWENVL_VIDEO_READER": "decord", "FPS": "2", "FPS_MIN_FRAMES": "2",
    # tokens of a picture and of a frame: 2 by 2, as the tiny checkpoints were trained on
    "IMAGE_MAX_TOKEN_NUM": "4", "IMAGE_MIN_TOKEN_NUM": "4",
    "VIDEO_MAX_TOKEN_NUM": "4", "VIDEO_MIN_TOKEN_NUM": "4",
}  # fmt: skip
_SETTINGS = {
    "rlhf_type": "grpo", "tuner_type": "full", "use_cpu": True, "use_vllm": False,
    "torch_dtype": "float32", "fp16": False, "bf16": False, "attn_impl": "sdpa",
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "num_generations": 2,
    "max_completion_length": 32, "max_steps": 2, "temperature": 1.6, "learning_rate": 1e-4,
    "lr_scheduler_type": "constant", "warmup_ratio": 0, "seed": 0, "system": "You answer.",
    "save_strategy": "no", "eval_strategy": "no", "report_to": "none", "logging_steps": 1,
    "check_model": False, "load_from_cache_file": False, "dataloader_num_workers": 0,
    "dataset_num_proc": 1, "beta": 0.0,
}  # fmt: skip


def letters(completions: Sequence[str], **_: Any) -> list[float]:
    """Varies with the text: every group has a best completion."""
    return [sum(map(ord, one)) % 97 / 97 for one in completions]


def whole_checkpoint(family: Family, folder: Path) -> Path:
    """A tiny thinker as a checkpoint of the whole model, which ms-swift loads, without a talker."""
    source = tiny.checkpoint_dir()
    if family == "qwen3_omni":
        source = source.parent / "checkpoint_qwen3"
    shutil.copytree(source, folder)
    kind, architecture = _TYPES[family]
    thinker = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {
        "model_type": kind, "architectures": [architecture], "torch_dtype": "float32",
        "thinker_config": thinker, "enable_audio_output": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = folder / "model.safetensors"
    named = {f"thinker.{name}": weight for name, weight in load_file(weights).items()}
    save_file(named, weights, metadata={"format": "pt"})
    torch.save({}, folder / "spk_dict.pt")
    return folder


def rows_of(kind: Kind) -> list[dict[str, Any]]:
    """Two questions of a kind, in ms-swift's form."""
    if kind == "text":
        return [
            {"messages": row["prompt"], "solution": "<answer>A</answer>"} for row in text_rows(2)
        ]
    medium = "video" if kind == "audio in video" else kind
    # clips of two seconds: of one, two frames a second are a single step of time
    clips = ("clip-07.mp4", "clip-08.mp4")
    shown = {
        row["path"]: row for row in ROWS
        if row["data_type"] == medium and (medium != "video" or row["path"] in clips)
    }  # fmt: skip
    return [
        {
            "messages": [
                {
                    "role": "user",
                    "content": f"<{medium}>" + "\n".join([row["problem"], *row["options"]]),
                }
            ],
            f"{medium}s": [str(tiny.data_file().parent / path)],
            "solution": row["solution"],
        }
        for path, row in shown.items()
    ]


def trained(
    folder: Path,
    checkpoint: Path,
    kind: Kind,
    rewards: Sequence[Callable[..., Any]] = (letters,),
    *,
    plant: Plant | None = None,
    by: Literal["record", "attach"] | None = "attach",
    ended: Callable[[Any], None] = lambda _: None,
    **config: Any,
) -> Path:
    """Train a few optimizer steps; the recording's folder. ``by``: how it is recorded, if it is.
    ``ended``: called with the trainer."""
    from swift.pipelines.train.rlhf import SwiftRLHF
    from swift.rewards import orms

    class Recorded(SwiftRLHF):  # type: ignore[misc]
        def train(self, trainer: Any) -> Any:
            with nullcontext() if plant is None else plant(trainer):
                if by == "attach":
                    attach(trainer, folder / "trace", steps=trainer.args.max_steps)
                recording = record(
                    folder / "trace", model=trainer.model, processor=trainer.template.processor,
                    reward_funcs=trainer.reward_funcs,
                ) if by == "record" else nullcontext()  # fmt: skip
                with recording:
                    made = super().train(trainer)
            ended(trainer)
            return made

    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)), encoding="utf-8")
    family = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["model_type"]
    settings = {
        **_SETTINGS, "model": str(checkpoint), "model_type": family, "dataset": str(rows),
        "reward_funcs": [one.__name__ for one in rewards], "output_dir": str(folder / "out"),
        **config,
    }  # fmt: skip
    given = [str(one) for name, held in settings.items() for one in (f"--{name}", *_listed(held))]
    sound = {"USE_AUDIO_IN_VIDEO": str(kind == "audio in video")}
    named = {one.__name__: (lambda args=None, one=one: one) for one in rewards}
    with mock.patch.dict(os.environ, {**_ENVIRONMENT, **sound}), mock.patch.dict(orms, named):
        Recorded(given).main()
    return folder / "trace"


def _listed(held: Any) -> list[Any]:
    return held if isinstance(held, list) else [held]
