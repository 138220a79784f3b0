"""Tokenized multimodal batches with Qwen2.5-Omni's real ids: text, media, batch and positions.

The goldens are ``golden/real-vocab-*``. The same ones hold for the processor of a real checkpoint
(``--omni-checkpoint``), whose own template, tokenizer and preprocessing are then checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from real_vocab_cases import MIXED, SAMPLES, batch_of, inputs_of, weightless

from omni_grpo_core.core.forward import positions
from omni_grpo_core.pipeline.checks import check_media, check_text

if TYPE_CHECKING:
    from omni_grpo_core.core.policy import Policy
    from omni_grpo_core.golden.pytest_fixture import OmniGolden
    from omni_grpo_core.pipeline.inputs import Inputs

Pass = tuple["Policy", "Inputs"]


@pytest.fixture(scope="module")
def built(qwen: Any) -> Pass:
    policy = weightless(qwen)
    return policy, inputs_of(policy)


@pytest.fixture(scope="module")
def published(omni_checkpoint: Path) -> Pass:
    from transformers import Qwen2_5OmniProcessor

    processor = Qwen2_5OmniProcessor.from_pretrained(omni_checkpoint, local_files_only=True)
    policy = weightless(processor)
    return policy, inputs_of(policy)


def check_case(golden: OmniGolden, done: Pass, name: str) -> None:
    policy, inputs = done
    index = list(SAMPLES).index(name)
    batch = batch_of(policy, inputs, name)
    for stage, value in {
        "text": inputs.prompts[index],
        "media": inputs.media[index],
        "batch": batch,
        "positions": positions(policy, batch),
    }.items():
        golden.check(value, stage, case=f"real-vocab-{name}", decode=policy.decode)


def check_mixed(golden: OmniGolden, done: Pass) -> None:
    policy, inputs = done
    batch = batch_of(policy, inputs, *MIXED)
    # the rows have their own goldens; these are what collating adds
    added = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    golden.check(added, "batch", case="real-vocab-mixed", decode=policy.decode)
    golden.check(positions(policy, batch), "positions", case="real-vocab-mixed")


@pytest.mark.parametrize("name", SAMPLES)
def test_case(omni_golden: OmniGolden, built: Pass, name: str) -> None:
    check_case(omni_golden, built, name)


def test_mixed_batch(omni_golden: OmniGolden, built: Pass) -> None:
    check_mixed(omni_golden, built)


@pytest.mark.full
@pytest.mark.parametrize("name", SAMPLES)
def test_case_of_a_checkpoint(omni_golden: OmniGolden, published: Pass, name: str) -> None:
    check_case(omni_golden, published, name)


@pytest.mark.full
def test_mixed_batch_of_a_checkpoint(omni_golden: OmniGolden, published: Pass) -> None:
    check_mixed(omni_golden, published)


def test_the_cases_are_sound(built: Pass) -> None:
    """A golden of something broken would preserve it."""
    policy, inputs = built
    failed = [
        check
        for check in (
            *check_text(inputs.conversations, inputs.prompts, policy.processor),
            *check_media(inputs.media),
        )
        if not check.ok
    ]
    assert failed == []
    modes = [row.audio_in_video for row in inputs.batch.rows]
    assert modes == ["interleaved", "separate", "off", "off", "off", "off"]
    # 3 s at 2 fps: 6 frames, 3 pairs of 4 tokens, 75 of sound; 2 s of each, then the rest
    spans = [(span.modality, span.length) for span in inputs.batch.rows[0].spans]
    assert spans == [("video", 8), ("audio", 50), ("video", 4), ("audio", 25)]


def test_positions_are_those_of_the_full_model(built: Pass) -> None:
    """The small config agrees with the 7B model's, which is transformers' default, in everything
    that positions depend on."""
    from transformers import Qwen2_5OmniThinkerConfig

    full, small = Qwen2_5OmniThinkerConfig(), built[0].model.config
    for name in (
        "audio_token_id",
        "image_token_id",
        "video_token_id",
        "audio_start_token_id",
        "audio_end_token_id",
        "position_id_per_seconds",
        "seconds_per_chunk",
    ):
        assert getattr(small, name) == getattr(full, name), name
    assert small.vision_config.spatial_merge_size == full.vision_config.spatial_merge_size
