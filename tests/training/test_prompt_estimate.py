from __future__ import annotations

import logging
import struct
import wave
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from media_files import tone, trimmed, write_media
from qwen_omni_utils.v2_5 import vision_process

from omni_grpo_core import tiny
from omni_grpo_core.core.media import load_media, probe
from omni_grpo_core.core.media_config import MediaConfig
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.pipeline.inputs import Inputs
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.training import prompt_estimate
from omni_grpo_core.training.headers import Header, VideoTrack, image_size, read_header
from omni_grpo_core.training.prompt_estimate import (
    check_prompt_limit,
    prompt_sizes,
    resized_tokens,
    token_shape,
)
from omni_grpo_core.types import Conversation, MediaPart, MediaRef, Message, Sample

SHAPE = token_shape(tiny.checkpoint_dir())


def least_media_tokens(*given: Any) -> tuple[int, ...]:
    return tuple(size.media for size in prompt_sizes(*given))


def test_what_is_seen_heard_and_read_is_counted_apart() -> None:
    """The words of the prompt are added to the question: four bytes a token."""
    found, longer = prompt_sizes(
        [sample(), replace(sample(), question="What?" + "é" * 20)], Settings(), SHAPE
    )
    assert (found.vision, found.sound, found.media) == (0, 0, 0)
    assert longer.text == found.text + 10
    assert found.total == found.text > 5


def sample(*media: MediaRef) -> Sample:
    return Sample("s", "What?", "free-form", (), "<answer>x</answer>", media, "here:1")


def frames(count: int, height: int = 56, width: int = 84) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, height, width, 3), np.uint8)


def test_the_header_of_an_mp4_states_what_the_decoder_finds(tmp_path: Path) -> None:
    sound = np.zeros((1, 2 * 16_000), np.float32)
    path = write_media(tmp_path / "clip.mp4", frames(20), fps=10, audio=sound, audio_rate=16_000)
    header = read_header(path)
    assert header is not None
    assert header.video is not None
    assert (header.video.frames, header.video.width, header.video.height) == (20, 84, 56)
    assert header.video.seconds == pytest.approx(2.0)
    # AAC comes in blocks of 1024 samples, 64 ms
    assert header.audio_seconds == pytest.approx(probe(path).duration, abs=0.15)


def test_the_header_of_a_wav(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(4 * 12_000))
    assert read_header(path) == Header(audio_seconds=1.5)


