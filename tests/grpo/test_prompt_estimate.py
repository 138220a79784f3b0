from __future__ import annotations

import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from media_files import write_media
from qwen_omni_utils.v2_5 import vision_process

from omni_grpo_core import tiny
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.grpo import prompt_estimate
from omni_grpo_core.grpo.headers import Header, read_header
from omni_grpo_core.grpo.prompt_estimate import (
    check_prompt_limit,
    least_media_tokens,
    resized_tokens,
    token_shape,
)
from omni_grpo_core.media import probe
from omni_grpo_core.media_config import MediaConfig
from omni_grpo_core.pipeline import Inputs
from omni_grpo_core.settings import Settings
from omni_grpo_core.types import MediaRef, Sample

SHAPE = token_shape(tiny.checkpoint_dir())


def sample(*media: MediaRef) -> Sample:
    return Sample("s", "What?", "free-form", (), "<answer>x</answer>", media, "here:1")


def frames(count: int, height: int = 56, width: int = 84) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, height, width, 3), np.uint8)


def test_the_header_of_an_mp4_tells_what_the_decoder_finds(tmp_path: Path) -> None:
    sound = np.zeros((1, 2 * 16_000), np.float32)
    path = write_media(tmp_path / "clip.mp4", frames(20), fps=10, audio=sound, audio_rate=16_000)
    header = read_header(path)
    assert header is not None
    assert (header.video, header.frames, header.width, header.height) == (True, 20, 84, 56)
    assert header.video_seconds == pytest.approx(2.0)
    # AAC comes in blocks of 1024 samples, 64 ms, with one block of run-in
    assert header.audio_seconds == pytest.approx(probe(path).duration, abs=0.15)


def test_the_header_of_a_wav(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(4 * 12_000))
    assert read_header(path) == Header(audio_seconds=1.5)


@pytest.mark.parametrize(
    "content",
    [b"", b"RIFF", b"RIFF0000WAVEjunk", b"\0\0\0\x08ftyp", b"\0\0\0\x0cftypisom\0\0\0\x08moov",
     b"\0\0\0\x0cftypisom" + b"\0\0\0\x10moov\0\0\0\x08trak", b"OggS" * 9],
)  # fmt: skip
def test_nothing_is_known_of_other_files_and_nothing_raised(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(content)
    assert read_header(path) is None
    assert read_header(tmp_path / "not-there.mp4") is None


@given(st.binary(max_size=120))
def test_a_damaged_mp4_raises_nothing(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.mp4"
    path.write_bytes(b"\0\0\0\x0cftypisom" + tail)
    read_header(path)


@given(
    height=st.integers(30, 3000),
    width=st.integers(30, 3000),
    side=st.sampled_from([28, 32]),
    least=st.integers(1, 200),
    more=st.integers(10, 800),
)
def test_sizes_are_those_of_the_library(
    height: int, width: int, side: int, least: int, more: int
) -> None:
    low, high = least * side * side, (least + more) * side * side
    rows, columns = vision_process.smart_resize(height, width, side, low, high)
    assert resized_tokens(height, width, side, low, high) == rows * columns // side**2


def test_the_limits_are_those_of_the_library() -> None:
    library = vision_process
    assert prompt_estimate.VIDEO_TOKENS == (
        library.VIDEO_MIN_TOKEN_NUM, library.VIDEO_MAX_TOKEN_NUM
    )  # fmt: skip
    assert prompt_estimate.IMAGE_TOKENS == (
        library.IMAGE_MIN_TOKEN_NUM, library.IMAGE_MAX_TOKEN_NUM
    )  # fmt: skip
    assert prompt_estimate.CLIP_TOKENS == library.MODEL_SEQ_LEN * 0.9


def test_it_is_a_lower_bound_and_not_an_idle_one(
    inputs: Inputs, samples: tuple[Sample, ...], settings: Settings
) -> None:
    """Every shipped row, against its real placeholders: clips in every audio mode, images,
    recordings, text."""
    estimated = least_media_tokens(samples, settings, SHAPE)
    real = [sum(span.length for span in row.spans) for row in inputs.batch.rows]
    assert all(found <= true for found, true in zip(estimated, real, strict=True))
    # a twentieth of one second's 25 audio tokens, and one pair of four frames
    assert all(found >= 0.6 * true for found, true in zip(estimated, real, strict=True))
    assert sum(n > 0 for n in real) == sum(n > 0 for n in estimated) > 10


def test_a_minute_at_the_library_s_own_sizes_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The incident's prompt limit of 2048. 60 s at 2 frames a second, of which a twentieth is not
    counted on: 114 frames, 57 pairs of 640 x 360 pixels, which are 23 x 13 tokens: 17,043. The
    sound, interleaved: 5,700 mel frames, 1,425 tokens."""
    clip = Header(True, 1800, 640, 360, 60.0, 60.0)
    monkeypatch.setattr(prompt_estimate, "read_header", lambda path: clip)
    shown = sample(MediaRef("video", "clip.mp4"))
    found = least_media_tokens([shown], Settings(), SHAPE)
    assert found == (57 * 23 * 13 + 1425,)
    silent = Settings(audio_in_video="off")
    assert least_media_tokens([shown], silent, SHAPE) == (57 * 23 * 13,)
    stretch = sample(MediaRef("video", "clip.mp4", 30.0, 90.0))  # which ends with the file
    assert least_media_tokens([stretch], silent, SHAPE) == (28 * 23 * 13,)
    few = Settings(audio_in_video="off", media=MediaConfig(max_frames=8, max_pixels=28 * 28 * 10))
    assert least_media_tokens([shown], few, SHAPE)[0] <= 4 * 10
    with pytest.raises(
        ConfigError,
        match=r"max_prompt_length: found 2048, and 1 of 1 samples .* s has 18468 or more.*fps",
    ):
        check_prompt_limit([shown], found, 2048)
    check_prompt_limit([shown], found, 18468)
    check_prompt_limit([shown], found, None)


def test_what_cannot_be_read_counts_nothing(tmp_path: Path) -> None:
    for name in ("x.png", "x.mp4", "x.mp3"):
        (tmp_path / name).write_bytes(b"nonsense")
    refs = [
        MediaRef("image", str(tmp_path / "x.png")),
        MediaRef("video", str(tmp_path / "x.mp4")),
        MediaRef("audio", str(tmp_path / "x.mp3")),
    ]
    alone = [replace(sample(ref), sample_id=ref.path) for ref in refs]
    assert least_media_tokens(alone, Settings(), SHAPE) == (0, 0, 0)
