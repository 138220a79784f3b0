"""Data sets of many rows over the shipped clips, and the kinds of their rows, computed from the
JSON alone. A row's length shows in its question; a third of the rows are of each."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_grpo_core import tiny

Row = dict[str, Any]
MEDIA = tiny.data_file().parent
SILENT = ("clip-10.mp4", "clip-11.mp4")
"""Shipped clips without a sound track."""
_FILLED = {"short": 0, "medium": 2_000, "long": 8_000}
"""Characters of a question, far more than the shipped clips' tokens can make up for."""
ANSWERS: Mapping[str, tuple[list[str], str]] = {
    "multiple choice": (["A. red", "B. blue"], "A"),
    "numerical": ([], "3"),
    "OCR": ([], "EXIT"),
    "free-form": ([], "He waves."),
    "regression": ([], "2.5"),
    "emer_ov": ([], "joy, surprise"),
    "emer_ov_mc": (["A. joy", "B. fear"], "A,B"),
    "judge": ([], "Yes"),
}
PATHS: Sequence[Row] = (
    {"data_type": "text"},
    {"data_type": "image", "path": "clip-12.png"},
    {"data_type": "audio", "path": "clip-14.wav"},
    {"data_type": "video", "path": "clip-00.mp4"},
    {"data_type": "video", "path": "clip-10.mp4"},
    {"data_type": "video", "path": {"video": "clip-01.mp4", "audio": "clip-01.mp4"}},
    {"data_type": "video", "path": {"video": "clip-11.mp4", "audio": "clip-15.wav"}},
    {"data_type": "image", "path": {"image": "clip-13.png", "audio": "clip-15.wav"}},
)


def lengths(count: int) -> list[str]:
    """A class for each row, a third of them each, in random order."""
    found = [name for name in _FILLED for _ in range(count // 3)]
    random.Random(0).shuffle(found)
    return found


def question(number: int, length: str) -> str:
    return f"Question {number}? ".ljust(_FILLED[length] or 14, "x")


def human_omni(count: int, mix: Sequence[Row]) -> list[Row]:
    """Rows in HumanOmniV2's format, with the media of ``mix`` in turn and every problem type, but
    not every combination of the two."""
    draw = random.Random(1)
    rows = []
    for number, length in enumerate(lengths(count)):
        kind = draw.choice([*ANSWERS][: 2 + number % 7])
        options, gold = ANSWERS[kind]
        rows.append(
            {
                "problem": question(number, length),
                "problem_type": kind,
                "options": options,
                "solution": f"<answer>{gold}</answer>",
                **mix[number % len(mix)],
            }
        )
    return rows


def social_iq(count: int) -> list[Row]:
    """Rows in Social-IQ 2.0's format; one clip in five is silent."""
    answers = {f"a{i}": f"answer {i}" for i in range(4)}
    return [
        {
            "qid": f"q{number}",
            "q": question(number, length),
            "vid_name": f"clip-{(0, 1, 4, 5, 10)[number % 5]:02}",
            "ts": "0.00-60.00" if number % 3 else "0.00-61.00",
            "answer_idx": number % 4,
            **answers,
        }
        for number, length in enumerate(lengths(count))
    ]


def kinds_of(rows: Iterable[Row]) -> list[str]:
    """The name of each row's kind."""
    return ["-".join(filter(None, (*_media(row), _type(row), _length(row)))) for row in rows]


def _media(row: Row) -> tuple[str, str]:
    path = f"{row['vid_name']}.mp4" if "vid_name" in row else row.get("path")
    if path is None:
        return "text", ""
    if isinstance(path, str):
        name = row.get("data_type", "video")
        silent = "off" if path in SILENT else "interleaved"
        return name, silent if name == "video" else ""
    order = [name for name in ("image", "video", "audio") if name in path]
    return "+".join(order), "separate" if "video" in path else ""


def _type(row: Row) -> str:
    return str(row.get("problem_type", "multiple choice")).replace(" ", "-").lower()


def _length(row: Row) -> str:
    text = row.get("problem") or row["q"]
    return next(name for name in reversed(_FILLED) if len(text) >= _FILLED[name])


def write(folder: Path, rows: Sequence[Row]) -> Path:
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    return file