def box(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


FTYP = box(b"ftyp", b"isom\0\0\0\0")
NESTED = b"".join(struct.pack(">I4s", 8 * (3000 - depth), b"moov") for depth in range(3000))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"RIFF",
        b"RIFF0000WAVEjunk",
        b"\0\0\0\x08ftyp",
        b"\0\0\0\x0cftypisom\0\0\0\x08moov",
        b"\0\0\0\x0cftypisom" + b"\0\0\0\x10moov\0\0\0\x08trak",
        b"OggS" * 9,
        # the parser recursed for every nested box, and ended in a RecursionError
        pytest.param(FTYP + NESTED, id="moov within moov, 3000 deep"),
        pytest.param(FTYP + box(b"free") * 20_000, id="boxes without end"),
        # its content was -7 bytes long, which read the whole file
        pytest.param(FTYP + struct.pack(">I4sQ", 1, b"mdat", 9), id="shorter than its own length"),
        pytest.param(b"RIFF\xff\xff\xff\xffWAVE" + b"junk\0\0\0\0" * 20_000, id="chunks"),
    ],
)
def test_other_files_give_nothing_and_raise_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(content)
    assert read_header(path) is None
    assert read_header(tmp_path / "not-there.mp4") is None


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of 20 frames, with sound."""
    folder = tmp_path_factory.mktemp("headers")
    return write_media(folder / "clip.mp4", frames(20), tone(2, 16_000), fps=10, audio_rate=16_000)


def changed(clip: Path, folder: Path, change: Callable[[bytes], bytes]) -> Path:
    path = folder / "changed.mp4"
    path.write_bytes(change(clip.read_bytes()))
    return path


@pytest.mark.parametrize("name", ["mdhd", "stsd", "stsz", "stts", "mvhd", "hdlr", "trak", "moov"])
def test_an_mp4_that_lacks_a_box_gives_nothing(name: str, clip: Path, tmp_path: Path) -> None:
    """A KeyError ended the command as an internal error; the media stage reports what is wrong."""
    path = changed(clip, tmp_path, lambda body: body.replace(name.encode(), b"xxxx"))
    assert read_header(path) is None


@pytest.mark.parametrize("name", ["mdhd", "stsd", "stsz", "stts", "elst", "mvhd", "hdlr"])
@pytest.mark.parametrize("kept", [0, 6, 11, 20])
def test_a_truncated_box_gives_no_more_than_it_holds(
    name: str, kept: int, clip: Path, tmp_path: Path
) -> None:
    """A box without content was an IndexError; the rest is hidden in a box that is skipped."""

    def cut(body: bytes) -> bytes:
        at = body.index(name.encode()) - 4
        (size,) = struct.unpack_from(">I", body, at)
        rest = size - 8 - kept
        if rest < 8:
            return body.replace(name.encode(), b"xxxx")
        short = box(name.encode(), body[at + 8 : at + 8 + kept])
        return body[:at] + short + box(b"free", bytes(rest - 8)) + body[at + size :]

    header = read_header(changed(clip, tmp_path, cut)) or Header()
    video = header.video or VideoTrack(0, 0.0, 0.0)
    assert video.frames <= 20
    assert max(video.seconds, header.audio_seconds) <= 2.2


@pytest.mark.parametrize("share", [0.2, 0.9, 0.99])
def test_a_truncated_mp4_gives_nothing(share: float, clip: Path, tmp_path: Path) -> None:
    """The header at the front listed frames that were missing."""
    front = write_media(
        tmp_path / "front.mp4", frames(20), fps=10, options={"movflags": "faststart"}
    )
    for whole in (clip, front):
        path = changed(whole, tmp_path, lambda body: body[: int(len(body) * share)])
        assert read_header(path) is None


def test_a_clip_without_pixels_gives_nothing(clip: Path, tmp_path: Path) -> None:
    """Its scale factor was a division by its area, 0."""
    size = struct.pack(">HH", 84, 56)
    path = changed(clip, tmp_path, lambda body: body.replace(size, bytes(4)))
    assert read_header(path) is None


def test_a_length_of_all_ones_is_unknown(clip: Path, tmp_path: Path) -> None:
    """It means "unknown" (ISO/IEC 14496-12, 8.4.2.3), and was read as days of video: the time table
    still has the real length."""

    def unknown(body: bytes) -> bytes:
        parts = body.split(b"mdhd")
        return b"mdhd".join([parts[0], *(p[:16] + b"\xff" * 4 + p[20:] for p in parts[1:])])

    header = read_header(changed(clip, tmp_path, unknown))
    assert header is not None
    assert header.video is not None
    assert header.video.frames == 20
    assert header.video.seconds == pytest.approx(2.0)
    assert header.audio_seconds < 2.2


@given(st.binary(max_size=120))
def test_a_damaged_mp4_raises_nothing(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.mp4"
    path.write_bytes(b"\0\0\0\x0cftypisom" + tail)
    read_header(path)


@pytest.mark.parametrize("stated", [0xFFFF_FFFF, 0x7FFF_FFFF, 0x7FFF_F000, 100_000, 48_000, 10, 0])
def test_a_wav_is_no_longer_than_its_file(stated: int, tmp_path: Path) -> None:
    """A recording written into a pipe states 0xFFFFFFFF bytes, which were believed: 37 hours of
    sound, and the run was refused for lack of memory."""
    samples = bytes(48_000)  # 1.5 s
    layout = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)
    head = b"RIFF" + struct.pack("<I", 0xFFFF_FFFF) + b"WAVEfmt " + struct.pack("<I", 16) + layout
    path = tmp_path / "piped.wav"
    path.write_bytes(head + b"data" + struct.pack("<I", stated) + samples)
    header = read_header(path)
    assert header is not None
    assert header.audio_seconds == min(stated, 48_000) // 2 / 16_000


@pytest.mark.parametrize(
    ("begin", "asked", "seconds"),
    [(0.0, 2.0, 2.0), (0.5, 1.5, 1.5), (0.5, 0.5, 0.5), (1.5, 2.0, 0.5), (0.0, 0.05, 0.05)],
)
def test_only_the_part_of_a_trimmed_clip_that_is_shown_counts(
    begin: float, asked: float, seconds: float, clip: Path, tmp_path: Path
) -> None:
    """A clip trimmed with ``-c copy`` keeps what precedes its beginning in the file, and an edit
    list that hides it. All of it was counted, and the clip was refused as too long."""
    path = changed(clip, tmp_path, lambda body: trimmed(body, begin, asked))
    header = read_header(path)
    assert header is not None
    assert header.video is not None
    assert header.video.seconds == pytest.approx(seconds)
    assert header.video.frames == int(seconds * 10)
    assert header.audio_seconds == pytest.approx(seconds, abs=0.1)  # a block of AAC or two
    if begin + asked <= 2:
        alone = sample(MediaRef("video", str(path)))
        (found,) = least_media_tokens([alone], Settings(audio_in_video="off"), SHAPE)
        assert found <= shown_tokens(alone.media[0])


def shown_tokens(ref: MediaRef) -> int:
    """Tokens of the frames that the media stage returns."""
    media = load_media(Conversation("s", (Message("user", (MediaPart(ref, False),)),), "off"))
    (video,) = media.videos
    return video.frames.shape[0] // 2 * video.frames[0, 0].numel() // 28**2


UNEVEN = [*range(0, 1000, 50), 5000, 9000, 9100, 9200, 9300]


@pytest.mark.parametrize(
    ("start", "end"), [(None, None), (0.0, 1.0), (1.0, 9.2), (4.0, 6.0), (5.5, None), (None, 5.5)]
)
@pytest.mark.parametrize("times", [None, UNEVEN], ids=["even", "uneven"])
def test_a_stretch_counts_no_more_frames_than_are_in_it(
    times: list[int] | None, start: float | None, end: float | None, tmp_path: Path
) -> None:
    """Frames were assumed to be evenly spaced: with 20 of 25 in the first second, a later stretch
    of eight seconds was estimated to have 21."""
    count = 100 if times is None else len(times)
    path = write_media(tmp_path / "clip.mp4", frames(count), fps=10, times_ms=times)
    ref = MediaRef("video", str(path), start, end)
    (found,) = least_media_tokens([sample(ref)], Settings(audio_in_video="off"), SHAPE)
    true = shown_tokens(ref)
    assert found <= true
    assert times is not None or found >= 0.8 * true


def test_sound_that_ends_before_the_stretch_counts_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stretch was counted by its share of the file, even if the sound had ended before it."""
    header = Header(VideoTrack(1800, 60.0, 30.0, 640, 360), 20.0)
    monkeypatch.setattr(prompt_estimate, "read_header", lambda path: header)
    late = sample(MediaRef("audio", "clip.mp4", 30.0, 60.0))
    assert least_media_tokens([late], Settings(), SHAPE) == (0,)


