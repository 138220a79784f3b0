"""The second family's shipped checkpoint on the shipped clips, loaded once per worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from omni_grpo_core.core.policy import Policy
    from omni_grpo_core.pipeline.inputs import Inputs
    from omni_grpo_core.pipeline.settings import Settings
    from omni_grpo_core.types import Batch, Sample


@pytest.fixture(scope="session")
def qwen3_policy() -> Policy:
    """Shared: a test that changes the model's modes must restore them."""
    import transformers

    from omni_grpo_core import tiny
    from omni_grpo_core.core.family import QWEN3_OMNI
    from omni_grpo_core.core.policy import load_policy

    if not hasattr(transformers, QWEN3_OMNI.thinker_class):
        pytest.skip(f"transformers {transformers.__version__} has no Qwen3-Omni")
    return load_policy(tiny.checkpoint_dir("qwen3"))


@pytest.fixture(scope="session")
def qwen3_settings() -> Settings:
    from dataclasses import replace

    from omni_grpo_core import tiny
    from omni_grpo_core.pipeline.settings import load_settings

    return replace(load_settings(tiny.checkpoint_dir("qwen3")), group_size=2)


@pytest.fixture(scope="session")
def qwen3_inputs(
    qwen3_policy: Policy, samples: tuple[Sample, ...], qwen3_settings: Settings
) -> Inputs:
    """Everything up to the batch of all shipped samples."""
    from omni_grpo_core.pipeline.inputs import prepare

    return prepare(qwen3_policy, samples, qwen3_settings)


@pytest.fixture(scope="session")
def qwen3_mixed(qwen3_policy: Policy, qwen3_inputs: Inputs) -> Batch:
    """A padded batch of five: a clip of each audio mode, an image and a text-only row."""
    from omni_grpo_core.core.batch import collate

    rows = qwen3_inputs.batch.rows
    chosen = [
        next(
            r for r in reversed(rows) if r.audio_in_video == mode and "video_grid_thw" in r.tensors
        )
        for mode in ("interleaved", "separate", "off")
    ]
    chosen.append(next(row for row in rows if "pixel_values" in row.tensors))
    chosen.append(next(row for row in rows if not row.tensors))
    return collate(chosen, qwen3_policy.pad_token_id)
