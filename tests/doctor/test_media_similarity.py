"""What counts as the same picture or sound: from another decoder yes, from another file no."""

from __future__ import annotations

import torch
from doctor_recordings import medium

from omni_grpo_core.doctor.media_similarity import (
    is_empty,
    levels,
    looks_alike,
    same_levels,
    sounds_alike,
)

# a sound that rises, as one that repeats itself is the same played backwards
TONE = torch.sin(torch.cumsum(torch.linspace(0.05, 0.4, 16_000), 0))
OTHER = torch.sin(torch.arange(16_000) * (2 * torch.pi * 620 / 16_000))


def test_a_sound_may_start_a_codecs_priming_later() -> None:
    late = torch.cat([torch.zeros(300), TONE])
    assert sounds_alike(late, TONE)
    assert sounds_alike(-TONE, TONE), "a sign is not heard"
    assert not sounds_alike(OTHER, TONE)
    assert not sounds_alike(TONE.flip(0), TONE), "it has the same spectrum"


def test_a_sound_of_another_length_or_loudness_is_different() -> None:
    assert not sounds_alike(TONE[:12_000], TONE)
    assert not sounds_alike(TONE * 0.5, TONE)


def test_pictures_may_round_or_be_resized_differently() -> None:
    picture = torch.linspace(0, 255, 3 * 56 * 56).reshape(3, 56, 56)
    assert same_levels(picture + 0.5, picture)
    assert not same_levels(picture + 5, picture)
    assert looks_alike(picture + 5, picture)
    assert not looks_alike(picture.flip(0), picture)


def test_pictures_between_0_and_1_are_levels_only_if_the_processor_leaves_them() -> None:
    picture = torch.rand(3, 28, 28)
    assert torch.equal(levels(picture, {}), picture)
    assert torch.equal(levels(picture, {"do_rescale": False}), picture * 255)
    assert torch.equal(levels(picture, {"images_kwargs": {"do_rescale": False}}), picture * 255)


def test_blank_and_silent_at_any_scale() -> None:
    assert is_empty(medium("audio", torch.zeros(100)))
    assert not is_empty(medium("audio", TONE))
    assert is_empty(medium("image", torch.full((3, 28, 28), 0.5)))
    assert not is_empty(medium("image", torch.rand(3, 28, 28)))
