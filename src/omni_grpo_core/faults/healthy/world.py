"""What a person has before writing a GRPO loop: a model, its processor, data, and a recorder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.faults.config import ROWS, LoopAudio
from omni_grpo_core.faults.fixtures import rows_of
from omni_grpo_core.io.extras import extra
from omni_grpo_core.recorder.record import Recorder, record
from omni_grpo_core.tiny import FamilyName, checkpoint_dir

Dtype = Literal["float32", "bfloat16"]
Kind = Literal["video", "long", "image", "audio", "text"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a healthy loop. ``audio``: how a clip's sound reaches the model; ``lora``:
    only adapters are trained; ``seed``: of everything that is sampled."""

    audio: LoopAudio = "interleaved"
    dtype: Dtype = "float32"
    lora: bool = False
    seed: int = 0
    family: FamilyName = "qwen2.5"

    def __str__(self) -> str:
        parts = (self.family, self.audio, self.dtype, "lora" if self.lora else "full", self.seed)
        return "-".join(map(str, parts))


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """``model``: a copy of the tiny thinker in eval mode, wrapped by PEFT under ``lora``.
    ``processor``: its own copy. Everything else is for the loop to make."""

    model: Any
    processor: Any
    setting: Setting
    folder: Path

    @property
    def interleaved(self) -> bool:
        """Whether clips are to be shown with their sound inside."""
        return self.setting.audio == "interleaved"

    @property
    def separate(self) -> bool:
        """Whether a clip's sound is to be passed as an audio item of its own."""
        return self.setting.audio == "separate"

    def rows(self, kind: Kind, number: int) -> list[dict[str, Any]]:
        """Rows of the data set: ``problem``, ``options``, ``solution`` (the whole completion),
        ``answer`` (its letter) and the file by its kind, ``video``, ``image`` or ``audio``."""
        return [_plain(n) for n in ROWS[self.setting.audio][kind][:number]]

    def record(self, *, model: Any, processor: Any, reward_funcs: Sequence[Any]) -> Recorder:
        """The README's two lines."""
        return record(self.folder, model=model, processor=processor, reward_funcs=reward_funcs)


Loop = Callable[[World], None]
Recording = AbstractContextManager[Any]


def _plain(number: int) -> dict[str, Any]:
    row = rows_of()[number].row
    path, kind = row.get("path"), str(row["data_type"])
    files = {} if path is None else dict(path) if isinstance(path, dict) else {kind: path}
    if kind == "video":
        files = {"video": files["video"]}  # its sound is in the same file
    return {
        "problem": row["problem"],
        "options": list(row["options"]),
        "solution": row["solution"],
        "answer": row["solution"].split("<answer>")[1][0],
        **files,
    }


@cache
def policy_of(family: FamilyName, dtype: Dtype) -> Policy:
    """The tiny checkpoint of a family in a precision, loaded once per process."""
    return load_policy(checkpoint_dir(family), dtype=dtype)


def world_of(setting: Setting, folder: Path) -> World:
    """A fresh world that records to ``folder``; random state is seeded by ``setting``."""
    policy = policy_of(setting.family, setting.dtype)
    torch.manual_seed(setting.seed)
    model = copy.deepcopy(policy.model)
    if setting.lora:
        with extra("train"):
            from peft import LoraConfig, get_peft_model

        names = r"model\.(language_model\.)?layers\.\d+\.self_attn\.[qv]_proj"
        model = get_peft_model(model, LoraConfig(r=4, target_modules=names))
    return World(model, copy.deepcopy(policy.processor), setting, folder)
