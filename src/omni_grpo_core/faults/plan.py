"""What a campaign runs: every fault in every loop that can have it, pairs, and healthy loops."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, cycle, product
from typing import Any, Literal, get_args

from omni_grpo_core.faults import (
    batch,
    boundary,
    conversation,
    generation,
    learning,
    media,
    model,
    passing,
    rewarding,
    updating,
)
from omni_grpo_core.faults.boundary import PLACES, BoundaryFault
from omni_grpo_core.faults.config import ROWS, LoopAudio, LoopConfig
from omni_grpo_core.faults.fault import Fault
from omni_grpo_core.faults.healthy import healthy_tasks
from omni_grpo_core.faults.healthy.world import Setting
from omni_grpo_core.faults.makes import MAKES, Make
from omni_grpo_core.faults.trial import config_for
from omni_grpo_core.types import STAGES, Stage

Kind = Literal["fault", "pair", "clean", "healthy"]


_OF_CLIPS: tuple[Stage, ...] = ("conversation", "media", "batch", "embeddings", "positions")
"""Stages whose faults change a clip or its audio, unless they need other rows."""


@dataclass(frozen=True, slots=True)
class Task:
    """One trial of a campaign. ``ids``: those of its faults; empty for a sound loop. ``loop``: a
    name of ``MAKES``, of a healthy loop for the kind ``"healthy"``, or, between trainer and engine,
    of ``boundary.PLACES``."""

    kind: Kind
    ids: tuple[str, ...]
    config: LoopConfig | Setting
    loop: str = "reference"


def makes_of(faults: Sequence[Fault]) -> tuple[Make, ...]:
    """The loops that can have all of these faults."""
    if any(isinstance(fault, BoundaryFault) for fault in faults):
        return ()
    noted = any(fault.noted for fault in faults)
    asked = [
        make
        for make in MAKES.values()
        if (make.noted if noted else make.shape + "-noted" != make.name)
    ]
    return tuple(
        make
        for make in asked
        if not any({make.shape, make.name} & {*fault.lacking} for fault in faults)
    )


def fault_tasks(faults: Sequence[Fault]) -> list[Task]:
    """Every fault alone, in every loop that can have it; one between trainer and engine in a run
    that the proof should stop and, where it is one of input, in front of ``parity``."""
    return [
        Task("fault", (fault.id,), config_for((fault,), make.config) or make.config, make.name)
        for fault in faults
        for make in makes_of((fault,))
    ] + [
        Task("fault", (fault.id,), replace(boundary.CONFIG, **fault.needs), name)
        for fault in faults
        if isinstance(fault, BoundaryFault)
        for name in PLACES
        if name == "engine" or fault.of_input
    ]


def pair_tasks(faults: Sequence[Fault], count: int, seed: int) -> list[Task]:
    """``count`` pairs of different stages with compatible settings, each in one of the loops that
    can have both, drawn without replacement; fewer if there are not enough. A fault that ends the
    loop is paired only with an earlier stage, as nothing later could be seen; one that changes
    clips is paired only where there are clips."""
    return _drawn_pairs(_pairs(faults), count, seed)


def spare_pairs(faults: Sequence[Fault], drawn: Sequence[Task], seed: int) -> list[Task]:
    """As many more, in the order in which they take the place of those ``drawn`` of which one fault
    turns out to have no effect."""
    taken = {task.ids for task in drawn}
    left = [pair for pair in _pairs(faults) if tuple(fault.id for fault in pair) not in taken]
    return _drawn_pairs(left, len(drawn), seed)


def _pairs(faults: Sequence[Fault]) -> list[tuple[Fault, Fault]]:
    return [
        pair
        for pair in combinations(faults, 2)
        if pair[0].stage != pair[1].stage and makes_of(pair) and _both_show(*pair)
    ]


def _drawn_pairs(possible: Sequence[tuple[Fault, Fault]], count: int, seed: int) -> list[Task]:
    rng = random.Random(seed)
    drawn = rng.sample(possible, min(count, len(possible)))
    return [pair_task(pair, rng.choice(makes_of(pair))) for pair in drawn]


def pair_task(pair: Sequence[Fault], make: Make) -> Task:
    """Two faults whose settings are compatible, in one loop."""
    config = config_for(pair, make.config)
    assert config is not None
    return Task("pair", tuple(fault.id for fault in pair), config, make.name)


def named_pairs(one: Fault, other: Fault) -> list[Task]:
    """Two faults in every loop that can have both; none where their settings conflict."""
    pair = (one, other)
    return [pair_task(pair, make) for make in makes_of(pair)] if config_for(pair) else []


def _both_show(one: Fault, other: Fault) -> bool:
    config = config_for((one, other))
    if config is None or min(one, other, key=lambda fault: STAGES.index(fault.stage)).stops:
        return False
    clips = {*ROWS[config.audio]["video"], *ROWS[config.audio]["long"]} & {*config.rows}
    return bool(clips) or not any(
        fault.stage in _OF_CLIPS and "rows" not in fault.needs for fault in (one, other)
    )


def clean_tasks(count: int, seed: int) -> list[Task]:
    """``count`` sound runs: first those on an engine that agrees, then the healthy loops in every
    setting and our own loops, in turn; of our own, every audio mode and modality mix in every
    precision first, then draws from all combinations of training settings."""
    engines = [
        Task("clean", (), replace(boundary.CONFIG, lora=lora, seed=seed), name)
        for name in PLACES
        for lora in ((False, True) if name == "engine" else (False,))
    ]
    foreign = [Task("healthy", (), setting, name) for name, setting in healthy_tasks()]
    random.Random(seed).shuffle(foreign)
    own = _own_tasks(seed)
    tasks = engines[:count]
    for place in range(len(tasks), count):
        tasks.append(foreign.pop() if foreign and place % 4 else next(own))
    return tasks


def _own_tasks(seed: int) -> Iterator[Task]:
    rng = random.Random(seed)
    seen: set[tuple[str, LoopConfig]] = set()
    ways = product(get_args(LoopAudio), ("float32", "bfloat16"), range(8))
    for audio, dtype, mix in cycle(ways):
        make, config = rng.choice(list(MAKES.values())), _drawn(rng, audio, dtype, mix)
        if (make.name, config) not in seen:
            seen.add((make.name, config))
            yield Task("clean", (), config, make.name)


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


def sample(tasks: Sequence[Task], count: int, seed: int) -> list[Task]:
    """``count`` of the trials, in their order: of every fault one loop, then the rest by lot, so
    that pairs and sound runs keep their share."""
    rng = random.Random(seed)
    lots = list(range(len(tasks)))
    rng.shuffle(lots)
    first: dict[tuple[str, ...], int] = {}
    for place in lots:
        if tasks[place].kind == "fault":
            first.setdefault(tasks[place].ids, place)
    others = [p for p in lots if tasks[p].kind != "fault"]
    rest = [p for p in lots if tasks[p].kind == "fault" and first[tasks[p].ids] != p]
    # faults take at most half of the trials where there is something else
    singles = list(first.values())[: count if not others else max(count // 2, 1)]
    chosen = [*singles, *others, *rest][:count]
    return [tasks[place] for place in sorted(chosen)]


FAULTS: tuple[Fault, ...] = (
    *(
        fault
        for area in (
            conversation,
            media,
            batch,
            model,
            generation,
            passing,
            rewarding,
            learning,
            updating,
        )
        for fault in area.faults.faults
    ),
    *boundary.BOUNDARY,
)
BY_ID = {fault.id: fault for fault in FAULTS}
