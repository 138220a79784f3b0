from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from omni_grpo_core.report.html.pictures import (
    Picture,
    frame_picture,
    mel_picture,
    ticks,
    waveform_picture,
)


def pixels(picture: Picture) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    image = Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2])))
    return np.asarray(image.convert("RGB") if image.mode == "P" else image)


def test_a_frame_keeps_every_pixel_the_model_was_given() -> None:
    frame = torch.randint(0, 256, (3, 6, 4), generator=torch.Generator().manual_seed(0)).float()
    picture = frame_picture(frame)
    assert picture.uri.startswith("data:image/png;base64,")
    assert (picture.width, picture.height, picture.exact) == (4, 6, True)
    assert (pixels(picture) == frame.permute(1, 2, 0).numpy()).all()


def test_a_large_frame_is_a_smaller_copy_and_says_so() -> None:
    picture = frame_picture(torch.full((3, 200, 400), 90, dtype=torch.uint8))
    assert (picture.width, picture.height, picture.exact) == (400, 200, False)
    assert pixels(picture).shape == (80, 160, 3)


def test_values_out_of_range_do_not_wrap_around() -> None:
    frame = torch.tensor([-5.0, 300.0, float("nan")]).reshape(3, 1, 1)
    assert pixels(frame_picture(frame)).tolist() == [[[0, 255, 0]]]


def test_the_waveform_is_tall_where_it_is_loud() -> None:
    wave = torch.cat([torch.zeros(100), torch.tensor([0.5, -0.5]).repeat(50)])
    drawn = (pixels(waveform_picture(wave))[..., 3] > 0).sum(axis=0)
    assert len(drawn) == 200
    assert drawn[:100].max() <= 2
    assert drawn[100:].min() >= 31


@pytest.mark.parametrize("samples", [0, 1, 5000])
def test_any_length_of_sound_can_be_drawn(samples: int) -> None:
    assert pixels(waveform_picture(torch.zeros(samples))).shape[0] == 64


def test_low_tones_are_at_the_bottom_and_loud_is_light() -> None:
    features = torch.zeros(4, 3)
    features[0, 1] = 2.0
    spectrogram = mel_picture(features)
    drawn = pixels(spectrogram.picture)
    assert drawn.shape == (4, 3, 3)
    assert (spectrogram.low, spectrogram.high) == (0.0, 2.0)
    assert drawn[3, 1].tolist() == [253, 231, 37]
    assert drawn[0, 1].tolist() == [68, 1, 84]


def test_a_long_sound_is_averaged_to_fit() -> None:
    spectrogram = mel_picture(torch.rand(8, 3000))
    assert pixels(spectrogram.picture).shape == (8, 800, 3)
    assert (spectrogram.picture.width, spectrogram.picture.exact) == (3000, False)


@pytest.mark.parametrize("seconds", [0.16, 0.9999, 1.02, 3.0, 29.7, 300.0])
def test_time_axes_have_few_round_ticks(seconds: float) -> None:
    marks = ticks(seconds)
    assert 3 <= len(marks) <= 7
    assert marks[0].label == "0 s"
    assert all(0 <= mark.at <= 100 for mark in marks)
    # a label is rounded to six digits
    assert float(marks[-1].label) / seconds == pytest.approx(marks[-1].at / 100, abs=1e-3)


def test_an_empty_sound_has_an_axis_too() -> None:
    assert [mark.label for mark in ticks(0)] == ["0 s"]
