"""PyAV behind plain functions: what a file holds, its frames, its audio, the decoder's version.

Half of :mod:`omni_grpo_core.core.media`, which the rest of the project calls. Nothing here resizes,
samples or knows about a model.

A file is first *demuxed* (packets only, cheap) to learn when each frame is shown and whether the
file is as long as it states; only then are the wanted frames decoded and converted, so that a long
clip is never in memory whole. libavcodec reads a truncated file silently, hence the check.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from numpy.typing import NDArray

from omni_grpo_core.core import framing as _framing
from omni_grpo_core.errors import MediaError
from omni_grpo_core.io.bounded import A_FOLDER, A_PIPE, A_URL, GZIP, Unreadable, plain_file
from omni_grpo_core.types import AUDIO_SAMPLING_RATE

# libavformat would also "play" text (tty), still images, and playlists that name other files
_CONTAINERS = frozenset(
    (
        *("asf", "avi", "flv", "gif", "matroska", "mov", "mpeg", "mpegts"),
        *("aac", "aiff", "caf", "flac", "mp3", "ogg", "w64", "wav"),
    )
)
# Formats that state the length of each stream. For others libavformat guesses (mp3, unless its
# first frame states it), infers it from the data (ts, ogg) or counts in units that packets do not
# fill (avi): nothing to compare with.
_STATE_LENGTH = frozenset(("flac", "matroska", "mov", "wav"))
_INSTEAD = {
    A_URL: "download it and pass the file; for a file: URL pass the path alone",
    A_FOLDER: "pass a file in it",
    A_PIPE: "write its content to a file",
}
"""What to do about a path that is not a file."""
MAX_PIXELS = 8192 * 8192
"""A larger frame or image is refused unread: it is a decompression bomb, not from a camera."""
MAX_CHANNELS = 64
"""libswresample's limit (``SWR_CH_MAX``)."""
MIN_RATE = 1000
"""Hz: no real sound is stored at a lower rate, and at 16 kHz it would grow without bound."""
MAX_SILENCE = 3600
"""Most seconds of silence before or between sound: a header can ask for years."""
GAP = 0.1
"""Seconds between two audio frames that make a pause; less comes from containers' rounding."""

_ORIENTATIONS: dict[tuple[int, int, int, int], tuple[int, bool]] = {
    # signs of the display matrix's a b c d -> quarter turns (counter-clockwise), mirrored after
    (1, 0, 0, 1): (0, False),
    (0, 1, -1, 0): (3, False),
    (-1, 0, 0, -1): (2, False),
    (0, -1, 1, 0): (1, False),
    (-1, 0, 0, 1): (0, True),
    (0, 1, 1, 0): (3, True),
    (1, 0, 0, -1): (2, True),
    (0, -1, -1, 0): (1, True),
}


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file holds. All times are seconds from the beginning of the file.

    ``shown``: when each video frame appears, ascending, or ``None`` if the packets do not state it;
    ``video_end``, ``audio_end``: when the tracks end. ``rate``: frames per second as stated by the
    container, ``None`` if it is not. ``zero``: timestamp of the beginning of the file.
    """

    path: Path
    has_video: bool
    has_audio: bool
    duration: float
    zero: float
    rate: float | None
    shown: tuple[float, ...] | None
    video_end: float
    audio_end: float


def decoder_version() -> str:
    """``"pyav X, libavcodec Y"``: part of a trace, since another decoder gives different frames."""
    codec = ".".join(str(n) for n in av.library_versions["libavcodec"])
    return f"pyav {av.__version__}, libavcodec {codec}"


def existing_file(path: str | Path) -> Path:
    """``path`` made absolute. Raises MediaError unless it is a readable, non-empty file."""
    file = Path(path).absolute()
    try:
        with plain_file(file) as (stream, _):
            begin = stream.read(2)
    except Unreadable as found:
        fix = _INSTEAD.get(found.got, "check its name and permissions")
        raise MediaError(str(path), got=found.got, want="a media file", fix=fix) from found
    if not begin:
        raise MediaError(
            str(path), got="an empty file (0 bytes)", want="a media file", fix="copy it again"
        )
    if begin == GZIP:
        raise MediaError(
            str(path), got="a gzip file", want="a media file", fix="unpack it: gunzip --keep"
        )
    return file


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The container of ``file``; any libav error becomes a MediaError."""
    try:
        # an absolute path cannot be mistaken for a protocol ("a:b.mp4") or an option
        source = _framing.with_length(file) or str(file)
        with av.open(source, metadata_errors="replace") as container:
            name = container.format.name
            if not _CONTAINERS & set(name.split(",")):
                raise MediaError(
                    str(file),
                    got=f"{container.format.long_name or name}, not read as a clip or a recording",
                    want="mp4, mov, mkv, webm, wav, flac, mp3 or similar",
                    fix="list it under its own modality, or convert it",
                )
            yield container
    except av.FFmpegError as error:
        raise MediaError(
            str(file),
            got=f"a file that libav cannot read ({error.strerror})",
            want="a complete mp4, mov, mkv, webm, wav, flac, mp3 or similar",
            fix="play it in another program to see whether it is broken; copy or convert it again",
        ) from error


