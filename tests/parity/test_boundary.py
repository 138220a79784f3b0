"""The catalogue's faults between trainer and engine, where they are faults of input, are found by
``parity`` as well: without weights, from what an engine would read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from omni_grpo_core import tiny
from omni_grpo_core.engines import transformers_backend
from omni_grpo_core.engines.requests import Answer, Request, Sampling
from omni_grpo_core.faults.boundary import BOUNDARY, Boundary, BoundaryFault
from omni_grpo_core.parity.compare import compare_paths
from omni_grpo_core.parity.given import Given, Setup, given_rows, setup_of
from omni_grpo_core.parity.run import run_path
from omni_grpo_core.parity.seen import header_of, listening, trace_of
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.types import Row, Sample, Trace

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


class Reader:
    """A backend that answers with nothing and keeps the rows that an engine would have read."""

    name = "reader"

    def __init__(self, setup: Setup) -> None:
        self.setup, self.rows = setup, list[Row]()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        self.rows = [transformers_backend._row(self.setup.policy, one) for one in requests]
        return []

    def load(self, folder: Path) -> str:
        return ""

    def restart(self) -> None: ...
    def close(self) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...


@pytest.fixture(scope="module")
def setup(settings: Settings) -> Setup:
    return setup_of(tiny.checkpoint_dir(), settings)


def read(setup: Setup, given: Given, fault: BoundaryFault) -> Trace:
    """What an engine behind the fault reads of a row."""
    reader = Reader(setup)
    boundary = Boundary(reader, setup.policy)
    fault.plant(boundary)
    seconds = tuple(2 / video.sample_fps for video in given.media.videos)
    decided = given.conversation.audio_in_video
    request = Request(given.prompt.text, given.media, decided, seconds, 0)
    with listening(setup.processor) as sounds:
        boundary.generate([request], Sampling(1, 1, 0.0, (), ()))
    (row,) = reader.rows
    output: Mapping[str, Any] = {"input_ids": row.input_ids, **row.tensors}
    return trace_of(header_of(fault.id, setup), given, output, sounds, setup)


def test_every_fault_of_input_is_here() -> None:
    assert {fault.id for fault in INPUT} == FOUND.keys()


@pytest.mark.parametrize("fault", INPUT, ids=lambda fault: fault.id)
def test_a_fault_is_named_in_every_row_that_it_touches(
    fault: BoundaryFault, setup: Setup, samples: Sequence[Sample]
) -> None:
    chosen = [samples[number - 1] for number in FOUND[fault.id]]
    ours = run_path("ours", setup, chosen)
    givens = list(given_rows(setup, chosen))
    theirs = [read(setup, given, fault) for given in givens]
    report = compare_paths(ours, theirs, setup, givens.__getitem__)
    for row, cause in zip(report.rows, FOUND[fault.id].values(), strict=True):
        if cause is None:
            assert row.verdict == "equal"
        else:
            assert cause in [found.name for found in row.causes], (row.sample_id, row.causes)
