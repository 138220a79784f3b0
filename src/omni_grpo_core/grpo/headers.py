"""What a media file says of itself in its header: length and size, without decoding anything.

Reads MP4 and its relatives (ISO/IEC 14496-12) and WAV in plain Python, so that a configuration can
be held against its data before a decoder or torch is loaded. Of any other file nothing is known.
"""

from __future__ import annotations

import struct
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_NESTED = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


@dataclass(frozen=True, slots=True)
class Header:
    """``video``: whether there is a video track, of ``frames`` of ``width`` x ``height`` pixels
    over ``video_seconds``. ``audio_seconds``: of the sound; 0 where there is none."""

    video: bool = False
    frames: int = 0
    width: int = 0
    height: int = 0
    video_seconds: float = 0.0
    audio_seconds: float = 0.0


def read_header(path: str | Path) -> Header | None:
    """``None`` for a file that cannot be read or is of another format: the media stage says why."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(12)
            if start[4:8] == b"ftyp":
                return _mp4(file)
            if start[:4] == b"RIFF" and start[8:] == b"WAVE":
                file.seek(0)
                with wave.open(file) as sound:
                    return Header(audio_seconds=sound.getnframes() / sound.getframerate())
    except (OSError, ValueError, EOFError, struct.error, wave.Error, ZeroDivisionError):
        return None
    return None


def _mp4(file: BinaryIO) -> Header | None:
    file.seek(0, 2)
    tracks: list[dict[bytes, bytes]] = []
    for name, content in _boxes(file, 0, file.tell()):
        if name == b"trak":
            tracks.append({})
        elif tracks:
            tracks[-1][name] = content
    kinds = {track.get(b"hdlr", b"")[8:12]: track for track in reversed(tracks)}
    sound, picture = kinds.get(b"soun"), kinds.get(b"vide")
    if sound is None and picture is None:
        return None
    heard = 0.0 if sound is None else _seconds(sound[b"mdhd"])
    if picture is None:
        return Header(audio_seconds=heard)
    width, height = struct.unpack(">HH", picture[b"stsd"][40:44])
    (frames,) = struct.unpack(">I", picture[b"stsz"][8:12])
    return Header(True, frames, width, height, _seconds(picture[b"mdhd"]), heard)


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    """Name and beginning of every box, nested ones after the box that holds them."""
    while start + 8 <= end:
        file.seek(start)
        size, name = struct.unpack(">I4s", file.read(8))
        inside = start + 8
        if size == 1:
            (size,) = struct.unpack(">Q", file.read(8))
            inside += 8
        stop = end if size == 0 else start + size
        if stop <= start:
            return
        yield name, b"" if name in _NESTED else file.read(min(64, stop - inside))
        if name in _NESTED:
            yield from _boxes(file, inside, min(stop, end))
        start = stop


def _seconds(mdhd: bytes) -> float:
    if mdhd[0] == 1:
        scale, duration = struct.unpack(">IQ", mdhd[20:32])
    else:
        scale, duration = struct.unpack(">II", mdhd[12:20])
    return float(duration / scale)
