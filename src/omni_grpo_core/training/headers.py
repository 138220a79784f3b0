"""What a media file's header states: length and size, without decoding anything.

Reads MP4 and its relatives (ISO/IEC 14496-12) and WAV in plain Python, so that a configuration can
be compared with its data before a decoder or torch is loaded; Pillow reads the headers of images.
The result is a lower bound of what the media stage will find, or nothing: what is wrong with a
broken file is reported by that stage.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

_CONTAINERS = frozenset((b"moov", b"trak", b"edts", b"mdia", b"minf", b"stbl"))
_TABLES = frozenset((b"stts", b"elst"))
_MAX_BOXES = 10_000  # no real header has more
_MAX_TABLE = 1 << 20  # bytes: an hour of frames, each with a duration of its own
_WAV_HEAD = 1 << 16  # bytes within which a recording's samples must begin

# Pillow logs what it then raises; without a logging configuration Python prints that to stderr
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class VideoTrack:
    """``frames`` over ``seconds``, of ``width`` and ``height`` in pixels. ``rate``: the lowest
    frames per second in the track; 0 if it is unknown when which frame is shown."""

    frames: int
    seconds: float
    rate: float
    width: int = 0
    height: int = 0


@dataclass(frozen=True, slots=True)
class Header:
    """``video``: ``None`` without such a track. ``audio_seconds``: length of the sound; 0 without
    any. With several tracks of a kind, the least of each value."""

    video: VideoTrack | None = None
    audio_seconds: float = 0.0


def read_header(path: str | Path) -> Header | None:
    """``None`` for a file that cannot be read, is truncated or broken, or has another format."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(12)
            if start[4:8] == b"ftyp":
                return _mp4(file)
            return _wav(file) if start[:4] == b"RIFF" and start[8:] == b"WAVE" else None
    except (OSError, ValueError, EOFError, LookupError, ArithmeticError, struct.error, wave.Error):
        return None


def image_size(path: str | Path) -> tuple[int, int] | None:
    """Width and height; ``None`` for what Pillow cannot open, or takes for a decompression bomb."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.size if min(image.size) > 0 else None
    except Exception:  # forty formats' parsers raise whatever they like
        return None


def _wav(file: BinaryIO) -> Header:
    """A length beyond the file's end is not trusted: the file was streamed or truncated."""
    file.seek(0)
    head = io.BytesIO(file.read(_WAV_HEAD))
    size = file.seek(0, io.SEEK_END)
    with wave.open(head) as sound:
        there = (size - head.tell()) // (sound.getnchannels() * sound.getsampwidth())
        return Header(audio_seconds=min(sound.getnframes(), there) / sound.getframerate())


# --------------------------------------------------------------------------- mp4

_Boxes = dict[bytes, bytes]


def _mp4(file: BinaryIO) -> Header | None:
    movie: _Boxes = {}
    tracks: list[_Boxes] = []
    for name, content in _boxes(file, file.seek(0, io.SEEK_END)):
        if name == b"trak":
            tracks.append({})
        # QuickTime has a second hdlr, for how the data are stored
        (movie if name == b"mvhd" or not tracks else tracks[-1]).setdefault(name, content)
    kinds = [(boxes.get(b"hdlr", b"")[8:12], boxes) for boxes in tracks]
    pictures = [boxes for kind, boxes in kinds if kind == b"vide"]
    sounds = [_track(boxes, movie) for kind, boxes in kinds if kind == b"soun"]
    heard = min((sound.seconds for sound in sounds), default=0.0)
    if not pictures:
        return Header(audio_seconds=heard) if sounds else None
    shown = [_track(boxes, movie) for boxes in pictures]
    counts = (struct.unpack_from(">I", boxes[b"stsz"], 8)[0] for boxes in pictures)
    sizes = [struct.unpack_from(">HH", boxes[b"stsd"], 40) for boxes in pictures]
    width, height = (min(lengths) for lengths in zip(*sizes, strict=True))
    if not width or not height:
        return None
    frames = min(*counts, *(track.frames for track in shown))
    seconds, rate = (min(of) for of in zip(*((t.seconds, t.rate) for t in shown), strict=True))
    return Header(VideoTrack(frames, seconds, rate, width, height), heard)


def _track(boxes: _Boxes, movie: _Boxes) -> VideoTrack:
    """What is played of a track, by its time table, its length and its edit list: a clip trimmed
    without re-encoding shows only a part of it."""
    scale, duration = _clock(boxes[b"mdhd"])
    steps = list(struct.iter_unpack(">II", _table(boxes[b"stts"], 8)))
    frames = sum(count for count, _ in steps)
    whole = min(duration, sum(count * step for count, step in steps)) / scale
    rate = scale / max(step for _, step in steps)
    if b"elst" not in boxes:
        return VideoTrack(frames, whole, rate)
    first = struct.unpack_from(">i", boxes.get(b"ctts", bytes(16)), 12)[0] / scale
    edits = _edits(boxes[b"elst"], scale, _clock(movie[b"mvhd"])[0])
    shown = sum(
        max(0.0, min(begin + length, first + whole) - max(begin, first))
        for begin, length in edits
        if begin >= 0
    )
    if shown < whole - 0.5 / rate:
        frames = min(frames, int(shown * rate))
    # for one that begins empty or jumps about, it is not computed what is shown when
    return VideoTrack(frames, min(shown, whole), rate if len(edits) == 1 else 0.0)


def _edits(elst: bytes, scale: int, movie_scale: int) -> list[tuple[float, float]]:
    """Where in the track each edit begins, below 0 for an empty one, and how long it is; both in
    seconds."""
    form = ">QqI" if elst[0] == 1 else ">IiI"
    entries = struct.iter_unpack(form, _table(elst, struct.calcsize(form)))
    return [(begin / scale, length / movie_scale) for length, begin, _ in entries]


def _table(box: bytes, width: int) -> bytes:
    """The entries of a table box. Raises ``ValueError`` unless all are present."""
    (count,) = struct.unpack_from(">I", box, 4)
    entries = box[8 : 8 + width * count]
    if len(entries) != width * count:
        raise ValueError("a table is too long, or ends early")
    return entries


def _clock(box: bytes) -> tuple[int, int]:
    """Ticks per second, and length in ticks, of an ``mdhd`` or ``mvhd`` box."""
    scale, duration = struct.unpack_from(*((">IQ", box, 20) if box[0] == 1 else (">II", box, 12)))
    return scale, duration


def _boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Name and beginning of every box, nested ones after the box that contains them. Raises
    ``ValueError`` for one that ends outside its container: the file is truncated or broken."""
    start, ends = 0, [size]
    for _ in range(_MAX_BOXES):
        while start + 8 > ends[-1]:
            start = ends.pop()
            if not ends:
                return
        file.seek(start)
        length, name = struct.unpack(">I4s", file.read(8))
        inside = start + 8
        if length == 1:
            (length,) = struct.unpack(">Q", file.read(8))
            inside += 8
        stop = start + length if length else ends[-1]
        if not inside <= stop <= ends[-1]:
            raise ValueError("a box ends outside its container")
        nested = name in _CONTAINERS
        most = 0 if nested else _MAX_TABLE if name in _TABLES else 64
        yield name, file.read(min(most, stop - inside))
        if nested:
            ends.append(stop)
        start = inside if nested else stop
    raise ValueError("more boxes than a header has")
