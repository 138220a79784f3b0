"""Which media files a loop opens while it is recorded."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import av
import pytest
from PIL import Image

from omni_grpo_core import tiny
from omni_grpo_core.recorder.hooks import Patches
from omni_grpo_core.recorder.media_files import MediaFileWatch
from omni_grpo_core.recorder.plain import Plain
from omni_grpo_core.recorder.step_buffer import Bounds, StepBuffer

FOLDER = tiny.data_file().parent
PICTURE, CLIP, SOUND = (str(FOLDER / f"clip-{name}") for name in ("12.png", "00.mp4", "14.wav"))


def test_files_are_noted_in_order_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By path, ``Path``, keyword, relative path or open file; bytes in memory have no file. All is
    as before afterwards."""
    monkeypatch.chdir(FOLDER)
    before = (Image.open, av.open, wave.open)
    patches, buffer = Patches(), StepBuffer(Bounds(), Plain())
    watch = MediaFileWatch(buffer)
    watch.start(patches)
    Image.open(io.BytesIO(Path(PICTURE).read_bytes()))
    with Image.open(PICTURE) as picture:
        assert picture.size == (56, 56)
    av.open(file=CLIP).close()
    with Path(PICTURE).open("rb") as file:
        Image.open(file)
    wave.open(Path(SOUND).name).close()
    with pytest.raises(FileNotFoundError):
        Image.open("nowhere.png")
    assert watch.take() == (PICTURE, CLIP, SOUND)
    assert watch.take() == ()
    watch.stop()
    patches.undo()
    assert (Image.open, av.open, wave.open) == before
    assert buffer.troubles == {}
