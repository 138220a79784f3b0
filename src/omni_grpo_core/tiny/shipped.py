"""The clips and rows shipped with the package: every way a medium can reach the model.

All of them show combinations that were not trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from omni_grpo_core.tiny.clips import Clip, combinations, write_mp4, write_png, write_wav
from omni_grpo_core.tiny.questions import Carry, Question, Topic, ask

_FIRST_SEED = 9_000_000
"""Far from the seeds of training, selection and evaluation."""
_SECONDS = (1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 1, 1)
_ROWS: tuple[tuple[int, Carry, Topic], ...] = (
    (0, "interleaved", "colour"),
    (0, "interleaved", "pitch"),
    (1, "interleaved", "motion"),
    (2, "separate", "motion"),
    (2, "separate", "pitch"),
    (3, "interleaved", "pitch"),
    (4, "separate", "colour"),
    (5, "interleaved", "colour"),
    (6, "interleaved", "motion"),
    (7, "interleaved", "motion"),
    (7, "separate", "pitch"),
    (8, "interleaved", "pitch"),
    (9, "interleaved", "motion"),
    (9, "interleaved", "pitch"),
    (10, "off", "colour"),
    (11, "off", "motion"),
    (12, "image", "colour"),
    (13, "image", "colour"),
    (14, "audio", "pitch"),
    (15, "audio", "pitch"),
    (12, "text", "motion"),
    (13, "text", "pitch"),
)
"""(clip, carry, topic)."""


def clips() -> tuple[Clip, ...]:
    """The 16 held-out combinations: twelve mp4 (one of 3 s, two of 2 s, two without a track), then
    two shipped as png and two as wav."""
    order = np.random.default_rng(_FIRST_SEED).permutation(16)
    order[[13, 14]] = order[[14, 13]]  # the two pictures must differ in colour
    attributes = [combinations("held-out")[i] for i in order]
    return tuple(
        Clip(
            attributes[i],
            seed=_FIRST_SEED + i,
            seconds=_SECONDS[i] if i < 12 else 1,
            silent_film=i in (10, 11),
        )
        for i in range(16)
    )


def questions() -> tuple[Question, ...]:
    """The shipped questions, in row order."""
    rng = np.random.default_rng(_FIRST_SEED)
    cast = clips()
    return tuple(ask(cast[clip], carry, rng, (topic,)) for clip, carry, topic in _ROWS)


def row(question: Question, folder: Path) -> dict[str, Any]:
    """A question as a row of HumanOmniV2's JSON; writes the files it names into ``folder``.

    ``data_type`` names the main medium. ``path`` is absent without one, and lists video and sound
    separately if the sound is an item of its own.
    """
    name = f"clip-{question.clip.seed % 1000:02d}"
    common: dict[str, Any] = {
        "problem": question.text,
        "problem_type": "multiple choice",
        "options": list(question.options),
        "solution": question.completion,
    }
    if question.carry == "text":
        return {**common, "data_type": "text"}
    if question.carry == "image":
        write_png(question.clip, folder / f"{name}.png")
        return {**common, "data_type": "image", "path": f"{name}.png"}
    if question.carry == "audio":
        write_wav(question.clip, folder / f"{name}.wav")
        return {**common, "data_type": "audio", "path": f"{name}.wav"}
    write_mp4(question.clip, folder / f"{name}.mp4")
    path: Any = f"{name}.mp4"
    if question.carry == "separate":
        path = {"video": path, "audio": path}
    return {**common, "data_type": "video", "path": path}


def write_data(folder: Path) -> Path:
    """Write the shipped clips and ``samples.json`` into ``folder``; returns the JSON file."""
    rows = [row(question, folder) for question in questions()]
    file = folder / "samples.json"
    file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return file
