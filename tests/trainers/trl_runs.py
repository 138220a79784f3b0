"""TRL's own ``GRPOTrainer`` on the tiny checkpoint, recorded by the README's two lines."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from plants import Plant

from omni_grpo_core import attach, record, tiny

ROWS = tuple(json.loads(tiny.data_file().read_text(encoding="utf-8")))
SYSTEM = (
    "You answer questions about what you see, hear and read. First describe what matters for the "
    "question inside <context> </context>. Then reason inside <think> </think>. Last, give the "
    "final answer alone inside <answer> </answer>."
)
"""Changes a trainer before it trains, for as long as the context is open."""


def letters(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """Varies with the text: every group has a best completion."""
    return [sum(map(ord, text_of(one))) % 97 / 97 for one in completions]


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[0]["content"])


def text_rows(count: int = 4) -> list[dict[str, Any]]:
    questions = ("What is it?", "Who are you? Tell me.", "Where?", "Why so?")
    return [{"prompt": [{"role": "user", "content": one}]} for one in questions[:count]]


def pictures(each: int = 1) -> list[dict[str, Any]]:
    """Two questions on shipped pictures, four times; ``each``: pictures of a row, the second one in
    the opposite colours."""
    shown = [row for row in ROWS if row["data_type"] == "image"]
    opened = [Image.open(_file(row)).convert("RGB") for row in shown]
    return [
        {
            "prompt": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": _question(row)},
            ],
            "images": [picture, ImageOps.invert(picture)][:each],
        }
        for row, picture in zip(shown, opened, strict=True)
    ] * 4


def videos() -> Any:
    """Two questions on shipped clips, four times, as a data set that decodes when it is read."""
    from datasets import Dataset

    shown = [row for row in ROWS if row["data_type"] == "video"][:2]
    asked = [
        [{"type": "video", "video": str(_file(row))}, {"type": "text", "text": _question(row)}]
        for row in shown
    ]
    rows = [{"prompt": [{"role": "user", "content": parts}]} for parts in asked]
    return Dataset.from_list(rows * 4).with_transform(_read)


def _read(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """What the table lacks left out, and clips as four frames, (4, h, w, 3)."""
    return {name: [_bare(value) for value in held] for name, held in batch.items()}


def _bare(value: Any) -> Any:
    if isinstance(value, list):
        return [_bare(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _frames(held) if key == "video" else _bare(held)
        for key, held in value.items()
        if held is not None
    }


def _frames(path: str) -> Any:
    with av.open(path) as clip:
        frames = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
    return np.stack(frames[:: len(frames) // 4][:4])


def _file(row: dict[str, Any]) -> Path:
    return tiny.data_file().parent / str(row["path"])


def _question(row: dict[str, Any]) -> str:
    return "\n".join([row["problem"], *row["options"]])


def trained(
    folder: Path,
    model: Any,
    processor: Any,
    rows: Any,
    rewards: Sequence[Callable[..., Any]] = (letters,),
    *,
    plant: Plant | None = None,
    peft: Any = None,
    by: Literal["record", "attach"] = "record",
    **config: Any,
) -> Path:
    """Train a few optimizer steps; the recording's folder. ``rows``: a list, or a data set. ``by``:
    the README's two lines, or ``attach``, which sees the trainer's rows and settings too."""
    import trl
    from datasets import Dataset

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 32,
        "max_steps": 2, "temperature": 1.6, "learning_rate": 1e-4, **config
    }  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=copy.deepcopy(model),
        reward_funcs=list(rewards),
        args=trl.GRPOConfig(
            output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to=[],
            save_strategy="no", disable_tqdm=True, **settings
        ),
        processing_class=processor,
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        peft_config=peft,
    )  # fmt: skip
    with nullcontext() if plant is None else plant(trainer):
        if by == "attach":
            attach(trainer, folder / "trace", steps=settings["max_steps"])
            trainer.train()
        else:
            with record(
                folder / "trace", model=trainer.model, processor=processor,
                reward_funcs=trainer.reward_funcs,
            ):  # fmt: skip
                trainer.train()
    return folder / "trace"
