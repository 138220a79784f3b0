"""Which frames a clip gives, at what size, orientation and rate."""

from __future__ import annotations

import gc
import math
import multiprocessing
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from media_files import (
    load_video,
    lossless,
    numbered,
    numbers,
    tone,
    write_media,
)
from qwen_omni_utils.v2_5 import vision_process
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from omni_grpo_core.core.decode import _upright
from omni_grpo_core.core.media import MediaConfig
from omni_grpo_core.errors import ConfigError, MediaError


@pytest.mark.parametrize(("height", "width"), [(56, 84), (37, 53), (61, 45), (100, 31)])
def test_frames_are_those_of_a_plain_resize(tmp_path: Path, height: int, width: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (8, height, width, 3), np.uint8)
    clip = lossless(tmp_path / "clip.mkv", frames)
    video = load_video(clip, MediaConfig())
    size = vision_process.smart_resize(height, width, 28, 128 * 28 * 28, 768 * 28 * 28)
    wanted = resize(
        torch.from_numpy(frames).permute(0, 3, 1, 2)[[0, 2, 5, 7]],
        list(size),
        interpolation=InterpolationMode.BICUBIC,
        antialias=True,
    )
    assert video.frames.equal(wanted.float())


def test_a_forked_process_can_free_a_frame() -> None:
    """A forked data loader's worker hung forever in its garbage collector: it freed a frame whose
    conversion had run in threads, and waited for threads that a fork does not copy."""
    gc.collect()  # frees what other tests created in threads of their own
    held: list[object] = [av.VideoFrame(64, 48, "yuv420p")]
    _upright(Path("a.mp4"), held[0])
    held.append(held)  # a reference cycle: only the collector frees it
    del held
    child = multiprocessing.get_context("fork").Process(target=gc.collect)
    child.start()
    child.join(300)  # a last resort: freeing a frame takes no time
    hangs = child.is_alive()
    child.kill()
    child.join()
    assert not hangs


def test_frames_do_not_wait_for_the_collector(tmp_path: Path) -> None:
    """A frame and its side data referred to each other: a thousand frames at full size stayed in
    memory until the collector happened to run (7.4 GB for a clip of 2.06)."""
    clip = write_media(tmp_path / "c.mp4", numbered(16), rotation=90)
    gc.collect()
    gc.disable()
    try:
        load_video(clip, MediaConfig(fps=8, max_pixels=56 * 84))
        left = [found for found in gc.get_objects() if type(found) is av.VideoFrame]
    finally:
        gc.enable()
    assert not left


def test_same_frames_whatever_the_threads(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (16, 56, 84, 3), np.uint8)
    clip = write_media(tmp_path / "clip.mp4", frames)
    with av.open(str(clip)) as container:
        container.streams.video[0].thread_type = "NONE"
        container.streams.video[0].codec_context.thread_count = 1
        alone = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    video = load_video(clip, MediaConfig(fps=8, max_pixels=56 * 84))
    wanted = torch.from_numpy(np.stack(alone)).permute(0, 3, 1, 2)
    assert video.frames.equal(wanted.float())  # 56 x 84 is not resized


@pytest.mark.parametrize(
    ("count", "config", "chosen", "sample_fps"),
    [
        # half the frames of two seconds at 8 fps
        (16, MediaConfig(fps=4, max_pixels=4704), [0, 2, 4, 6, 9, 11, 13, 15], 4.0),
        # more than there are: all of them, at the clip's own rate
        (16, MediaConfig(fps=60, max_pixels=4704), list(range(16)), 8.0),
        # two wanted by fps, four by min_frames
        (8, MediaConfig(max_pixels=4704), [0, 2, 5, 7], 4.0),
        # four wanted by fps, two allowed
        (16, MediaConfig(min_frames=2, max_frames=2, max_pixels=4704), [0, 15], 1.0),
        # an odd count drops a frame: frames enter the model in pairs
        (3, MediaConfig(max_pixels=4704), [0, 2], 2 / 3 * 8),
        # a single frame is taken twice: two frames in an eighth of a second are sixteen a second
        (1, MediaConfig(max_pixels=4704), [0, 0], 16.0),
    ],
)
def test_number_of_frames_and_true_rate(
    tmp_path: Path, count: int, config: MediaConfig, chosen: list[int], sample_fps: float
) -> None:
    video = load_video(lossless(tmp_path / "clip.mkv", numbered(count)), config)
    assert numbers(video.frames) == chosen
    assert video.sample_fps == pytest.approx(sample_fps)
    assert len(video.frames) / video.sample_fps == pytest.approx(count / 8)
    assert video.duration == pytest.approx(count / 8)


