"""Media that are broken, have lying headers, or are odd but valid, and paths that are not media.

A few cases go through the command; the others are read by ``load_media`` in a separate process,
forked like the runner's: the command reads media only through that function.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
from media_files import numbered, tone, write_media
from reading import read
from runner import Case, Outcome, check_case, forked

from omni_grpo_core.types import Modality

READ, REFUSED, EITHER = (0,), (2,), (0, 2)


@dataclass(frozen=True)
class Medium:
    """``write`` makes the file in a folder and returns its path. ``codes``: 0 if it should be read,
    2 if refused; both where damage may go unnoticed. ``words``: in the message."""

    name: str
    modality: Modality
    write: Callable[[Path], Path | str]
    codes: tuple[int, ...] = REFUSED
    words: str = ""

    def __str__(self) -> str:
        return self.name


# --------------------------------------------------------------------------- whole files

NOISE = np.random.default_rng(0).integers(0, 256, (8, 32, 48, 3), np.uint8)
SOUND = np.random.default_rng(1).uniform(-0.5, 0.5, (2, 48_000)).astype(np.float32)

FORMATS: dict[str, dict[str, Any]] = {
    "v.mp4": {"options": {"movflags": "faststart"}},
    "v.mov": {"video_codec": "png", "pixel_format": "rgba"},
    "v.mkv": {"audio_codec": "flac"},
    "v.webm": {"video_codec": "libvpx-vp9", "audio_codec": "libopus"},
    "v.avi": {"audio_codec": "pcm_s16le"},
    "v.ts": {},
    "v.flv": {"audio_rate": 44_100},
    "v.gif": {"video_codec": "gif", "pixel_format": "rgb8"},
    "a.wav": {"audio_codec": "pcm_s16le"},
    "a.flac": {"audio_codec": "flac"},
    "a.mp3": {"audio_codec": "libmp3lame"},
    "a.ogg": {"audio_codec": "libopus"},
    "a.m4a": {},
    "a.aiff": {"audio_codec": "pcm_s16be"},
    "a.caf": {"audio_codec": "pcm_s16le"},
    "a.w64": {"audio_codec": "pcm_s16le"},
}


@cache
def whole(name: str) -> bytes:
    with TemporaryDirectory() as folder:
        frames = NOISE if name[0] == "v" else None
        sound = None if name == "v.gif" else SOUND[:, :44_100] if name == "v.flv" else SOUND
        return write_media(Path(folder) / name, frames, sound, **FORMATS[name]).read_bytes()


def _kind(name: str) -> Modality:
    return "video" if name[0] == "v" else "audio"


def made_of(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(change(whole(name)))
        return folder / name

    return write


def put(offset: int | bytes, data: bytes, *, beyond: int = 0) -> Callable[[bytes], bytes]:
    """``data`` overwrites the bytes at an offset, or ``beyond`` the first occurrence of a name."""

    def change(content: bytes) -> bytes:
        at = content.index(offset) + beyond if isinstance(offset, bytes) else offset
        return content[:at] + data + content[at + len(data) :]

    return change


# --------------------------------------------------------------------------- cut and damaged


def _cut() -> Iterator[Medium]:
    for name in FORMATS:
        for share in (0.02, 0.35, 0.7):

            def cut(content: bytes, share: float = share) -> bytes:
                size = int(share * len(content))
                return content[: size + (size % 188 == 0)]

            yield Medium(f"{name} cut at {share:.0%}", _kind(name), made_of(name, cut))


def _damaged() -> Iterator[Medium]:
    def zeroed(content: bytes) -> bytes:
        middle = len(content) // 2
        return content[:middle] + bytes(2_000) + content[middle + 2_000 :]

    def noisy(content: bytes) -> bytes:
        bits = np.frombuffer(content, np.uint8).copy()
        bits[np.random.default_rng(2).integers(0, len(bits), 40)] ^= 0x55
        return bits.tobytes()

    for name in FORMATS:
        yield Medium(f"{name} with a part zeroed", _kind(name), made_of(name, zeroed), EITHER)
        yield Medium(f"{name} with wrong bytes", _kind(name), made_of(name, noisy), EITHER)


# --------------------------------------------------------------------------- headers that lie


def _lying() -> Iterator[Medium]:
    top = struct.pack(">I", 0xFFFF_FFFF)
    fields = {
        # in an mp4: bytes beyond the name of the box, and what is written there
        "timescale 0": (b"mvhd", 16, bytes(4)),
        "timescale 2^32 - 1": (b"mvhd", 16, top),
        "duration 2^32 - 1": (b"mvhd", 20, top),
        "track duration 2^32 - 1": (b"mdhd", 20, top),
        "track timescale 0": (b"mdhd", 16, bytes(4)),
        "track timescale 1e9": (b"mdhd", 16, struct.pack(">I", 10**9)),
        "2^32 - 1 sample times": (b"stts", 8, top),
        "sample time 2^32 - 1": (b"stts", 16, top),
        "2^32 - 1 samples": (b"stsz", 12, top),
        "samples of 2^32 - 1 bytes": (b"stsz", 8, top),
        "2^32 - 1 chunks": (b"stco", 8, top),
        "a chunk beyond the end": (b"stco", 12, top),
        "65535 x 65535 pixels": (b"avc1", 28, b"\xff" * 4),
        "0 x 0 pixels": (b"avc1", 28, bytes(4)),
        "an edit of 2^32 - 1": (b"elst", 12, top),
        "an edit that begins at -2^31": (b"elst", 16, b"\x80\0\0\0"),
        "an unknown codec": (b"avc1", 0, b"zzzz"),
        "a box of 2^32 - 1 bytes": (b"moov", -4, top),
        "a box of 0 bytes": (b"trak", -4, bytes(4)),
    }
    for what, (box, beyond, data) in fields.items():
        change = put(box, data, beyond=beyond)
        yield Medium(f"mp4 that states {what}", "video", made_of("v.mp4", change), EITHER)
    # in a wav: offsets into its first 44 bytes
    stated: dict[str, tuple[int, bytes]] = {
        "0 channels": (22, bytes(2)),
        "65535 channels": (22, b"\xff\xff"),
        "a rate of 0": (24, bytes(4)),
        "a rate of 1, three gigabytes at 16 kHz,": (24, struct.pack("<I", 1)),
        "a rate of 2^32 - 1": (24, b"\xff" * 4),
        "0 bits": (34, bytes(2)),
        "7 bits": (34, struct.pack("<H", 7)),
        "65535 bits": (34, b"\xff\xff"),
        "blocks of 0 bytes": (32, bytes(2)),
        "an unknown codec": (20, struct.pack("<H", 0x7777)),
        "a format of 2^32 - 1 bytes": (16, b"\xff" * 4),
    }
    for what, (offset, data) in stated.items():
        yield Medium(
            f"wav that states {what}", "audio", made_of("a.wav", put(offset, data)), EITHER
        )


# --------------------------------------------------------------------------- sound


def _channels() -> Iterator[Medium]:
    for count in (3, 8, 9, 16, 64, 65, 255):
        content = _wav(np.zeros((100, count), "<i2"))

        def write(folder: Path, content: bytes = content) -> Path:
            (folder / "a.wav").write_bytes(content)
            return folder / "a.wav"

        codes, words = (READ, "") if count <= 64 else (REFUSED, f"{count} audio channels")
        yield Medium(f"{count} channels", "audio", write, codes, words)

    def surround(folder: Path) -> Path:
        return write_media(folder / "v.mp4", NOISE, tone(1.0, 48_000, channels=8))

    yield Medium("a clip of 8 channels", "audio", surround, READ)


def _wav(samples: np.ndarray, rate: int = 16_000) -> bytes:
    count = samples.shape[1]
    layout = struct.pack("<HHIIHH", 1, count, rate, 2 * count * rate, 2 * count, 16)
    data = samples.tobytes()
    body = b"WAVEfmt " + struct.pack("<I", 16) + layout + b"data" + struct.pack("<I", len(data))
    return b"RIFF" + struct.pack("<I", len(body) + len(data)) + body + data


# --------------------------------------------------------------------------- odd clips


def _clip(name: str, frames: np.ndarray = NOISE, **options: Any) -> Callable[[Path], Path]:
    return lambda folder: write_media(folder / name, frames, **options)


def _two_sizes(folder: Path) -> Path:
    with av.open(str(folder / "v.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        for number, side in enumerate((64, 64, 32, 32)):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width = encoder.height = side
            encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, 8)
            picture = av.VideoFrame.from_ndarray(numbered(1, side, side)[0], format="rgb24")
            for packet in [*encoder.encode(picture), *encoder.encode(None)]:
                packet.stream, packet.time_base = stream, Fraction(1, 8)
                packet.pts = packet.dts = number
                container.mux(packet)
    return folder / "v.avi"


def _odd() -> Iterator[Medium]:
    exact: dict[str, Any] = {"video_codec": "ffv1", "pixel_format": "bgr0"}
    whole_clips = {
        "10 bits": _clip("v.mkv", pixel_format="yuv420p10le"),
        "4:4:4": _clip("v.mkv", pixel_format="yuv444p"),
        "grey": _clip("v.mkv", video_codec="ffv1", pixel_format="gray"),
        "16 bits a channel": _clip("v.mkv", video_codec="ffv1", pixel_format="rgb48le"),
        "alpha": _clip("v.mov", video_codec="png", pixel_format="rgba"),
        "a quarter turn": _clip("v.mp4", rotation=90),
        "a mirror": _clip("v.mp4", hflip=True, rotation=0),
        "one frame": _clip("v.mp4", NOISE[:1]),
        "one pixel": _clip("v.mkv", NOISE[:, :1, :1], **exact),
        "odd sides": _clip("v.mkv", NOISE[:, :31, :47], **exact),
        "a billion frames a second": _clip("v.mkv", fps=1_000_000_000, **exact),
        "a second a frame": _clip("v.mkv", fps=1, **exact),
        "thirty years of one frame": _clip("v.mkv", times_ms=[*range(7), 10**12], **exact),
        "times below zero": _clip("v.mkv", times_ms=[*range(-700, 100, 100)], **exact),
        "times of weeks": _clip("v.mkv", times_ms=[10**10 + 100 * i for i in range(8)], **exact),
        "a late track": _clip("v.mkv", audio=SOUND, audio_starts=30, audio_codec="flac"),
    }
    for what, write in whole_clips.items():
        yield Medium(f"a clip of {what}", "video", write, READ)
    yield Medium("frames that change size", "video", _two_sizes, REFUSED, "change size")
    sliver = _clip("v.mkv", NOISE[:, :1, :48], **exact)
    yield Medium("a clip of one line", "video", sliver, EITHER)
    weeks = _clip("v.mkv", audio=SOUND, audio_starts=10**7, audio_codec="flac")
    yield Medium("a track that starts after months", "audio", weeks, REFUSED, "without sound in")


def _bomb(folder: Path) -> Path:
    """A few kilobytes that decode to two frames of 27 MB."""
    frames = np.broadcast_to(np.zeros((1, 1, 1, 3), np.uint8), (2, 3_000, 3_000, 3))
    return write_media(folder / "v.mp4", frames)


# --------------------------------------------------------------------------- images, and no files


def _images() -> Iterator[Medium]:
    def saved(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            PIL.Image.fromarray(NOISE[0]).save(folder / name)
            (folder / name).write_bytes(change((folder / name).read_bytes()))
            return folder / name

        return write

    for name in ("i.png", "i.jpg", "i.webp", "i.tiff", "i.bmp"):
        yield Medium(f"{name} cut", "image", saved(name, lambda c: c[: len(c) // 2]))
        yield Medium(f"{name} of 9 bytes", "image", saved(name, lambda c: c[:9]))
    huge = put(16, struct.pack(">II", 2**31 - 1, 2**31 - 1))
    yield Medium("a png that states 2^31 x 2^31 pixels", "image", saved("i.png", huge))
    none = put(16, bytes(8))
    yield Medium("a png that states no pixels", "image", saved("i.png", none))
    sliver = saved("i.png", lambda c: c)
    yield Medium("a whole png", "image", sliver, READ)


def _paths() -> Iterator[Medium]:
    def text(folder: Path) -> Path:
        (folder / "a.mp4").write_text("not a clip\n" * 50)
        return folder / "a.mp4"

    def empty(folder: Path) -> Path:
        (folder / "a.mp4").touch()
        return folder / "a.mp4"

    def pipe(folder: Path) -> Path:
        os.mkfifo(folder / "a.mp4")
        return folder / "a.mp4"

    def loop(folder: Path) -> Path:
        (folder / "a.mp4").symlink_to("a.mp4")
        return folder / "a.mp4"

    def playlist(folder: Path) -> Path:
        (folder / "a.m3u8").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n")
        return folder / "a.m3u8"

    def list_of_files(folder: Path) -> Path:
        (folder / "a.ffconcat").write_text("ffconcat version 1.0\nfile /etc/passwd\n")
        return folder / "a.ffconcat"

    writers: dict[str, tuple[Callable[[Path], Path | str], str]] = {
        "no file": (lambda folder: folder / "none.mp4", "no such file"),
        "a folder": (lambda folder: folder, "a folder"),
        "an empty file": (empty, "0 bytes"),
        "a text": (text, "found"),
        "a pipe": (pipe, "a pipe"),
        "/dev/zero": (lambda folder: "/dev/zero", "a device"),
        "a link to itself": (loop, "symbolic links"),
        "a name of 5,000 letters": (lambda folder: "x" * 5_000, "too long"),
        "a name with a NUL": (lambda folder: "a\0.mp4", "null"),
        "a playlist": (playlist, "found"),
        "a list of files": (list_of_files, "found"),
        "http": (lambda folder: "http://127.0.0.1:9/a.mp4", "a URL, which is not read"),
        "https": (lambda folder: "https://127.0.0.1:9/a.wav?b=c", "a URL, which is not read"),
        "file:": (lambda folder: f"file://{folder}/a.mp4", "a URL, which is not read"),
        "s3": (lambda folder: "s3://bucket/a.mp4", "a URL, which is not read"),
        "a data URL": (lambda folder: "data:video/mp4;base64,AAAA", "a URL, which is not read"),
    }
    modalities: tuple[Modality, ...] = ("video", "audio", "image")
    for number, (what, (write, words)) in enumerate(writers.items()):
        yield Medium(f"{what} as a medium", modalities[number % 3], write, REFUSED, words)


MEDIA = (
    *_cut(),
    *_damaged(),
    *_lying(),
    *_channels(),
    *_odd(),
    Medium("few bytes of many pixels", "video", _bomb, READ),
    *_images(),
    *_paths(),
)


@pytest.mark.parametrize("medium", MEDIA, ids=str)
def test_is_read_or_refused(
    medium: Medium, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    given, errors = tmp_path / "given", tmp_path / "stderr"
    given.mkdir()
    path = str(medium.write(given))
    code = forked(read, (medium.modality, path, errors), limit=120.0)
    outcome = Outcome(code, "", errors.read_text(encoding="utf-8") if errors.exists() else "")
    record_property("robustness", outcome.ending)
    assert outcome.ending in [f"exit {code}" for code in medium.codes], outcome
    if code == 2:
        assert outcome.stderr.count("\n") == 1, outcome
        assert all(part in outcome.stderr for part in (": found ", ", wanted ", "; ")), outcome
        assert medium.words in outcome.stderr, outcome


# --------------------------------------------------------------------------- by the command


def _rows(folder: Path, *files: tuple[Modality, str]) -> Sequence[object]:
    rows = [
        {
            "problem": "What?",
            "data_type": kind,
            "problem_type": "free-form",
            "solution": "<answer>x</answer>",
            "path": name,
        }
        for kind, name in files
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return ["check", "--data", "rows.json"]


def _row_of(medium: Medium) -> Callable[[Path], Sequence[object]]:
    return lambda folder: _rows(folder, (medium.modality, Path(medium.write(folder)).name))


def _url(folder: Path) -> Sequence[object]:
    return _rows(folder, ("video", "http://127.0.0.1:9/a.mp4"))


def _one_sample(folder: Path) -> Sequence[object]:
    (folder / "a.wav").write_bytes(_wav(np.zeros((1, 1), "<i2")))
    return _rows(folder, ("audio", "a.wav"))


COMMANDS = (
    *(
        Case(f"check of {medium}", _row_of(medium), words=(medium.words,))
        for medium in MEDIA
        if medium.name in ("v.mp4 cut at 35%", "a.mp3 cut at 70%", "255 channels")
    ),
    Case("check of a URL", _url, words=("URL",)),
    Case("check of one sample of sound", _one_sample, words=("too short",)),
)


@pytest.mark.parametrize("case", COMMANDS, ids=str)
def test_ends_as_it_should(
    case: Case, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check_case(case, tmp_path, record_property)