def _streams(file: Path, container: Any) -> tuple[Any | None, Any | None]:
    """The main video and audio stream; the cover picture of a song is not a video."""
    video, audio = container.streams.best("video"), container.streams.best("audio")
    if video is not None and video.disposition & av.stream.Disposition.attached_pic:
        video = None
    if video is None and audio is None:
        raise MediaError(
            str(file), got="neither video nor audio", want="a clip", fix="check the file"
        )
    for stream in (video, audio):
        if stream is not None and stream.codec_context is None:
            raise MediaError(
                str(file),
                got=f"a {stream.type} stream without a known decoder",
                want="a common codec",
                fix="convert it (H.264 and AAC in mp4 always work)",
            )
    return video, audio


def inspect(path: str | Path) -> Contents:
    """What ``path`` holds, after reading it to its end.

    Raises MediaError: not a media file, no video and no audio, truncated, or broken in the middle.
    """
    file = existing_file(path)
    with _opened(file) as container:
        video, audio = _streams(file, container)
        if video is not None and video.width * video.height > MAX_PIXELS:
            raise too_large(file, f"{video.width} x {video.height} pixels")
        formats = set(container.format.name.split(","))
        if reason := _framing.cut_off(file, formats):
            raise _cut_off(file, reason)
        zero = (container.start_time or 0) / av.time_base
        stamps, ends = _demux(file, container, video)
        used = [stream for stream in (video, audio) if stream is not None]
        if _STATE_LENGTH & formats or ("mp3" in formats and _framing.mp3_states_length(file)):
            _refuse_short(file, container, used, ends)
        times = sorted(t - zero for t in stamps if t is not None)
        clean = len(times) == len(stamps) == len(set(times)) and bool(times)
        lengths = {s.type: ends.get(s.index, zero) - zero for s in used}
        return Contents(
            path=file,
            has_video=video is not None,
            has_audio=audio is not None,
            duration=max(lengths.values()),
            zero=zero,
            rate=float(video.average_rate) if video is not None and video.average_rate else None,
            shown=tuple(times) if clean else None,
            video_end=lengths.get("video", 0.0),
            audio_end=lengths.get("audio", 0.0),
        )


def _demux(
    file: Path, container: Any, video: Any | None
) -> tuple[list[float | None], dict[int, float]]:
    """Times of the video packets to be shown, and each stream's end according to its packets."""
    stamps: list[float | None] = []
    ends: dict[int, float] = {}
    for packet in container.demux():
        if not packet.size:
            continue
        if packet.is_corrupt:
            raise _cut_off(file, "an incomplete packet")
        time = None if packet.pts is None else float(packet.pts * packet.time_base)
        if time is not None:
            end = time + float((packet.duration or 0) * packet.time_base)
            ends[packet.stream_index] = max(end, ends.get(packet.stream_index, end))
        if video is not None and packet.stream_index == video.index and not packet.is_discard:
            stamps.append(time)
    return stamps, ends


def _declared_end(stream: Any) -> float | None:
    """When the stream ends according to the container, on the stream's own clock."""
    if stream.duration is not None and stream.time_base is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    tag = next((v for k, v in stream.metadata.items() if k.upper().startswith("DURATION")), None)
    parts = (tag or "").split(":")
    try:
        hours, minutes, seconds = (float(part) for part in parts)
    except ValueError:
        return None
    return hours * 3600 + minutes * 60 + seconds


