"""What a campaign runs: every fault alone, pairs of them, and clean loops of every kind."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal, get_args

from omni_grpo_core.faults import (
    batch,
    conversation,
    generation,
    learning,
    media,
    model,
    rewarding,
)
from omni_grpo_core.faults.config import ROWS, LoopAudio, LoopConfig
from omni_grpo_core.faults.fault import Fault
from omni_grpo_core.faults.trial import config_for
from omni_grpo_core.types import STAGES, Stage

Kind = Literal["fault", "pair", "clean"]


_OF_CLIPS: tuple[Stage, ...] = ("conversation", "media", "batch", "embeddings", "positions")
"""Stages whose faults change a clip or its audio, unless they need other rows."""


@dataclass(frozen=True, slots=True)
class Task:
    """One trial of a campaign. ``ids``: those of its faults; empty for a clean loop."""

    kind: Kind
    ids: tuple[str, ...]
    config: LoopConfig


def fault_tasks(faults: Sequence[Fault]) -> list[Task]:
    """Every fault alone."""
    return [Task("fault", (f.id,), config_for((f,)) or LoopConfig()) for f in faults]


def pair_tasks(faults: Sequence[Fault], count: int, seed: int) -> list[Task]:
    """``count`` pairs of different stages with compatible settings, drawn without replacement;
    fewer if there are not enough. A fault that ends the loop is paired only with an earlier stage,
    as nothing later could be seen; one that changes clips is paired only where there are clips."""
    possible = []
    for one, other in combinations(faults, 2):
        config = config_for((one, other))
        if config is not None and one.stage != other.stage and _both_show(one, other, config):
            possible.append(Task("pair", (one.id, other.id), config))
    return random.Random(seed).sample(possible, min(count, len(possible)))


def _both_show(one: Fault, other: Fault, config: LoopConfig) -> bool:
    if min(one, other, key=lambda fault: STAGES.index(fault.stage)).stops:
        return False
    clips = {*ROWS[config.audio]["video"], *ROWS[config.audio]["long"]} & {*config.rows}
    return bool(clips) or not any(
        fault.stage in _OF_CLIPS and "rows" not in fault.needs for fault in (one, other)
    )


def clean_tasks(count: int, seed: int) -> list[Task]:
    """``count`` different clean configurations: every audio mode and modality mix in every
    precision first, then draws from all combinations of training settings."""
    rng = random.Random(seed)
    configs: dict[LoopConfig, None] = {}
    base = list(product(get_args(LoopAudio), ("float32", "bfloat16"), range(8)))
    while len(configs) < count:
        audio, dtype, mix = base[len(configs) % len(base)]
        configs[_drawn(rng, audio, dtype, mix)] = None
    return [Task("clean", (), config) for config in configs]


def _drawn(rng: random.Random, audio: LoopAudio, dtype: Any, mix: int) -> LoopConfig:
    accumulation = rng.choice((1, 1, 1, 2))
    return LoopConfig(
        audio=audio,
        rows=_rows(rng, audio, mix),
        group_size=rng.choice((2, 3, 4)) if accumulation == 1 else 2,
        temperature=rng.choice((1.7, 1.8, 1.9)),
        max_new_tokens=rng.choice((48, 56)),
        dtype=dtype,
        iterations=rng.choice((1, 1, 1, 2)),
        accumulation=accumulation,
        checkpointing=rng.random() < 0.3,
        lora=rng.random() < 0.3,
        beta=rng.choice((0.0, 0.0, 0.04)),
        loss_type=rng.choice(("grpo", "dapo")),
        partial=rng.random() < 0.2,
        freeze_towers=rng.random() < 0.7,
        seed=rng.randrange(1000),
    )


def _rows(rng: random.Random, audio: LoopAudio, mix: int) -> tuple[int, ...]:
    """Two or three rows: similar clips, one with a longer clip (padding), an image, an audio
    recording, text, or several of these."""
    kinds = ROWS[audio]
    clips = rng.sample(kinds["video"], 2)
    others = [kind for kind in kinds if kind != "video"]
    match mix:
        case 0 | 1:
            return tuple(clips)
        case 2:
            return (clips[0], rng.choice([n for n in kinds["long"] if n != clips[0]]))
        case 3:
            return (clips[0], rng.choice(kinds["image"]))
        case 4:
            return (clips[0], rng.choice(kinds["text"]))
        case 5:
            return tuple(rng.sample(kinds[rng.choice(others)], 2))
        case 6:
            return tuple(dict.fromkeys(rng.choice(kinds[kind]) for kind in rng.sample(others, 3)))
        case _:
            return tuple(dict.fromkeys((*clips, rng.choice(kinds[rng.choice(others)]))))


FAULTS: tuple[Fault, ...] = tuple(
    fault
    for area in (conversation, media, batch, model, generation, rewarding, learning)
    for fault in area.faults.faults
)
BY_ID = {fault.id: fault for fault in FAULTS}
