"""For any clip: the library's own choice of frames, true rates, and no crash on damaged files."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from media_files import conversation, lossless, numbered, tone, write_media
from qwen_omni_utils.v2_5 import vision_process
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from omni_grpo_core.core.frame_sampling import choose_frames
from omni_grpo_core.core.media import MediaConfig, load_media
from omni_grpo_core.errors import MediaError
from omni_grpo_core.types import MediaRef

rates = st.sampled_from([1.0, 5.0, 8.0, 12.5, 15.0, 23.976, 24.0, 25.0, 29.97, 30.0, 50.0, 60.0])
limits = st.tuples(
    st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.0, 30.0]),
    st.integers(2, 12),
    st.integers(0, 100),
).map(lambda t: {"fps": t[0], "min_frames": t[1], "max_frames": t[1] + t[2]})


class FakeReader:
    """decord's reader for a clip that is only a number of frames: frame ``i`` shows ``i``."""

    total = 0
    rate = 0.0

    def __init__(self, path: str) -> None:
        assert path == "clip"

    def __len__(self) -> int:
        return self.total

    def get_avg_fps(self) -> float:
        return self.rate

    def get_batch(self, numbers: list[int]) -> Any:
        frames = np.broadcast_to(np.array(numbers)[:, None, None, None], (len(numbers), 1, 1, 3))
        return types.SimpleNamespace(asnumpy=lambda: frames)


def library_choice(total: int, rate: float, element: dict[str, Any]) -> tuple[list[int], float]:
    """The frames that qwen-omni-utils' own file reader takes of such a clip, and its sample_fps."""
    decord = types.ModuleType("decord")
    decord.VideoReader = type("Reader", (FakeReader,), {"total": total, "rate": rate})  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "decord", decord)
        frames, _, sample_fps = vision_process._read_video_decord({"video": "clip", **element})
    return frames[:, 0, 0, 0].tolist(), sample_fps


@given(total=st.integers(2, 3_000), rate=rates, limit=limits)
def test_frames_match_the_library(total: int, rate: float, limit: dict[str, Any]) -> None:
    shown = [i / rate for i in range(total)]
    choice = choose_frames(shown, total / rate, stated_rate=rate, **limit)
    frames, sample_fps = library_choice(total, rate, limit)
    assert (list(choice.frames), choice.sample_fps) == (frames, sample_fps)


@cache
def long_clip() -> Path:
    """Forty frames at 8 fps, in a folder that is kept for the whole run."""
    folder = TemporaryDirectory()
    _FOLDERS.append(folder)
    return lossless(Path(folder.name) / "c.mkv", numbered(40, 28, 28) % 251)


_FOLDERS: list[TemporaryDirectory[str]] = []


@settings(max_examples=40)
@given(start=st.integers(0, 450), end=st.integers(0, 500))
def test_sections_match_the_library(start: int, end: int) -> None:
    """In hundredths of a second; the clip lasts five."""
    begin, finish = start / 100, end / 100
    # the library takes start * fps literally and rejects a section of a single frame
    assume(math.ceil(begin * 8) < math.floor(finish * 8))
    config = MediaConfig(fps=4.0, max_pixels=784)
    ref = MediaRef("video", str(long_clip()), begin, finish)
    video = load_media(conversation(ref), config).videos[0]
    wanted, sample_fps = library_choice(
        40, 8.0, {"video_start": begin, "video_end": finish, "fps": 4.0}
    )
    brightness = numbered(40, 1, 1)[:, 0, 0, 0] % 251
    assert video.frames[:, 0, 0, 0].tolist() == brightness[wanted].tolist()
    assert video.sample_fps == pytest.approx(sample_fps)


@given(
    steps=st.lists(st.floats(0.001, 5.0), min_size=1, max_size=60),
    last=st.floats(0.0, 5.0),
    stated=st.none() | rates,
    limit=limits,
)
def test_uneven_clips(
    steps: Sequence[float], last: float, stated: float | None, limit: dict[str, Any]
) -> None:
    shown = [0.0, *np.cumsum(steps).tolist()]
    choice = choose_frames(shown, shown[-1] + last, stated_rate=stated, **limit)
    assert len(choice.frames) % 2 == 0
    assert list(choice.frames) == sorted(choice.frames)
    assert set(choice.frames) <= set(range(len(shown)))
    assert len(choice.frames) <= limit["max_frames"]
    assert math.isclose(len(choice.frames) / choice.sample_fps, choice.duration)
    # within two frame lengths of the timestamps
    longest = max(*steps, last, shown[-1] / len(steps))
    assert abs(choice.duration - (shown[-1] + last)) <= 2 * longest + 1e-9