def test_uneven_frames_are_chosen_by_time(tmp_path: Path) -> None:
    # five frames in the first half second, then one that lasts for another two
    times = [0, 100, 200, 300, 400, 500, 2_500]
    clip = lossless(tmp_path / "clip.mkv", numbered(7), times_ms=times)
    video = load_video(clip, MediaConfig(fps=2.0, max_pixels=4704))
    # by number it would be 0, 2, 4, 6: the two still seconds would be a quarter of the clip
    assert numbers(video.frames) == [0, 5, 5, 5]
    assert len(video.frames) / video.sample_fps == pytest.approx(video.duration)
    assert video.duration == pytest.approx(2.5, abs=0.2)  # the last frame's length is not stored


def test_rates_of_rounded_timestamps_are_exact(tmp_path: Path) -> None:
    """Matroska rounds 1/30 s to 33 ms; the rate is still 30."""
    video = load_video(lossless(tmp_path / "clip.mkv", numbered(20), fps=30))
    assert video.source_fps == 30.0


def test_frames_whose_packets_have_no_presentation_time(tmp_path: Path) -> None:
    """AVI has no timestamps: frames stored out of order (B-frames) come with wrong ones."""
    clip = write_media(tmp_path / "clip.avi", numbered(16))
    with av.open(str(clip)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times != sorted(times)
    video = load_video(clip)
    assert numbers(video.frames) == [0, 5, 10, 15]
    assert (video.sample_fps, video.duration) == (2.0, 2.0)


def test_stretch_of_a_video(tmp_path: Path) -> None:
    clip = lossless(
        tmp_path / "clip.mkv", numbered(24), audio=tone(3.0, 48_000), audio_codec="flac"
    )
    video = load_video(clip, MediaConfig(fps=8, max_pixels=4704), start=1.0, end=2.0)
    # eight of the nine frames from 8 to 16, evenly; the one that appears at the end is included
    assert numbers(video.frames) == [8, 9, 10, 11, 13, 14, 15, 16]
    assert video.duration == pytest.approx(9 / 8)
    assert numbers(load_video(clip, start=2.5).frames) == [20, 21, 22, 23]
    assert numbers(load_video(clip, end=0.4).frames) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("degrees", "hflip"), [(90, False), (180, False), (270, False), (0, True), (90, True)]
)
def test_rotation_is_applied(tmp_path: Path, degrees: int, hflip: bool) -> None:
    frames = np.zeros((4, 56, 84, 3), np.uint8)
    frames[:, :28, :42] = 250  # bright top left
    clip = write_media(tmp_path / "clip.mp4", frames, rotation=degrees, hflip=hflip)
    video = load_video(clip)
    upright = np.rot90(frames[0], degrees // 90)
    if hflip:
        upright = upright[:, ::-1]
    assert video.frames.shape[2:] == upright.shape[:2]
    bright = video.frames[0].mean(0) > 125
    # the codec blurs the edge of the bright corner: a few of 4,704 pixels may cross the threshold
    assert (bright != torch.from_numpy(upright[:, :, 0] > 125)).sum() < 100


def test_crooked_display_matrix_is_refused(tmp_path: Path) -> None:
    clip = write_media(tmp_path / "clip.mp4", numbered(4), rotation=45)
    with pytest.raises(MediaError, match=r"display matrix of -?45"):
        load_video(clip)


def test_size_limits(tmp_path: Path) -> None:
    clip = lossless(tmp_path / "clip.mkv", numbered(4, 120, 160))
    assert load_video(clip, MediaConfig()).frames.shape[2:] == (280, 392)  # ≥ 128 tokens of 28 x 28
    assert load_video(clip, MediaConfig(max_pixels=80 * 80)).frames.shape[2:] == (56, 84)
    assert load_video(clip, MediaConfig(min_pixels=400_000)).frames.shape[2:] == (560, 756)
    fixed = MediaConfig(min_pixels=56 * 56, max_pixels=56 * 56)
    square = lossless(tmp_path / "square.mkv", numbered(4, 56, 56))
    assert load_video(square, fixed).frames.shape[2:] == (56, 56)


@pytest.mark.parametrize(
    "limits",
    [
        {"fps": 0.0},
        {"fps": math.nan},
        {"fps": math.inf},
        {"min_frames": 1},
        {"min_frames": 8, "max_frames": 4},
        {"max_pixels": 100},
        {"min_pixels": 10_000, "max_pixels": 5_000},
        {"image_min_pixels": 0},
    ],
)
def test_limits_that_cannot_work(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="media "):
        MediaConfig(**limits)