def _refuse_short(file: Path, container: Any, used: Sequence[Any], ends: dict[int, float]) -> None:
    last = max(ends.values(), default=0.0)
    pairs = [(_declared_end(s), ends.get(s.index, 0.0)) for s in used]
    if any(end is None for end, _ in pairs) and container.duration is not None:
        whole = ((container.start_time or 0) + container.duration) / av.time_base
        pairs.append((whole, last))
    for declared, found in pairs:
        if declared is not None:
            _refuse_missing(file, found, declared)


def _refuse_missing(file: Path, found: float, declared: float) -> None:
    # headers round, and codecs drop or pad blocks at either end: allow a twentieth
    if declared - found > min(max(0.05 * declared, 0.1), 1.0):
        raise _cut_off(file, f"{found:.2f} s of a stream that should last {declared:.2f} s")


def _cut_off(file: Path, got: str) -> MediaError:
    return MediaError(
        str(file),
        got=f"{got}: the file is truncated or broken",
        want="a complete file",
        fix="copy or download it again",
    )


def too_large(file: Path, size: str) -> MediaError:
    """The error for an absurdly large picture."""
    return MediaError(
        str(file),
        got=size,
        want=f"at most {MAX_PIXELS} pixels",
        fix="check that it is the right file, or scale it down",
    )


def _frames(file: Path, container: Any, stream: Any, *, threads: int = 0) -> Iterator[Any]:
    """All frames of a stream. ``threads`` 0: libavcodec's choice, one frame per thread. Errors in
    the last frames, as many as there are threads, are then lost: the frames are just missing."""
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = threads
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise _cut_off(file, f"a damaged {stream.type} frame")
        yield frame


def recount(contents: Contents) -> Contents:
    """The same with ``shown`` found by decoding every frame: for missing or wrong packet times.

    Frames whose own timestamps run backwards (B-frames in AVI) are spaced by the stated rate. Uses
    one thread, so that damage at the end, one reason for the call, is reported.
    """
    with _opened(contents.path) as container:
        video, _ = _streams(contents.path, container)
        frames = _frames(contents.path, container, video, threads=1)
        stamps = [frame.time for frame in frames]
    if all(t is not None for t in stamps) and all(a < b for a, b in itertools.pairwise(stamps)):
        return replace(contents, shown=tuple(t - contents.zero for t in stamps))
    rate = contents.rate or 25.0
    return replace(
        contents,
        shown=tuple(i / rate for i in range(len(stamps))),
        video_end=len(stamps) / rate,
    )


