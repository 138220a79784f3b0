"""The frames of a clip by another library: the same, or which differ, by how much."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import av
import numpy as np
import pytest
from media_files import lossless, numbered, write_media
from numpy.typing import NDArray

from omni_grpo_core import tiny
from omni_grpo_core.core.media import MediaConfig
from omni_grpo_core.core.second_decoder import Frames, Name, load_decoder, second_opinions
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.types import MediaRef

# 16 frames at 8 a second, two of them taken a second
CONFIG = MediaConfig(fps=2.0, min_frames=2, max_frames=8)


def plain(path: Path, numbers: Sequence[int]) -> tuple[int, Frames]:
    """A second decoder in three lines: every frame of the file, in the order of its packets."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return len(frames), [frames[number] for number in numbers]


def changed(
    change: Callable[[int, Callable[[int], NDArray[np.uint8]]], NDArray[np.uint8]], total: int = 16
) -> Any:
    def decode(path: Path, numbers: Sequence[int]) -> tuple[int, Frames]:
        _, whole = plain(path, range(16))
        return total, [change(number, lambda n: whole[min(n, 15)]) for number in numbers]

    return decode


@pytest.mark.parametrize(
    ("decode", "words"),
    [
        # evenly spaced over 16 frames: 0, 5, 10, 15
        (plain, "✓ decord: c.mkv: the same 4 frames (largest difference 0 of 255, at most 0.00 o"),
        (
            changed(lambda n, frame: frame(n) + np.uint8(n == 5)),
            "✓ decord: c.mkv: the same 4 frames (largest difference 1 of 255, at most 1.00 on",
        ),
        (
            changed(lambda n, frame: frame(n + 1)),
            "✗ decord: c.mkv: 3 of 4 frames differ: 0 is our 1, 5 is our 6, 10 is our 11",
        ),
        (
            changed(lambda n, frame: frame(n) + np.uint8(40 * (n == 10))),
            "✗ decord: c.mkv: 1 of 4 frames differ: 10 by 40.0 levels",
        ),
        (
            changed(lambda n, frame: frame(n), total=17),
            "✗ decord: c.mkv: 17 frames in all instead of 16",
        ),
        (
            changed(lambda n, frame: frame(n)[:, :-2]),
            "✗ decord: c.mkv: 4 of 4 frames differ: 0 by 255.0 levels",
        ),
        (
            changed(lambda n, frame: (np.ones(1) / (n - 5)).astype(np.uint8)),
            "✗ decord: c.mkv is not decoded: FloatingPointError",
        ),
    ],
)
def test_what_a_second_decoder_gives(tmp_path: Path, decode: Any, words: str) -> None:
    clip = MediaRef("video", str(lossless(tmp_path / "c.mkv", numbered(16))))
    with np.errstate(divide="raise"):
        # each clip once, and only clips
        (one,) = second_opinions([clip, clip, MediaRef("audio", "a.wav")], CONFIG, "decord", decode)
    assert one.words.startswith(words)
    assert one.same == words.startswith("✓")


def test_a_stretch_is_compared_at_its_own_frames(tmp_path: Path) -> None:
    path = lossless(tmp_path / "c.mkv", numbered(16))
    (one,) = second_opinions([MediaRef("video", str(path), 1.0, 2.0)], CONFIG, "decord", plain)
    assert (one.same, one.compared, one.total) == (True, 2, 16)


@pytest.mark.skipif(find_spec("decord") is not None, reason="decord is installed")
def test_a_decoder_that_is_not_installed(
    run_cli: Callable[..., tuple[int, str, str]],
) -> None:
    with pytest.raises(ConfigError, match=r"no package decord, wanted .*; pip install decord"):
        load_decoder("decord")
    code, _, err = run_cli("check", "--limit", 1, "--second-decoder", "decord")
    assert (code, "--second-decoder decord: found no package" in err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", get_args(Name))
def test_installed_decoders_give_our_frames(
    name: Name, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    """The real libraries, where they are installed (``tox -e decoders``)."""
    try:
        load_decoder(name)
    except ConfigError as error:
        pytest.skip(str(error))
    code, out, _ = run_cli("check", "--limit", 3, "--second-decoder", name, "--json")
    found = json.loads(out)["second_decoder"]
    assert code == 0
    assert [one["compared"] > 0 and not one["differ"] for one in found] == [True] * 2
    clips = [
        lossless(tmp_path / "lossless.mkv", numbered(16)),
        write_media(tmp_path / "b-frames.mp4", numbered(16)),
        tiny.data_file().parent / "clip-09.mp4",
    ]
    refs = [MediaRef("video", str(clip)) for clip in clips]
    for one in second_opinions(refs, CONFIG, name):
        assert one.same, one.words
