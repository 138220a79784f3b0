"""The catalogue's faults between trainer and engine, where they are faults of input, are found by
``parity`` as well: without weights, from what an engine would read."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from omni_grpo_core.faults.boundary import BOUNDARY, BoundaryFault
from omni_grpo_core.faults.boundary_trial import compared
from omni_grpo_core.types import Sample

INPUT = [fault for fault in BOUNDARY if fault.of_input]
# rows counted from 1: a clip with its sound inside, one with it apart, a picture
INSIDE, APART, PICTURE = 13, 11, 17
FOUND: dict[str, dict[int, str | None]] = {
    "engine.images-only": {INSIDE: "dropped", APART: "dropped", PICTURE: None},
    "engine.audio-dropped": {INSIDE: "flag-lost", APART: "dropped", PICTURE: None},
    "engine.expanded-twice": {
        INSIDE: "expanded-twice", APART: "expanded-twice", PICTURE: "expanded-twice",
    },
    "engine.resized": {
        INSIDE: "video-resized", APART: "video-resized", PICTURE: "image-resized",
    },
}  # fmt: skip


def test_every_fault_of_input_is_here() -> None:
    assert {fault.id for fault in INPUT} == FOUND.keys()


@pytest.mark.parametrize("fault", INPUT, ids=lambda fault: fault.id)
def test_a_fault_is_named_in_every_row_that_it_touches(
    fault: BoundaryFault, samples: Sequence[Sample]
) -> None:
    report = compared([fault], [samples[number - 1] for number in FOUND[fault.id]])
    for row, cause in zip(report.rows, FOUND[fault.id].values(), strict=True):
        if cause is None:
            assert row.verdict == "equal"
        else:
            assert cause in [found.name for found in row.causes], (row.sample_id, row.causes)
