"""HumanOmniV2's and Video-R1's rows: ``problem``, ``problem_type``, ``options``, ``solution``,
``data_type`` and ``path``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omni_grpo_core.core.readers.row import (
    Format,
    as_list,
    media_ref,
    options_of,
    problem_type_of,
    read_gold,
    without_leading_marks,
)
from omni_grpo_core.core.rows import DataRow, short
from omni_grpo_core.types import MODALITIES, PROBLEM_TYPES, MediaRef, Modality, Sample


def read(row: DataRow, sample_id: str, root: Path | None) -> Sample:
    question = row.text("problem")
    kind = problem_type_of(row)
    if kind is None:
        row.fail("problem_type None", f"one of {', '.join(PROBLEM_TYPES)}")
    options = options_of(row, kind)
    solution = row.text("solution")
    read_gold(row, kind, options, solution)
    media = _media(row, root)
    return Sample(
        sample_id=sample_id,
        question=without_leading_marks(row, question, media),
        problem_type=kind,
        options=options,
        solution=solution,
        media=media,
        origin=row.origin,
    )


def _media(row: DataRow, root: Path | None) -> tuple[MediaRef, ...]:
    values = row.values
    # evaluation files of HumanOmniV2 have the path under the modality alone
    path = values.get("path", {k: values[k] for k in MODALITIES if values.get(k) is not None})
    data_type = values.get("data_type", None if path else "text")
    if not isinstance(data_type, str):
        row.fail(f"data_type {short(data_type)}", f"one of {', '.join(MODALITIES)}")
    named = set(re.split(r"[^a-z]+", data_type)) - {"", "and"}
    if not named or not named <= {*MODALITIES, "text"}:
        row.fail(f"data_type {data_type!r}", f"one of {', '.join(MODALITIES)}, text")
    named -= {"text"}
    if isinstance(path, (str, list)) and as_list(path):
        if len(named) != 1:
            row.fail(f"data_type {data_type!r} and one path", f"one of {', '.join(MODALITIES)}")
        path = {next(iter(named)): path}
    if not path or (isinstance(path, str) and not path.strip()):
        if named:
            row.fail(
                f"data_type {data_type!r} and no path", "a path", "add it, or use data_type 'text'"
            )
        return ()
    if not isinstance(path, dict):
        row.fail(f"path {short(path)}", "a file, or {image|video, audio} of files")
    given: dict[Any, list[Any]] = {k: as_list(v) for k, v in path.items() if v is not None}
    if not given or not all(given.values()):
        row.fail(f"path {short(path)}", "a file, or {image|video, audio} of files")
    if not given.keys() <= set(MODALITIES):
        row.fail(f"path for {', '.join(sorted(map(str, given)))}", "image, video, audio")
    if not named or not named <= given.keys():
        row.fail(
            f"data_type {data_type!r} and a path for {', '.join(sorted(given))}",
            "a data_type that agrees with the path",
        )
    kinds: list[Modality] = [kind for kind in MODALITIES if kind in given]
    return tuple(media_ref(row, kind, one, root) for kind in kinds for one in given[kind])


FORMAT = Format(
    name="humanomni",
    title="HumanOmniV2",
    needs=(("problem",), ("problem_type",), ("solution",)),
    read=read,
    ids=("problem_id", "id"),
)
