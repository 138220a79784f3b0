"""A run that is resumed goes on with the rows it was started with, or is told to go on with others.

The same path may hold other rows the next day; a step's rows then are others than the log says.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from omni_grpo_core.errors import TrainError
from omni_grpo_core.training.checkpointing import Saved, check_rows, rows_hash
from omni_grpo_core.types import MediaRef, Sample

CLIP = MediaRef("video", "a.mp4", 0.0, 5.0)
ROW = Sample("1", "How many?", "numerical", (), "<answer>3</answer>", (CLIP,), "rows.json:1")
OTHER = replace(ROW, sample_id="2")


def test_rows_moved_within_their_file_are_the_same() -> None:
    assert rows_hash([ROW, OTHER]) == rows_hash([replace(ROW, origin="rows.json:7"), OTHER])


@pytest.mark.parametrize(
    "rows",
    [
        [OTHER, ROW],
        [ROW],
        [replace(ROW, solution="<answer>4</answer>"), OTHER],
        [replace(ROW, question="How many\udcff?"), OTHER],
        [replace(ROW, media=(replace(CLIP, end=6.0),)), OTHER],
        [replace(ROW, options=("A. x",)), OTHER],
    ],
)
def test_other_rows_are_refused_unless_they_are_accepted(rows: list[Sample]) -> None:
    saved = Saved(Path("state/000001"), (), 1, rows_hash([ROW, OTHER]), (), ())
    assert check_rows(Path("run"), saved, rows_hash([ROW, OTHER]), accepted=False) is None
    with pytest.raises(TrainError, match=r"run: found the state of a run on other rows.*--data-ch"):
        check_rows(Path("run"), saved, rows_hash(rows), accepted=False)
    warning = check_rows(Path("run"), saved, rows_hash(rows), accepted=True)
    assert warning is not None
    assert "it goes on with the new ones" in warning