def odd_apng(path: Path) -> None:
    """An animated PNG that states 0 frames."""
    PIL.Image.new("L", (30, 20)).save(path)
    body = path.read_bytes()
    chunk = b"acTL" + bytes(8)
    length, check = (struct.pack(">I", number) for number in (8, zlib.crc32(chunk)))
    path.write_bytes(body[:33] + length + chunk + check + body[33:])


def odd_exif(path: Path) -> None:
    PIL.Image.new("L", (30, 20)).save(path, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")


IMAGES: dict[str, tuple[Callable[[Path], object], tuple[int, int] | None]] = {
    "of 90 million pixels": (lambda path: PIL.Image.new("1", (9500, 9500)).save(path), None),
    "of 180 million pixels": (lambda path: PIL.Image.new("1", (18_000, 10_000)).save(path), None),
    "with odd EXIF": (odd_exif, (30, 20)),
    "with no picture": (odd_apng, (30, 20)),
    # its reader divides by the resolution
    "EMF of nothing": (
        lambda path: path.write_bytes(
            b"\1\0\0\0" + struct.pack("<I", 108) + bytes(32) + b" EMF" + bytes(100)
        ),
        None,
    ),
    "nonsense": (lambda path: path.write_bytes(b"nonsense"), None),
    "none": (lambda path: None, None),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_s_header_is_read_silently(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Pillow's warnings went to stderr, and what its parsers raise ended the command as an internal
    error."""
    make, size = IMAGES[name]
    path = tmp_path / "x.png"
    make(path)
    assert image_size(path) == size
    assert not recwarn.list
    assert capsys.readouterr().err == ""
    assert logging.getLogger("PIL").hasHandlers()


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


def test_it_is_a_lower_bound_and_a_useful_one(
    inputs: Inputs, samples: tuple[Sample, ...], settings: Settings
) -> None:
    """Every shipped row, compared with its real placeholders: clips in every audio mode, images,
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
    """The incident's prompt limit of 2048. 60 s at 2 frames per second, less the twentieth that is
    not relied on: 114 frames, 57 pairs of 640 x 360 pixels, each 23 x 13 tokens: 17,043. The sound,
    interleaved: 5,700 mel frames, 1,425 tokens."""
    clip = Header(VideoTrack(1800, 60.0, 30.0, 640, 360), 60.0)
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
