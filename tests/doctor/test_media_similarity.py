"""What counts as the same picture or sound: from another decoder yes, from another file no."""

from __future__ import annotations

from dataclasses import replace

import torch
from doctor_recordings import medium

from omni_grpo_core.doctor.media_similarity import is_close, is_empty, is_same

TONE = torch.sin(torch.arange(16_000) * (2 * torch.pi * 440 / 16_000))
OTHER = torch.sin(torch.arange(16_000) * (2 * torch.pi * 620 / 16_000))


def test_a_sound_may_start_a_codecs_priming_later() -> None:
    late = torch.cat([torch.zeros(300), TONE])
    assert is_close(late, TONE, "audio")
    assert not is_close(OTHER, TONE, "audio")


def test_a_sound_of_another_length_or_loudness_is_different() -> None:
    assert not is_close(TONE[:12_000], TONE, "audio")
    assert not is_close(TONE * 0.5, TONE, "audio")


def test_pictures_may_round_differently() -> None:
    picture = torch.linspace(0, 255, 3 * 56 * 56).reshape(3, 56, 56)
    assert is_close(picture + 0.5, picture, "image")
    assert not is_close(picture.flip(0), picture, "image")


def test_media_too_large_to_keep_are_compared_by_statistics() -> None:
    clip = torch.linspace(0, 200, 4 * 3 * 56 * 56).reshape(4, 3, 56, 56)
    kept = medium("video", clip)
    described = replace(kept, values=None, std=float(clip.std(correction=0)))
    assert is_same(described, clip)
    assert not is_same(described, clip * 0.9)
    assert not is_same(described, clip[:2])


def test_blank_and_silent_at_any_scale() -> None:
    assert is_empty(medium("audio", torch.zeros(100)))
    assert not is_empty(medium("audio", TONE))
    assert is_empty(medium("image", torch.full((3, 28, 28), 0.5)))
    assert not is_empty(medium("image", torch.rand(3, 28, 28)))
