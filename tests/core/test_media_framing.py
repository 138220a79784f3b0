"""Truncated files, headers with wrong lengths, and paths that are not files."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from media_files import load_audio, numbered, refused, tone, write_media, write_sound

from omni_grpo_core.core.media import probe

RATE = 16_000


class Pipe:
    """What ``ffmpeg -f wav -`` writes to: it cannot seek back to put lengths into the header."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")

    def write(self, data: bytes) -> int:
        return self.file.write(data)


def through_pipe(path: Path, sound: np.ndarray, **options: str) -> Path:
    pipe = Pipe(path)
    with av.open(pipe, "w", format="wav", options=options) as container:
        stream = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        write_sound(container, stream, sound)
    pipe.file.close()
    return path


def wav(samples: bytes, stated: int, *, after: bytes = b"", riff: int | None = None) -> bytes:
    """A mono 16-bit file at 16 kHz whose header states ``stated`` bytes of audio."""
    layout = struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)
    body = b"WAVE" + b"fmt " + struct.pack("<I", 16) + layout
    body += b"data" + struct.pack("<I", stated) + samples + after
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body


@pytest.mark.parametrize("options", [{}, {"rf64": "always"}])
def test_wav_from_a_pipe_is_complete(tmp_path: Path, options: dict[str, str]) -> None:
    """``ffmpeg -f wav - > a.wav`` was refused as truncated: its header states 0xFFFFFFFF bytes."""
    path = through_pipe(tmp_path / "a.wav", tone(1.0, RATE), **options)
    filed = write_media(
        tmp_path / "b.wav", None, tone(1.0, RATE), audio_codec="pcm_s16le", audio_rate=RATE
    )
    assert load_audio(path).equal(load_audio(filed))
    assert probe(path).duration == 1.0
    assert load_audio(path, start=0.25, end=0.5).shape == (4_000,)


@pytest.mark.parametrize(
    "stated", [0, 0xFFFF_FFFF, 0xFFFF_FFFF - 36, 0xFFFF_F000, 0x8000_0000, 0x7FFF_FFFF, 0x7FFF_F000]
)
@pytest.mark.parametrize("samples", [1, 2_048, 10_001])
def test_stated_lengths_that_mean_unknown(tmp_path: Path, stated: int, samples: int) -> None:
    """What ffmpeg, sox, mplayer, arecord and Python's wave leave in a header to which they cannot
    seek back."""
    wave = np.arange(samples, dtype="<i2")
    (tmp_path / "a.wav").write_bytes(wav(wave.tobytes(), stated, riff=stated))
    found = load_audio(tmp_path / "a.wav")
    assert found.equal(torch.from_numpy(wave.astype(np.float32)) / 32_768)


@pytest.mark.parametrize("samples", [1, 2_048, 4_096, 10_001])
def test_truncated_wav(tmp_path: Path, samples: int) -> None:
    """Cut between two of libav's blocks it passed as complete."""
    (tmp_path / "a.wav").write_bytes(wav(bytes(2 * samples), 40_000))
    assert f"{2 * samples} bytes of audio, where the header states 40000" in refused(
        tmp_path / "a.wav", "audio"
    )


@pytest.mark.parametrize("after", [b"", b"LIST" + struct.pack("<I", 4) + b"INFO"])
def test_wav_without_a_sample(tmp_path: Path, after: bytes) -> None:
    (tmp_path / "a.wav").write_bytes(wav(b"", 0, after=after))
    refused(tmp_path / "a.wav", "audio")


def test_chunks_after_the_audio_are_not_audio(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(
        wav(bytes(2_000), 2_000, after=b"LIST" + struct.pack("<I", 4) + b"INFO")
    )
    assert load_audio(tmp_path / "a.wav").shape == (1_000,)


NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 4 * 48_000)).astype(np.float32)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp3", {"audio_codec": "libmp3lame"}),
        ("a.ogg", {"audio_codec": "libopus"}),
        ("a.aac", {}),
        ("a.aiff", {"audio_codec": "pcm_s16be"}),
        ("a.caf", {"audio_codec": "pcm_s16le"}),
        ("a.w64", {"audio_codec": "pcm_s16le"}),
        ("v.avi", {"audio_codec": "pcm_s16le"}),
        ("v.flv", {"audio_rate": 44_100}),
        ("v.gif", {"video_codec": "gif", "pixel_format": "rgb8"}),
        ("v.ts", {}),
    ],
)
def test_truncated(tmp_path: Path, name: str, options: dict[str, Any], share: float) -> None:
    """Half an mp3, ogg, aiff or gif was read as if it were complete."""
    path = tmp_path / name
    frames = numbered(16) if name[0] == "v" else None
    write_media(path, frames, None if name == "v.gif" else NOISE, **options)
    whole = path.read_bytes()
    size = int(share * len(whole))
    path.write_bytes(whole[: size + (size % 188 == 0)])
    message = refused(path, "video" if frames is not None else "audio")
    assert "truncated or broken" in message or "cannot read" in message


def test_mp3_without_a_stated_length_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    write_media(path, None, NOISE, audio_codec="libmp3lame", options={"write_xing": "0"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    # half of four seconds; a block is 1,152 samples at 48 kHz, 384 here
    assert load_audio(path).shape[0] == pytest.approx(2 * RATE, abs=3 * 384)


# --------------------------------------------------------------------------- not files


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.mp4",
        "https://example.org/a.wav?x=1",
        "file:///data/a.mp4",
        "s3://bucket/a.mp4",
        "data:image/png;base64,iVBORw0KGgo=",
    ],
)
@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_urls_are_not_read(url: str, modality: str) -> None:
    """A URL was reported as "no such file"."""
    assert "a URL, which is not read" in refused(url, modality)


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_pipes_and_devices_are_refused_unopened(tmp_path: Path, modality: str) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    assert "a pipe" in refused(tmp_path / "a.mp4", modality)
    assert "a device" in refused("/dev/zero", modality)
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    assert "symbolic links" in refused(tmp_path / "loop.mp4", modality)


def test_exhausted_memory_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a long clip torch raised a bare RuntimeError."""
    clip = write_media(tmp_path / "c.mp4", numbered(8))
    plain = torch.empty

    def enormous(*shape: Any, **keywords: Any) -> Any:
        # torch's own allocator raises for 128 PiB
        clip = isinstance(shape[0], tuple) and not keywords
        return plain(1 << 55) if clip else plain(*shape, **keywords)

    monkeypatch.setattr(torch, "empty", enormous)
    assert "memory of this machine" in refused(clip, "video")
