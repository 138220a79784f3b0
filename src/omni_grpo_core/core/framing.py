"""The length that a file's own framing states, for formats where libavformat does not check it.

Part of :mod:`omni_grpo_core.core.media`. libavformat takes a truncated file for one that ends
there. For most formats the packets show it; for those here only the bytes do. Nothing shows it for
an MPEG program stream, an mp3 without a Xing, Info or VBRI header, or a recording cut exactly
between two pages or packets: these are read as far as they go.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_MOST_CHUNKS = 10_000  # more than this is not a header
_OGG_PAGE = 27 + 255 + 255 * 255  # bytes at most


def cut_off(file: Path, formats: set[str]) -> str | None:
    """What shows that ``file`` is truncated, or ``None``. ``formats``: libavformat's names."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        for name in formats & _CHECKS.keys():
            stream.seek(0)
            if reason := _CHECKS[name](stream, size):
                return reason
    return None


def _short_wav(stream: BinaryIO, size: int) -> str | None:
    wave = _wave(stream, size)
    if wave is None or wave.unstated or wave.start + wave.stated <= size:
        return None
    return f"{size - wave.start} bytes of audio, where the header states {wave.stated}"


def _short_avi(stream: BinaryIO, size: int) -> str | None:
    """A file of more than 1 GB is several RIFF chunks in a row."""
    start = 0
    while start < size:
        stream.seek(start)
        name, length = _chunk(stream)
        if name != b"RIFF" or _no_length(length):
            return None
        start += 8 + length + length % 2
    return _short(size, start - length % 2)


def _short_aiff(stream: BinaryIO, size: int) -> str | None:
    length = struct.unpack(">4xI", stream.read(8).ljust(8, b"\0"))[0]
    return None if _no_length(length) else _short(size, 8 + length - length % 2)


def _short_ogg(stream: BinaryIO, size: int) -> str | None:
    stream.seek(max(0, size - _OGG_PAGE))
    page = stream.read().rpartition(b"OggS\0")[1:]
    last = b"".join(page)
    segments = last[26] if len(last) > 26 else 0
    whole = 27 + segments + sum(last[27 : 27 + segments])
    return "an incomplete last page" if 0 < len(last) < whole else None


def _short_gif(stream: BinaryIO, size: int) -> str | None:
    def skip_colours(flags: int) -> None:
        if flags & 0x80:
            stream.seek(3 << (flags & 7) + 1, io.SEEK_CUR)

    def skip_blocks() -> None:
        while length := stream.read(1)[0]:
            stream.seek(length, io.SEEK_CUR)

    try:
        skip_colours(stream.read(13)[10])
        while (kind := stream.read(1)[0]) in b"!,":  # an extension or an image
            if kind == ord(","):
                skip_colours(stream.read(9)[8])
            stream.seek(1, io.SEEK_CUR)
            skip_blocks()
    except IndexError:
        return "an animation without its end marker"
    return None


def _short_ts(stream: BinaryIO, size: int) -> str | None:
    packets = stream.read(3 * 188)
    odd = size % 188
    if odd and packets[::188] == b"GGG":  # the sync byte
        return f"a last packet of {odd} bytes instead of 188"
    return None


_CHECKS: dict[str, Callable[[BinaryIO, int], str | None]] = {
    "wav": _short_wav,
    "avi": _short_avi,
    "aiff": _short_aiff,
    "ogg": _short_ogg,
    "gif": _short_gif,
    "mpegts": _short_ts,
}


def _short(size: int, stated: int) -> str | None:
    return f"{size} bytes, where the header states {stated}" if size < stated else None


def _no_length(stated: int) -> bool:
    """Whether a 32-bit length is what writers to a pipe leave: 0, -1, or the maximum, rounded."""
    return stated == 0 or stated & 0x7FFF_FFFF >= 0x7FFF_EF00 or stated == 0x8000_0000


def mp3_states_length(file: Path) -> bool:
    """Whether the first frame of an mp3 states how many there are (Xing, Info or VBRI header)."""
    with file.open("rb") as stream:
        head = stream.read(10)
        if head[:3] == b"ID3" and len(head) == 10:
            a, b, c, d = head[6:]
            stream.seek((a << 21 | b << 14 | c << 7 | d) + 10)
        else:
            stream.seek(0)
        frame = stream.read(4096)
    if b"VBRI" in frame:
        return True
    for name in (b"Xing", b"Info"):
        _, found, rest = frame.partition(name)
        if found:
            return len(rest) > 3 and bool(rest[3] & 1)  # flag: the number of frames follows
    return False


# --------------------------------------------------------------------------- wav from a pipe


@dataclass(frozen=True, slots=True)
class _Wave:
    """``layout``: the ``fmt`` chunk's content. ``start``: where the samples begin. ``stated``:
    their bytes according to the header; ``unstated``: it was written to a pipe without a length."""

    layout: bytes
    start: int
    stated: int
    unstated: bool


def _wave(stream: BinaryIO, size: int) -> _Wave | None:
    head = stream.read(12)
    if head[:4] not in (b"RIFF", b"RF64", b"BW64") or head[8:] != b"WAVE":
        return None
    layout, long = b"", None
    for _ in range(_MOST_CHUNKS):
        name, length = _chunk(stream)
        start = stream.tell()
        if name == b"data":
            stated = long if long is not None and length == 0xFFFF_FFFF else length
            unstated = stated >> 63 == 1 or (stated < 1 << 32 and _no_length(stated))
            if stated == 0:  # or there is no audio: the file ends here, or with another chunk
                name, length = _chunk(stream)
                chunk = name.strip().isalnum() and stream.tell() + length == size
                unstated = start < size and not chunk
            return _Wave(layout, start, stated, unstated)
        if name == b"ds64":
            long = struct.unpack("<8xQ", stream.read(16).ljust(16, b"\0"))[0]
        elif name == b"fmt ":
            layout = stream.read(min(length, 1024))
        if start + length >= size:
            return None
        stream.seek(start + length + length % 2)
    return None


def _chunk(stream: BinaryIO) -> tuple[bytes, int]:
    """Name and length."""
    name, length = struct.unpack("<4sI", stream.read(8).ljust(8, b"\0"))
    return name, length


def with_length(file: Path) -> BinaryIO | None:
    """A WAV whose header does not state its length, with one that does; ``None`` for any other.

    libavformat reads the original too, but takes its last block for an incomplete one.
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        wave = _wave(stream, size)
    if wave is None or not wave.layout or not wave.unstated:
        return None
    length = size - wave.start
    layout = wave.layout + bytes(len(wave.layout) % 2)
    head = b"RF64" + struct.pack("<I4s", 0xFFFF_FFFF, b"WAVE")
    head += struct.pack("<4sIQQQI", b"ds64", 28, 72 + len(layout) + length, length, 0, 0)
    head += struct.pack("<4sI", b"fmt ", len(layout)) + layout
    head += struct.pack("<4sI", b"data", 0xFFFF_FFFF)
    return io.BufferedReader(_Joined(head, file.open("rb", buffering=0), wave.start))


class _Joined(io.RawIOBase):
    """``head``, then ``file`` from its byte ``start``."""

    def __init__(self, head: bytes, file: io.FileIO, start: int) -> None:
        self._head, self._file, self._start = head, file, start
        self._size = len(head) + os.fstat(file.fileno()).st_size - start
        self._offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._offset = offset + (0, self._offset, self._size)[whence]
        return self._offset

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._offset < len(self._head):
            data = self._head[self._offset : self._offset + len(buffer)]
        else:
            self._file.seek(self._offset - len(self._head) + self._start)
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._offset += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
