"""Continuity on loops of eight styles: silent where nothing is planted, and what is planted between
two calls is found at that edge and nowhere else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import edge_loops as loops
import pytest
from planted_edges import (
    IMAGE,
    ORDER,
    PADDED,
    ROWS,
    SEVERAL,
    SOUND,
    TEXTS,
    VIDEO,
    Plant,
    broken_at,
    planted,
)

from omni_grpo_core.doctor.continuity import edges, look_at_edges
from omni_grpo_core.faults.config import LoopAudio
from omni_grpo_core.faults.healthy.world import Setting

Loop = Callable[[Any], None]
_NO_ROLL = TEXTS[:2]
"""For one text a call, which has no order."""
PLANTS: Sequence[tuple[Loop, LoopAudio, Sequence[Plant]]] = (
    (loops.images_at_once, "off", (*IMAGE, *SEVERAL, *ROWS, *TEXTS)),
    (loops.clip_by_clip, "off", (*VIDEO, *ROWS, *TEXTS)),
    (loops.sounds_sliced, "separate", (*SOUND, *ROWS, *TEXTS)),
    (loops.text_shuffled, "off", (*ROWS, *ORDER, *PADDED, *TEXTS)),
    (loops.return_sequences, "off", (ROWS[0], *ORDER, PADDED[0], *TEXTS)),
    (loops.processed_twice, "off", (*IMAGE, *ROWS, *TEXTS)),
    (loops.heard_clips, "interleaved", (*VIDEO[:2], *VIDEO[3:], *SOUND, *ROWS, *_NO_ROLL)),
    (loops.rollouts_first, "off", (ROWS[0], *_NO_ROLL)),
)


def recorded(loop: Loop, audio: LoopAudio, plant: Plant | None, folder: Path) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return planted(loop, plant, Setting(audio), folder / "trace")


@pytest.mark.parametrize(
    ("loop", "audio", "_plants"), PLANTS, ids=lambda p: getattr(p, "__name__", "")
)
@pytest.mark.slow
def test_nothing_planted_is_silent(
    loop: Loop, audio: LoopAudio, _plants: object, tmp_path: Path
) -> None:
    cases = recorded(loop, audio, None, tmp_path)
    assert [e.sentence for case in cases for e in look_at_edges(case)] == []
    assert {edge.state for case in cases for edge in edges(case)} >= {"ok"}


@pytest.mark.parametrize(
    ("loop", "audio", "plant"),
    [
        pytest.param(loop, audio, plant, id=f"{loop.__name__}: {plant.name}")
        for loop, audio, plants in PLANTS
        for plant in plants
    ],
)
@pytest.mark.slow
def test_what_is_planted_between_calls(
    loop: Loop, audio: LoopAudio, plant: Plant, tmp_path: Path
) -> None:
    cases = recorded(loop, audio, plant, tmp_path)
    assert broken_at(cases) == {plant.edge}, [
        e.sentence for case in cases for e in look_at_edges(case)
    ]
