"""Decoding against ffmpeg: peak memory over result size, time, and the frames themselves.

``python tests/benchmarks/bench_decode.py`` loads clips of 60, 384 and 600 s, 640 x 360 and
1280 x 720, at default settings, each in a process of its own. It reports the peak memory beyond
what the libraries took, over the bytes of the frames returned, and the seconds (wall clock, and all
processors), beside those that ffmpeg takes to decode the same file and scale as many frames to the
same size. Then it compares times and pixels of every frame of the shipped clips, before resizing,
with ffmpeg's. ffmpeg is the binary if there is one, else the filter graph of PyAV's own libav
(``--libav`` forces that). ``--json`` prints one object; ``--longest`` leaves out longer clips.
Linux only (``/proc``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from omni_grpo_core import tiny
from omni_grpo_core.core import decode as _decode
from omni_grpo_core.core.media import load_media
from omni_grpo_core.types import Conversation, MediaPart, MediaRef, Message

SECONDS = (60, 384, 600)
SIZES = ((640, 360), (1280, 720))
RATE = 25
PIECE = 4  # seconds: encoded once, then repeated packet by packet
SHOWN = 2  # frames per second, MediaConfig's default


def write_clip(path: Path, width: int, height: int, seconds: int) -> None:
    """Write a clip of a bar that moves over a gradient."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast", "g": str(RATE * PIECE), "bf": "0"}
        packets = []
        picture = np.zeros((height, width, 3), np.uint8)
        picture[..., 1] = np.linspace(0, 255, width, dtype=np.uint8)
        for number in range(RATE * PIECE):
            shown = picture.copy()
            left = number * width // (RATE * PIECE)
            shown[:, left : left + 40] = (255, 80, 0)
            packets += stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24"))
        packets += stream.encode(None)
        data = [(bytes(packet), packet.is_keyframe) for packet in packets]
        for number in range(RATE * seconds):
            content, key = data[number % len(data)]
            packet = av.Packet(content)
            packet.stream, packet.time_base = stream, Fraction(1, RATE)
            packet.pts = packet.dts = number
            packet.duration, packet.is_keyframe = 1, key
            container.mux(packet)


# --------------------------------------------------------------------------- memory and time


def memory(line: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(row.split()[1]) for row in status if row.startswith(line))


def load(path: Path) -> Any:
    message = Message("user", (MediaPart(MediaRef("video", str(path))),))
    return load_media(Conversation("bench", (message,), "off")).videos[0].frames


def ours(path: Path) -> dict[str, Any]:
    load(shipped_clips()[0])  # the libraries' first use
    before, begin, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    frames = load(path)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return {
        "frames": list(frames.shape),
        "result": frames.numel() * frames.element_size(),
        "peak": memory("VmHWM") - before,
        "seconds": seconds,
        "cpu_seconds": cpu,
    }


