"""Social-IQ 2.0's question files: ``q``, ``a0`` to ``a3``, ``answer_idx``, ``vid_name``, ``ts``."""

from __future__ import annotations

import math
import re
from pathlib import Path

from omni_grpo_core.core.readers.row import Format
from omni_grpo_core.core.rows import DataRow, is_file, short
from omni_grpo_core.types import MediaRef, Sample

_STRETCH = re.compile(r"\s*(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)\s*")
_CHOICES = ("a0", "a1", "a2", "a3")
_PUBLIC_CUT = 60.5
"""Seconds. The public downloader cuts every Social-IQ video to one minute, within a few frames."""


def read(row: DataRow, sample_id: str, root: Path | None) -> Sample:
    question = row.text("q")
    options = tuple(
        f"{letter}. {row.text(key)}" for letter, key in zip("ABCD", _CHOICES, strict=True)
    )
    gold = row.values.get("answer_idx")
    if type(gold) is not int or gold not in range(len(_CHOICES)):
        row.fail(
            f"answer_idx {short(gold)}",
            "0, 1, 2 or 3",
            "use a labelled file (the public test split has no answers)",
        )
    name, stretch = row.text("vid_name"), row.text("ts")
    match = _STRETCH.fullmatch(stretch)
    start, end = (float(t) for t in match.groups()) if match else (math.nan, math.nan)
    if not start < end:
        row.fail(f"ts {stretch!r}", 'start and end in seconds, such as "0.00-60.00"')
    folders = [root] if root else [row.file.parent, row.file.parent.parent]
    candidates = [f / sub / f"{name}.mp4" for f in folders for sub in ("video", ".")]
    return Sample(
        sample_id=sample_id,
        question=question,
        problem_type="multiple choice",
        options=options,
        solution=f"<answer>{options[gold][0]}</answer>",
        media=(
            MediaRef(
                "video",
                str(next(filter(is_file, candidates), candidates[0])),
                start=start,
                end=None if start == 0 and end > _PUBLIC_CUT else end,
            ),
        ),
        origin=row.origin,
    )


FORMAT = Format(
    name="social-iq",
    title="Social-IQ 2.0",
    needs=(("q",), *((key,) for key in _CHOICES), ("answer_idx",), ("vid_name",), ("ts",)),
    read=read,
    ids=("qid",),
    repeats=True,
)
