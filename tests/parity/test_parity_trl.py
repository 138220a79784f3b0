"""TRL's way from prompts to ids and media, held against our batch and transformers' own path.

``tox -e trl`` runs these. Frames by hand: a clip of 8 frames of which 4 are taken. transformers,
which TRL leaves it to, takes frame k * 8 / 4: 0 2 4 6. qwen-omni-utils, with which the published
models were trained and which ours follows, rounds k * 7 / 3 = 0 2.33 4.67 7: 0 2 5 7.
"""

from __future__ import annotations

import pytest
from lanes import (
    APART,
    INSIDE_LONG,
    INSIDE_SHORT,
    PICTURES,
    SILENT,
    SOUNDS,
    TEXTS,
    numbers,
    shipped,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 and its packages: tox -e trl")
pytest.importorskip("transformers", minversion="5.23", reason="tox -e trl")

CLIPS = sorted([*INSIDE_SHORT, *INSIDE_LONG, *APART, *SILENT])


def test_against_our_batch() -> None:
    """Ids agree in every row, and everything where there are no clips."""
    report = shipped("trl")
    assert report.same_ids == 22
    assert numbers(report, "other-frames") == CLIPS
    assert {name for name, _ in report.causes()} == {"other-frames"}
    said = {row.causes[0].sentence for row in report.rows if row.verdict == "differs"}
    assert "video 0: frames 0 2 4 6 of the file's 8, where the first takes 0 2 5 7" in said
    fine = [n for n, row in enumerate(report.rows, 1) if row.verdict == "equal"]
    assert fine == sorted([*PICTURES, *SOUNDS, *TEXTS])


def test_it_is_transformers_own_path() -> None:
    report = shipped("trl", first="transformers")
    assert [row.verdict for row in report.rows] == ["equal"] * 22


def test_qwen3_omni_cannot_be_tokenized() -> None:
    """TRL passes ``conversation=``; the argument of its processor is ``conversations``."""
    report = shipped("trl", "qwen3")
    assert [row.verdict for row in report.rows] == ["failed"] * 22
    assert "missing 1 required positional argument: 'conversations'" in report.rows[0].sentence