@settings(max_examples=25)
@given(height=st.integers(2, 90), width=st.integers(2, 90), most=st.integers(784, 20_000))
def test_frames_match_a_plain_resize(height: int, width: int, most: int) -> None:
    frames = np.random.default_rng(height).integers(0, 256, (2, height, width, 3), np.uint8)
    config = MediaConfig(max_pixels=most)
    with TemporaryDirectory() as folder:
        ref = MediaRef("video", str(lossless(Path(folder) / "c.mkv", frames)))
        try:
            found = load_media(conversation(ref), config).videos[0].frames
        except MediaError as error:
            assume("of at least a token" not in error.want)  # a sliver that is cut to nothing
            raise
    assert found.shape[2] * found.shape[3] <= most
    wanted = resize(
        torch.from_numpy(frames).permute(0, 3, 1, 2),
        list(found.shape[2:]),
        interpolation=InterpolationMode.BICUBIC,
        antialias=True,
    )
    assert found.equal(wanted.float())


@settings(max_examples=25)
@given(
    rate=st.sampled_from([8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000]),
    count=st.integers(400, 9_000),
    channels=st.sampled_from([1, 2]),
    codec=st.sampled_from(["pcm_s16le", "pcm_f32le", "pcm_s24le", "pcm_u8", "pcm_f64le"]),
)
def test_any_wav(rate: int, count: int, channels: int, codec: str) -> None:
    wave = tone(count / rate, rate, channels, hertz=200.0)
    with TemporaryDirectory() as folder:
        path = write_media(Path(folder) / "w.wav", None, wave, audio_codec=codec, audio_rate=rate)
        samples = load_media(conversation(MediaRef("audio", str(path)))).audios[0].samples
    assert samples.dtype == torch.float32
    wanted = 0.5 * np.sin(2 * np.pi * 200 * np.arange(len(samples)) / 16_000)
    assert abs(len(samples) - count * 16_000 / rate) <= 1
    # excluding the ends, where the resampling filter sees silence; 8-bit samples step by 1/128
    middle = slice(40, -40)
    tolerance = 0.02 if codec == "pcm_u8" else 0.005
    np.testing.assert_allclose(samples.numpy()[middle], wanted[middle], atol=tolerance)


@cache
def clip_bytes(name: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (16, 28, 28, 3), np.uint8)
    with TemporaryDirectory() as folder:
        options = {"movflags": "faststart"} if name.startswith("fast") else {}
        path = Path(folder) / name
        return write_media(
            path, noise, tone(2.0, 16_000), audio_rate=16_000, options=options
        ).read_bytes()


def load_damaged(name: str, data: bytes) -> tuple[int, float] | None:
    """Frames and seconds of audio of the damaged file; ``None`` if it is refused."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        ref = MediaRef("video", str(path))
        try:
            media = load_media(
                conversation(ref, audio_in_video="interleaved"), MediaConfig(fps=8, max_pixels=784)
            )
        except MediaError:
            return None
    return len(media.videos[0].frames), len(media.audios[0].samples) / 16_000


names = st.sampled_from(["clip.mp4", "fast.mp4", "clip.mkv"])


@settings(max_examples=40)
@given(name=names, share=st.floats(0.0, 1.0, exclude_max=True))
def test_a_truncated_file_is_never_accepted_silently(name: str, share: float) -> None:
    data = clip_bytes(name)
    whole = load_damaged(name, data)
    cut = load_damaged(name, data[: int(share * len(data))])
    assert whole is not None
    # a twentieth of the length may be missing without an error
    assert cut is None or (cut[0] == whole[0] and cut[1] > whole[1] - 0.11)


@settings(max_examples=60)
@given(
    name=names, places=st.lists(st.floats(0, 1), min_size=1, max_size=6), byte=st.integers(0, 255)
)
def test_damage_is_refused_or_survived(name: str, places: list[float], byte: int) -> None:
    data = bytearray(clip_bytes(name))
    for place in places:
        data[int(place * (len(data) - 1))] = byte
    load_damaged(name, bytes(data))
