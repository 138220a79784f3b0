"""What the lanes of other libraries share: two paths on the shipped rows, or on clips made here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from media_files import numbered, tone, write_media

from omni_grpo_core import tiny
from omni_grpo_core.core.media_config import MediaConfig
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.parity.compare import compare_paths
from omni_grpo_core.parity.given import row_reader, setup_of
from omni_grpo_core.parity.results import ParityReport
from omni_grpo_core.parity.run import run_path
from omni_grpo_core.pipeline.settings import Settings, load_settings
from omni_grpo_core.tiny import FamilyName
from omni_grpo_core.types import MediaRef, Sample

# the shipped rows, counted from 1
INSIDE_SHORT, INSIDE_LONG = [1, 2, 3, 6, 8, 9], [10, 12, 13, 14]
APART, SILENT, PICTURES, SOUNDS, TEXTS = [4, 5, 7, 11], [15, 16], [17, 18], [19, 20], [21, 22]


def shipped(path: str, family: FamilyName = "qwen2.5", first: str = "ours") -> ParityReport:
    """Two paths on the shipped rows."""
    folder = tiny.checkpoint_dir(family)
    return both(path, load_samples(tiny.data_file()), load_settings(folder), folder, first)


def both(
    path: str, samples: Sequence[Sample], settings: Settings, folder: Path, first: str = "ours"
) -> ParityReport:
    setup = setup_of(folder, settings)
    one, other = (run_path(name, setup, samples) for name in (first, path))
    return compare_paths(one, other, setup, row_reader(setup, samples))


def numbers(report: ParityReport, cause: str) -> list[int]:
    """The rows that have a cause, counted from 1."""
    named = dict(report.causes()).get(cause, [])
    return [int(row.sample_id.rpartition(":")[2]) for row in named]


def clip_row(folder: Path, frames: int, rate: int) -> Sample:
    """A clip of ``frames`` at ``rate`` a second with a tone of the same length, 56 x 56."""
    path = folder / f"{frames}-at-{rate}.mkv"
    sound = tone(frames / rate, 16_000)  # PCM: AAC would add milliseconds
    write_media(path, numbered(frames, 56, 56), sound, fps=rate, audio_rate=16_000,
                audio_codec="pcm_s16le")  # fmt: skip
    return Sample(
        path.stem, "What do you see and hear?", "free-form", (),
        "<context>c</context><think>t</think><answer>a</answer>",
        (MediaRef("video", str(path)),), f"{path.name}:1",
    )  # fmt: skip


def at(rate: float, frames: int) -> Settings:
    """Every one of ``frames`` is taken, as it is."""
    media = MediaConfig(fps=rate, min_frames=2, max_frames=frames, min_pixels=3136, max_pixels=3136)
    return Settings(media=media)
