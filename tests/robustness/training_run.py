"""The run that the rows of bad training input change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from omni_grpo_core import tiny

SOUND: Mapping[str, Any] = {
    "checkpoint": str(tiny.checkpoint_dir()),
    "data": str(tiny.data_file()),
    "out": "run",
    "settings": {"group_size": 2, "max_new_tokens": 4, "temperature": 3.0},
    "rewards": {"toy_rewards:early_letters": {}},
    "scale": "none",
    "batch_size": 2,
    "micro_batch_size": 2,
    "steps": 3,
    "optimizer": {"lr": 1e-3},
    "save_every": 1,
    # a policy with a cap of 4 tokens always meets it
    "guard": {"preflight": False, "patience": 99, "garbage": 1.0},
    "trackers": [],
}


def written(folder: Path, **changes: Any) -> Sequence[object]:
    (folder / "run.yaml").write_text(yaml.safe_dump({**SOUND, **changes}))
    return ["train", "run.yaml"]


def with_reward(source: str) -> Callable[[Path], Sequence[object]]:
    def arguments(folder: Path) -> Sequence[object]:
        (folder / "mine.py").write_text(source)
        return written(folder, rewards={"mine:f": {}})

    return arguments
