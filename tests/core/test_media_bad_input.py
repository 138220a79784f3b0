"""Files and stretches that cannot be used: one MediaError each, with a message that helps."""

from __future__ import annotations

import gzip
import logging
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from media_files import (
    SMALL,
    conversation,
    load_audio,
    load_video,
    lossless,
    numbered,
    refused,
    tone,
    write_media,
)

from omni_grpo_core.core.media import load_media, probe
from omni_grpo_core.errors import MediaError
from omni_grpo_core.types import MediaRef


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_no_file_directory_empty_text(tmp_path: Path, modality: str) -> None:
    assert "no such file" in refused(tmp_path / "nothing.mp4", modality)
    assert "a folder" in refused(tmp_path, modality)
    empty, text = tmp_path / "empty.mp4", tmp_path / "text.mp4"
    empty.touch()
    assert "0 bytes" in refused(empty, modality)
    text.write_text("This is not a clip.\n" * 100)
    assert "cannot read" in refused(text, modality)


@pytest.mark.parametrize("modality", ["video", "audio", "image"])
def test_a_gzip_file_is_named(tmp_path: Path, modality: str) -> None:
    (tmp_path / "c.mp4.gz").write_bytes(gzip.compress(b"clip"))
    assert "a gzip file, wanted a media file; unpack it" in refused(tmp_path / "c.mp4.gz", modality)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_media(tmp_path / "c.mp4", numbered(4))
    plain_open = os.open

    # root can read any file whatever its permissions, so the system's error is raised here
    def denied(path: str, *args: Any, **kwargs: Any) -> int:
        if path == str(clip):
            raise PermissionError(13, "Permission denied")
        return plain_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", denied)
    assert "Permission denied" in refused(clip, "video")


def test_index_missing(tmp_path: Path) -> None:
    """The index of an mp4 is at its end: an aborted download has none."""
    whole = write_media(tmp_path / "w.mp4", numbered(16), tone(2.0, 48_000)).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    for modality in ("video", "audio"):
        assert "cannot read" in refused(cut, modality)
    with pytest.raises(MediaError):
        probe(cut)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip.mp4", {"options": {"movflags": "faststart"}}),
        ("clip.mkv", {"audio_codec": "flac"}),
        ("clip.webm", {"video_codec": "libvpx-vp9", "audio_codec": "libopus"}),
        ("clip.wav", {"audio_codec": "pcm_s16le"}),
        ("clip.flac", {"audio_codec": "flac"}),
    ],
)
def test_truncated_in_the_middle(
    tmp_path: Path, name: str, options: dict[str, Any], share: float
) -> None:
    """libav silently reads such a file and delivers fewer frames."""
    clip = tmp_path / name
    frames = None if name.endswith(("wav", "flac")) else numbered(16)
    whole = write_media(clip, frames, tone(2.0, 48_000), **options).read_bytes()
    clip.write_bytes(whole[: int(share * len(whole))])
    assert "truncated or broken" in refused(clip, "audio")
    if frames is not None:
        assert "truncated or broken" in refused(clip, "video")
    with pytest.raises(MediaError):
        probe(clip)


def test_damaged_in_the_middle(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (16, 56, 84, 3), np.uint8)
    clip = write_media(tmp_path / "c.mp4", frames, options={"movflags": "faststart"})
    data = bytearray(clip.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4_000] = bytes(4_000)
    clip.write_bytes(data)
    refused(clip, "video")


def test_listed_as_what_it_is_not(tmp_path: Path) -> None:
    mute = write_media(tmp_path / "mute.mp4", numbered(8))
    sound = write_media(tmp_path / "s.wav", None, tone(1.0, 16_000), audio_codec="pcm_s16le")
    image = tmp_path / "i.png"
    PIL.Image.new("RGB", (56, 56)).save(image)
    assert "without video" in refused(sound, "video")
    assert "no audio track" in refused(mute, "audio")
    assert "cannot read as an image" in refused(mute, "image")
    assert "cannot read as an image" in refused(sound, "image")
    assert "not read as a clip or a recording" in refused(image, "video")
    assert "not read as a clip or a recording" in refused(image, "audio")


def test_terminal_art_is_not_a_clip(tmp_path: Path) -> None:
    """libav plays any .txt as a video of a terminal."""
    notes = tmp_path / "notes.txt"
    notes.write_text("a note\n" * 50)
    refused(notes, "video")


