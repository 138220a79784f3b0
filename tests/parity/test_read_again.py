"""How another preprocessing read a file: found from the file itself. What it shows is made here by
Pillow, torchvision, soundfile and numpy as people write it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from omni_grpo_core.core.decode import inspect, read_audio
from omni_grpo_core.parity.read_again import read_picture, read_sound
from omni_grpo_core.types import MediaRef

Picture = PIL.Image.Image
LOADS_LIBROSA = pytest.mark.slow  # several seconds, once all other resamplers were tried
SIZE = (56, 84)  # height, width
BICUBIC, BILINEAR = PIL.Image.Resampling.BICUBIC, PIL.Image.Resampling.BILINEAR


def drawing() -> NDArray[np.uint8]:
    """90 x 120 pixels: a slope of colour with a sharp square in it."""
    y, x = np.mgrid[0:90, 0:120]
    made = np.stack([2 * x, 2 * y, x + y], -1).astype(np.uint8)
    made[20:50, 30:80] = (200, 40, 90)
    return made


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of it is transparent, and its EXIF turns it by half a turn."""
    alpha = np.full((90, 120), 255, np.uint8)
    alpha[:, 60:] = 100
    image = PIL.Image.fromarray(np.dstack([drawing(), alpha]))
    exif = image.getexif()
    exif[0x0112] = 3
    path = tmp_path_factory.mktemp("pictures") / "drawing.png"
    image.save(path, exif=exif)
    return path


def tensor(image: Picture, kernel: PIL.Image.Resampling = BICUBIC) -> Tensor:
    made = np.array(image.resize((SIZE[1], SIZE[0]), kernel))
    return torch.from_numpy(made).permute(2, 0, 1).float() / 255


def flat(image: Picture, colour: str = "white") -> Picture:
    ground = PIL.Image.new("RGB", image.size, colour)
    ground.paste(image, mask=image.getchannel("A"))
    return ground


def upright(path: Path) -> Picture:
    return PIL.ImageOps.exif_transpose(PIL.Image.open(path))


def through_jpeg(path: Path) -> Tensor:
    flat(upright(path)).save(path.with_name("again.jpg"), quality=80)
    return tensor(PIL.Image.open(path.with_name("again.jpg")))


def as_opencv(path: Path) -> Tensor:
    whole = torch.from_numpy(np.array(flat(upright(path)))).permute(2, 0, 1)
    made: Tensor = resize(whole, list(SIZE), InterpolationMode.BILINEAR, antialias=False)
    return made.float() / 255


@pytest.mark.parametrize(
    ("read", "name", "said"),
    [
        (lambda p: tensor(flat(PIL.Image.open(p))), "exif-ignored", "not turned upright"),
        (lambda p: tensor(flat(upright(p), "black")), "transparency-on-black", "on black"),
        (lambda p: tensor(upright(p).convert("RGB")), "transparency-dropped", "the colours that"),
        (lambda p: tensor(flat(upright(p)).convert("L").convert("RGB")), "grey", "without colour"),
        (lambda p: tensor(flat(upright(p)), BILINEAR), "other-kernel", "resized bilinearly"),
        (as_opencv, "other-kernel", "resized bilinearly without antialiasing"),
        (through_jpeg, "jpeg", "stored as JPEG of quality 80 in between"),
        # two at once
        (
            lambda p: tensor(flat(upright(p), "black"), BILINEAR),
            "transparency-on-black",
            "transparent on black instead of white, resized bilinearly",
        ),
    ],
)
def test_a_picture(read: Callable[[Path], Tensor], name: str, said: str, file: Path) -> None:
    found = read_picture(MediaRef("image", str(file)), tensor(flat(upright(file))), read(file))
    assert found is not None
    assert (found[0], said in found[1]) == (name, True), found


def test_another_picture_is_not_explained(file: Path) -> None:
    right = tensor(flat(upright(file)))
    assert read_picture(MediaRef("image", str(file)), right, 1 - right) is None


def test_a_picture_resized_to_another_size_and_not_turned(file: Path) -> None:
    """The size is the other side's, as it follows from the way in which it was opened."""
    tall = PIL.Image.open(file)
    made = np.array(flat(tall).resize((56, 112), BICUBIC))
    now = torch.from_numpy(made).permute(2, 0, 1).float() / 255
    found = read_picture(MediaRef("image", str(file)), tensor(flat(upright(file))), now)
    assert found == ("exif-ignored", "not turned upright as its EXIF says")


# --------------------------------------------------------------------------- sounds


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a second at 48 kHz: 440 Hz on the left, 660 Hz, less loud, on the right."""
    at = np.arange(24_000) / 48_000
    both = np.stack([0.4 * np.sin(2 * np.pi * 440 * at), 0.1 * np.sin(2 * np.pi * 660 * at)], 1)
    path = tmp_path_factory.mktemp("sounds") / "two.wav"
    soundfile.write(path, both, 48_000, subtype="FLOAT")
    return path


def raw(path: Path) -> NDArray[np.float32]:
    """(n, 2)."""
    read: NDArray[np.float32] = soundfile.read(path, dtype="float32")[0]
    return read


@pytest.mark.parametrize(
    ("read", "name", "said"),
    [
        (lambda p: raw(p).mean(1), "rate-ignored", "its 48000 samples a second taken for 16000"),
        # of 440 and 660 Hz nothing is lost by taking every third sample
        (lambda p: raw(p).mean(1)[::3], "other-resampler", "resampled by leaving samples out"),
        pytest.param(
            lambda p: raw(p)[:, 1],
            "other-channels",
            "channel 1 only, its 48000 samples a second taken for 16000",
            marks=LOADS_LIBROSA,
        ),
        pytest.param(
            lambda p: raw(p).reshape(-1),
            "other-channels",
            "its channels' samples one after the other, its 48000 samples a second taken for 16000",
            marks=LOADS_LIBROSA,
        ),
        pytest.param(
            lambda p: raw(p)[::3, 0],
            "other-channels",
            "channel 0 only, resampled by leaving samples out",
            marks=LOADS_LIBROSA,
        ),
    ],
)
def test_a_sound(
    read: Callable[[Path], NDArray[np.float32]], name: str, said: str, recording: Path
) -> None:
    assert read_sound(str(recording), torch.from_numpy(read(recording).copy())) == (name, said)


@LOADS_LIBROSA
def test_one_channel_through_our_own_resampler(recording: Path) -> None:
    """Written to a file of its own, the left channel is what our decoder makes of it."""
    left = recording.with_name("left.wav")
    soundfile.write(left, raw(recording)[:, 0], 48_000, subtype="FLOAT")
    now = torch.from_numpy(read_audio(inspect(left)).copy())
    assert read_sound(str(recording), now) == ("other-channels", "channel 0 only")


@LOADS_LIBROSA
def test_another_sound_is_not_explained(recording: Path) -> None:
    assert read_sound(str(recording), torch.linspace(-1, 1, 8000)) is None