def graph(path: Path, *filters: tuple[str, str]) -> Iterator[Any]:
    """The frames that libav's filters produce from a clip."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        chain = av.filter.Graph()
        nodes = [chain.add_buffer(template=stream)]
        nodes += [chain.add(name, options) for name, options in filters]
        chain.link_nodes(*nodes, chain.add("buffersink")).configure()

        def ready() -> Iterator[Any]:
            while True:
                try:
                    yield chain.vpull()
                except (av.BlockingIOError, av.EOFError):
                    return

        for frame in container.decode(stream):
            chain.vpush(frame)
            yield from ready()
        chain.vpush(None)
        yield from ready()


def scale_by_libav(path: Path, width: int, height: int) -> tuple[float, float]:
    """Seconds of the clock, and of all processors."""
    begin, cpu = time.perf_counter(), time.process_time()
    scale = ("scale", f"{width}:{height}:flags=bicubic")
    for _ in graph(path, ("fps", f"{SHOWN}"), scale, ("format", "rgb24")):
        pass
    return time.perf_counter() - begin, time.process_time() - cpu


def scale_by_binary(path: Path, width: int, height: int) -> tuple[float, float]:
    """Seconds of the clock, and of all processors."""
    begin = time.perf_counter()
    filters = f"fps={SHOWN},scale={width}:{height}:flags=bicubic"
    _ffmpeg(path, "-vf", filters, "-pix_fmt", "rgb24", "-f", "null")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - begin, used.ru_utime + used.ru_stime


def _ffmpeg(path: Path, *options: str) -> str:
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", str(path), "-an", *options, "-"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, in a process that has done nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def measure(binary: bool, longest: int) -> Iterator[dict[str, Any]]:
    theirs = scale_by_binary if binary else scale_by_libav
    for width, height in SIZES:
        for seconds in SECONDS:
            if seconds > longest:
                continue
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "clip.mp4"
                write_clip(path, width, height, seconds)
                found = alone(ours, path)
                _, _, high, wide = found["frames"]
                clock, cpu = alone(theirs, path, wide, high)
            yield {
                "clip": f"{width} x {height}",
                "clip_seconds": seconds,
                **found,
                "memory_ratio": found["peak"] / found["result"],
                "ffmpeg_seconds": clock,
                "time_ratio": found["seconds"] / clock,
                "ffmpeg_cpu_seconds": cpu,
                "cpu_ratio": found["cpu_seconds"] / cpu,
            }


# --------------------------------------------------------------------------- the frames


def shipped_clips() -> list[Path]:
    return sorted((Path(tiny.__file__).parent / "data").glob("*.mp4"))


Shown = list[tuple[float, str]]
"""For every frame, when it appears (seconds of the file's clock) and the hash of its RGB bytes."""


def our_frames(path: Path) -> Shown:
    contents = _decode.inspect(path)
    times = contents.shown or ()
    pictures = _decode.read_frames(contents, range(len(times)), timed=True)
    return [(times[n] + contents.zero, _hash(picture)) for n, picture in pictures]


def libav_frames(path: Path) -> Shown:
    return [
        (float(frame.pts * frame.time_base), _hash(frame.to_ndarray()))
        for frame in graph(path, ("format", "rgb24"))
    ]


def binary_frames(path: Path) -> Shown:
    text = _ffmpeg(path, "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "framemd5")
    lines = text.splitlines()
    base = next(Fraction(line.split()[-1]) for line in lines if line.startswith("#tb 0"))
    rows = [[word.strip() for word in line.split(",")] for line in lines if line[0] != "#"]
    return [(float(int(row[2]) * base), row[5]) for row in rows]


def _hash(picture: Any) -> str:
    return hashlib.md5(np.ascontiguousarray(picture).tobytes(), usedforsecurity=False).hexdigest()


def compare(binary: bool) -> dict[str, int]:
    found = {"clips": 0, "frames": 0, "equal_times": 0, "equal_pixels": 0}
    for path in shipped_clips():
        mine, other = our_frames(path), (binary_frames if binary else libav_frames)(path)
        found["clips"] += 1
        found["frames"] += max(len(mine), len(other))
        for (time_a, pixels_a), (time_b, pixels_b) in zip(mine, other, strict=False):
            found["equal_times"] += abs(time_a - time_b) < 1e-6
            found["equal_pixels"] += pixels_a == pixels_b
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--libav", action="store_true", help="PyAV's libav, not the binary")
    arguments.add_argument("--longest", type=int, default=SECONDS[-1], help="seconds of a clip")
    options = arguments.parse_args()
    binary = shutil.which("ffmpeg") is not None and not options.libav
    name = "ffmpeg binary" if binary else f"PyAV's libav ({_decode.decoder_version()})"
    rows = []
    if not options.json:
        print(f"ffmpeg: {name}")
        print(
            f"{'clip':>10} {'s':>4} {'frames':>6} {'result MB':>9} {'peak MB':>8} {'ratio':>5} "
            f"{'ours s':>7} {'ffmpeg s':>8} {'ratio':>5} {'cpu s':>6} {'ffmpeg s':>8} {'ratio':>5}"
        )
    for row in measure(binary, options.longest):
        rows.append(row)
        if not options.json:
            print(
                f"{row['clip']:>10} {row['clip_seconds']:4} {row['frames'][0]:6} "
                f"{row['result'] / 1e6:9,.0f} {row['peak'] / 1e6:8,.0f} "
                f"{row['memory_ratio']:5.2f} {row['seconds']:7.1f} {row['ffmpeg_seconds']:8.1f} "
                f"{row['time_ratio']:5.2f} {row['cpu_seconds']:6.1f} "
                f"{row['ffmpeg_cpu_seconds']:8.1f} {row['cpu_ratio']:5.2f}",
                flush=True,
            )
    shipped = compare(binary)
    if options.json:
        print(json.dumps({"ffmpeg": name, "rows": rows, "shipped": shipped}))
    else:
        print(
            "shipped: {clips} clips, {frames} frames, {equal_times} with equal times, "
            "{equal_pixels} with equal pixels".format(**shipped)
        )


if __name__ == "__main__":
    main()
