"""ms-swift's template in training mode, held against our batch. ``tox -e swift`` runs these."""

from __future__ import annotations

import pytest
from lanes import numbers, shipped

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("swift.template", reason="ms-swift and its packages: tox -e swift")

SHORTER = [1, 2, 4, 5, 7, 9, 12]
"""Rows whose clip's sound is not at 16,000 Hz."""


def test_qwen2_5_omni_on_the_shipped_rows() -> None:
    """Text, frames, grids, rates and the order of tokens agree. Its reader never asks the resampler
    for the samples that it still holds, 16 of them: the sound is a millisecond short, which in row
    12 (32,322 samples, 203 mel frames, 51 tokens) is a token."""
    report = shipped("swift")
    assert numbers(report, "audio-last-dropped") == SHORTER
    assert {name for name, _ in report.causes()} == {"audio-last-dropped"}
    assert report.rows[0].causes[0].sentence == (
        "audio 0: what the second has is the first's without its last 16 samples (16331 of 16347)"
    )
    assert [n for n, row in enumerate(report.rows, 1) if row.token is not None] == [12]
    row = report.rows[11]
    assert (row.a_media, row.b_media) == ("16 video, 51 audio", "16 video, 50 audio")


def test_qwen3_omni_on_the_shipped_rows() -> None:
    """Besides, waveforms are cut to whole mel frames."""
    report = shipped("swift", "qwen3")
    assert report.same_ids == 22
    assert {name for name, _ in report.causes()} == {"audio-last-dropped"}