def read_frames(
    contents: Contents, wanted: Sequence[int], *, timed: bool
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The frames with these numbers (ascending, repeats allowed), each once, with its number.

    Frames are uint8, (height, width, 3), RGB, upright, all of one size. They end early if the
    decoder delivers fewer or, if ``timed``, other frames than ``contents.shown`` states; the caller
    then calls :func:`recount`.
    """
    numbers = set(wanted)
    shape: tuple[int, ...] | None = None
    with _opened(contents.path) as container:
        video, _ = _streams(contents.path, container)
        for number, frame in enumerate(_frames(contents.path, container, video)):
            if timed and not _on_time(frame, number, contents):
                return
            if number in numbers:
                picture = _upright(contents.path, frame)
                shape = shape or picture.shape
                if picture.shape != shape:
                    raise MediaError(
                        str(contents.path),
                        got="frames that change size",
                        want="one size throughout",
                        fix="convert it to a constant size",
                    )
                yield number, picture
            if number == wanted[-1]:
                return


def _on_time(frame: Any, number: int, contents: Contents) -> bool:
    shown = contents.shown or ()
    if frame.time is None or number >= len(shown):
        return False
    return bool(abs(frame.time - contents.zero - shown[number]) < 1e-6)


def _upright(file: Path, frame: Any) -> NDArray[np.uint8]:
    if frame.width * frame.height > MAX_PIXELS:
        raise too_large(file, f"{frame.width} x {frame.height} pixels")
    # one thread: freeing the frame waits for libswscale's threads, and a forked process (a data
    # loader's worker) has none, so it would wait forever
    rgb: NDArray[np.uint8] = frame.to_ndarray(format="rgb24", threads=1)
    matrix = _display_matrix(frame)
    if matrix is None:
        return rgb
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    signs = tuple(0 if abs(n) < 656 else int(math.copysign(1, n)) for n in (a, b, c, d))
    if signs not in _ORIENTATIONS:
        raise MediaError(
            str(file),
            got=f"a display matrix of {frame.rotation} degrees",
            want="a multiple of 90",
            fix="convert it with the rotation applied to the frames",
        )
    turns, mirrored = _ORIENTATIONS[signs]
    rgb = np.rot90(rgb, turns)
    return rgb[:, ::-1] if mirrored else rgb


def _display_matrix(frame: Any) -> Any | None:
    # frame.side_data and the frame refer to each other: a clip's frames would stay in memory until
    # the garbage collector runs, which does not count their size
    known = SideDataContainer.__new__(SideDataContainer)
    # raised at the first kind that PyAV has no name for, such as EXIF, which libavcodec puts after
    # the matrix that it derives from it
    with suppress(ValueError):
        known.__init__(frame)  # type: ignore[misc]
    return known.get("DISPLAYMATRIX")


def read_audio(contents: Contents) -> NDArray[np.float32]:
    """The audio track from the beginning of the file: float32, (n,), mono, 16 kHz.

    Mono is the mean of the channels, as in librosa and in the models' training; libav's own
    downmix of float stereo is 3 dB louder. A track that starts late is preceded by silence, and a
    gap in its timestamps is filled with silence, so that audio and frames stay in sync.
    """
    # grows in place: joining a list of blocks would hold a long recording twice
    track = bytearray()
    with _opened(contents.path) as container:
        _, audio = _streams(contents.path, container)
        _refuse_odd_sound(contents.path, audio)
        heard = 0.0  # seconds: where the next frame should begin
        resampler: Any = None
        for frame in _frames(contents.path, container, audio):
            late = 0.0 if frame.time is None else frame.time - contents.zero - heard
            if resampler is None or late > GAP:
                track.extend(_resampled(contents.path, resampler, None))
                track.extend(_silence(contents.path, late))
                # packed: PyAV reads planes beyond the eighth out of bounds
                resampler = av.AudioResampler(format="flt", rate=AUDIO_SAMPLING_RATE)
                heard += max(late, 0.0)
            track.extend(_resampled(contents.path, resampler, frame))
            heard += frame.samples / frame.sample_rate
        track.extend(_resampled(contents.path, resampler, None))
    samples = np.frombuffer(track, np.float32)
    _refuse_missing(contents.path, len(samples) / AUDIO_SAMPLING_RATE, contents.audio_end)
    if not samples.size or not np.isfinite(samples).all():
        raise MediaError(
            str(contents.path),
            got="non-finite samples" if samples.size else "an audio track without samples",
            want="sound",
            fix="record or convert it again",
        )
    return samples


def _silence(file: Path, seconds: float) -> bytes:
    if seconds > MAX_SILENCE:
        raise MediaError(
            str(file),
            got=f"{seconds:.0f} s without sound in an audio track",
            want=f"at most {MAX_SILENCE} s, at the beginning or in a pause",
            fix="check its timestamps, or convert it",
        )
    return bytes(4 * max(round(seconds * AUDIO_SAMPLING_RATE), 0))


def _refuse_odd_sound(file: Path, stream: Any) -> None:
    channels, rate = stream.codec_context.channels, stream.codec_context.sample_rate
    if channels > MAX_CHANNELS:
        raise MediaError(
            str(file),
            got=f"{channels} audio channels",
            want=f"at most {MAX_CHANNELS}",
            fix="mix it down, for instance to mono",
        )
    if rate < MIN_RATE:
        raise MediaError(
            str(file),
            got=f"sound of {rate} samples a second",
            want=f"at least {MIN_RATE}",
            fix="check that its header states the true rate",
        )


def _resampled(file: Path, resampler: Any | None, frame: Any | None) -> bytes:
    """The resampler's output: without a frame, the rest; without a resampler, nothing."""
    if resampler is None:
        return b""
    try:
        blocks: list[Any] = resampler.resample(frame)
    except av.FFmpegError:
        raise
    except ValueError as error:  # PyAV's error for a frame that differs from the first
        raise MediaError(
            str(file),
            got=f"an audio track that changes its format ({error})",
            want="one rate and one number of channels throughout",
            fix="convert it",
        ) from error
    return b"".join(_mono(block).tobytes() for block in blocks)


def _mono(block: Any) -> NDArray[np.float32]:
    packed = block.to_ndarray().reshape(-1, block.layout.nb_channels)
    # channel after channel, as planar audio is summed: the last bit depends on the order
    mean: NDArray[np.float32] = np.ascontiguousarray(packed.T).mean(axis=0, dtype=np.float32)
    return mean
