"""What a configuration has in common with that of the run that it goes on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omni_grpo_core.io.bounded import Unreadable, json_value, mapping_in
from omni_grpo_core.training.config import TrainConfig, as_values

_FREE = (
    *("steps", "save_every", "keep", "eval_every", "eval_data", "trackers", "guard", "out"),
    *("fast", "micro_batch_size", "gradient_checkpointing", "offload_gradients"),
    *("full_determinism", "vllm"),
)
"""Keys that may change when a run is resumed: but for rounding they do not change a step, and a run
that was out of memory has to go on with less. (A schedule that decays to the last step depends on
``steps``, so with one ``steps`` may not change.)"""


def fingerprint(config: TrainConfig) -> str:
    """A hash of everything in the configuration that determines what a step does."""
    return hashlib.sha256(json.dumps(_fixed(config), sort_keys=True).encode()).hexdigest()


def _fixed(config: TrainConfig) -> dict[str, Any]:
    free = _FREE if config.optimizer.schedule == "constant" else _FREE[1:]
    return {key: value for key, value in as_values(config).items() if key not in free}


def changed(stored: Path, config: TrainConfig) -> str:
    """What is not as in the configuration in the file ``stored``, in brackets; nothing where that
    cannot be read."""
    now = json.loads(json.dumps(_fixed(config)))
    try:
        before = mapping_in(stored, json_value)
    except Unreadable:
        return ""
    found = [*_differences({key: before.get(key) for key in now}, now)]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f" ({'; '.join(found[:3])}{more})" if found else ""


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*now, *before]):
            below = f"{name}: {key}" if name else key
            yield from _differences(before.get(key), now.get(key), below)
    elif before != now:
        yield f"{name} was {json.dumps(before)[:60]}, is {json.dumps(now)[:60]}"
