"""One number for the same content, however it is computed."""

from __future__ import annotations

import pytest
import torch

from omni_grpo_core.trace.digest import (
    _SEEDS,
    _coefficients,
    _digested_by_torch,
    _words,
    digest,
    digest_of,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 7)])
def test_a_cpu_and_another_device_agree(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """On a CPU numpy computes it; elsewhere torch does, by another formula."""
    # large and of both signs: every bit of a word is used, and products wrap around
    units = (torch.arange(torch.Size(shape).numel()) * 0x9E3779B97F4A7C15 >> 3).reshape(shape)
    units = units.to(dtype) if dtype.is_floating_point else units.view(torch.int64).to(dtype)
    words = _words(units.reshape(len(units), -1))
    coefficients = (_coefficients(seed, words.shape[1], words.device) for seed in _SEEDS)
    assert digest(units).equal(_digested_by_torch(words, *coefficients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("height", [4, 5])
def test_a_frame_of_sound_is_a_unit_wherever_it_lies(dtype: torch.dtype, height: int) -> None:
    frames = torch.arange(2.0 * height * 3).reshape(2, height, 3).to(dtype)
    by_frame = digest(frames.transpose(1, 2).flatten(0, 1)).view(2, 3)
    assert digest_of("input_features", frames).equal(by_frame)
    assert len(set(by_frame.flatten().tolist())) == 6


@pytest.mark.parametrize("heard", [0, 3, 700])
def test_padding_is_digested_once_and_is_as_any_frame(heard: int) -> None:
    frames = torch.full((1, 2, 2000), -1.5)
    frames[..., :heard] = torch.arange(1.0, heard + 1)
    by_frame = digest(frames.transpose(1, 2).flatten(0, 1)).view(1, 2000)
    assert digest_of("input_features", frames).equal(by_frame)
