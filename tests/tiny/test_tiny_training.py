"""Shifting frames around their edges, checked with the real processor's patch layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.tiny import checkpoint_dir
from omni_grpo_core.tiny.clips import ALL, Clip
from omni_grpo_core.tiny.examples import make_example, make_row
from omni_grpo_core.tiny.questions import Question
from omni_grpo_core.tiny.training import (
    Plan,
    clip_lessons,
    clip_questions,
    patches,
    pictures,
    train,
)


@pytest.mark.parametrize("seconds", [1, 3])
def test_pictures_are_the_frames_that_were_processed(
    policy: Policy, tmp_path: Path, seconds: int
) -> None:
    question = Question(Clip(ALL[0], seed=7, seconds=seconds), "off", "motion", 0)
    example = make_example(question, tmp_path)
    row = make_row(example, policy)
    flat, (grid,) = row.tensors["pixel_values_videos"], row.tensors["video_grid_thw"].tolist()
    shown = pictures(flat, grid).flatten(0, 1)
    settings = policy.processor.video_processor
    mean = torch.tensor(settings.image_mean)[:, None, None]
    std = torch.tensor(settings.image_std)[:, None, None]
    # 1e-4: the processor fuses rescaling and normalising, which rounds differently in float32
    torch.testing.assert_close(
        shown, (example.media.videos[0].frames / 255 - mean) / std, atol=1e-4, rtol=0
    )


def test_patches_invert_pictures() -> None:
    grid = (3, 4, 4)
    rng = np.random.default_rng(0)
    flat = torch.from_numpy(rng.normal(size=(48, 3 * 2 * 14 * 14)))
    assert torch.equal(patches(pictures(flat, grid), grid), flat)
    assert not torch.equal(patches(pictures(flat, grid).roll(1, dims=-1), grid), flat)


def test_stopping_early_takes_the_first_steps_of_the_full_training() -> None:
    """With the same learning rates: it is not a shorter training."""
    curves: dict[int | None, list[float]] = {}
    for stop in (None, 2):
        plan = Plan(clips=2, questions_per_clip=1, steps=4, batch=2, stop=stop)
        policy = load_policy(checkpoint_dir())
        lessons = clip_lessons(policy, clip_questions(plan, 0), lambda *_: None)
        losses = curves[stop] = []
        train(
            policy, plan, lessons, seed=0, on_progress=lambda *done, to=losses: to.append(done[3])
        )
    assert len(curves[None]) == 4
    assert curves[2] == curves[None][:2]