def test_interleaved_without_a_track(tmp_path: Path) -> None:
    mute = write_media(tmp_path / "mute.mp4", numbered(8))
    with pytest.raises(MediaError, match="no audio track"):
        load_media(conversation(MediaRef("video", str(mute)), audio_in_video="interleaved"), SMALL)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0.5, 0.5),
        (0.8, 0.2),
        (-0.1, 0.5),
        (1.0, 2.0),
        (5.0, 6.0),
        (0.0, 1.2),
        (math.nan, 1.0),
        (0.0, math.nan),
        (0.0, math.inf),
        (0.0, 0.0),
    ],
)
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_stretch_outside_the_file(tmp_path: Path, modality: str, start: float, end: float) -> None:
    clip = write_media(tmp_path / "c.mkv", numbered(8), tone(1.0, 48_000), audio_codec="flac")
    assert "the stretch from" in refused(clip, modality, start=start, end=end)


def test_empty_stretch(tmp_path: Path) -> None:
    clip = write_media(tmp_path / "c.mkv", numbered(8), tone(3.0, 48_000), audio_codec="flac")
    assert "no frame from 2.0 to 2.5" in refused(clip, "video", start=2.0, end=2.5)
    assert load_audio(clip, start=2.0, end=2.5).shape == (8_000,)


def test_image_with_a_stretch(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (56, 56)).save(tmp_path / "i.png")
    assert "without start and end" in refused(tmp_path / "i.png", "image", end=1.0)


def png_that_claims(width: int, height: int, image: Path) -> Path:
    """A PNG of a few bytes whose header states this size."""
    PIL.Image.new("1", (8, 8)).save(image)
    data = image.read_bytes()
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    image.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    return image


def test_image_bomb(tmp_path: Path) -> None:
    assert "absurdly large" in refused(png_that_claims(60_000, 60_000, tmp_path / "a.png"), "image")
    # one that Pillow itself would only warn about
    bomb = png_that_claims(10_000, 9_000, tmp_path / "b.png")
    assert "10000 x 9000 pixels" in refused(bomb, "image")


def test_slivers(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (2_010, 10)).save(tmp_path / "i.png")
    assert "2010 x 10 pixels" in refused(tmp_path / "i.png", "image")
    PIL.Image.new("RGB", (1_900, 10)).save(tmp_path / "j.png")
    # within the library's ratio, but at 4,704 pixels in all its ten rows shrink to none
    assert "1900 x 10 pixels" in refused(tmp_path / "j.png", "image")
    clip = lossless(tmp_path / "c.mkv", numbered(4, 2, 500))
    assert "500 x 2 pixels" in refused(clip, "video")


def test_truncated_image(tmp_path: Path) -> None:
    image = tmp_path / "i.png"
    noise = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    PIL.Image.fromarray(noise).save(image)
    image.write_bytes(image.read_bytes()[:2_000])
    assert "cannot read as an image" in refused(image, "image")


def test_non_finite_samples(tmp_path: Path) -> None:
    wave = tone(0.1, 16_000)
    wave[0, 100] = np.nan
    path = write_media(tmp_path / "n.wav", None, wave, audio_codec="pcm_f32le", audio_rate=16_000)
    assert "non-finite samples" in refused(path, "audio")


def test_odd_names_are_only_names(tmp_path: Path) -> None:
    for name in ("a:b.mp4", "50%d off.mp4", "-i.mp4", "клип 1.mp4", "pipe:0.mp4"):
        clip = write_media(tmp_path / "c.mp4", numbered(4)).rename(tmp_path / name)
        assert load_video(clip).frames.shape[0] == 4


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_media(tmp_path / "c.mp4", numbered(4))
    monkeypatch.chdir(tmp_path)
    assert load_video(Path("c.mp4")).frames.shape[0] == 4


def test_pillow_is_kept_from_printing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "i.tiff"
    PIL.Image.new("RGB", (8, 8)).save(image)
    entry = struct.pack("<HHII", 277, 3, 1, 3)  # three samples per pixel
    assert entry in image.read_bytes()
    image.write_bytes(image.read_bytes().replace(entry, struct.pack("<HHII", 277, 3, 1, 191)))
    logging.getLogger().handlers, handlers = [], logging.getLogger().handlers
    try:
        refused(image, "image")
    finally:
        logging.getLogger().handlers = handlers
    assert capfd.readouterr() == ("", "")
