"""The families' facts, compared with transformers' own functions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni

from omni_grpo_core import tiny
from omni_grpo_core.core.family import FAMILIES, QWEN2_5_OMNI, QWEN3_OMNI, Family, family_of
from omni_grpo_core.core.policy import load_policy, require_library
from omni_grpo_core.errors import CheckpointError

HAS_QWEN3 = hasattr(transformers, QWEN3_OMNI.thinker_class)
LENGTHS = range(3, 1500)


def test_audio_tokens_of_the_first_family_are_the_library_s() -> None:
    tower = modeling_qwen2_5_omni.Qwen2_5OmniAudioEncoder
    _, lengths = tower._get_feat_extract_output_lengths(None, torch.tensor(LENGTHS))
    assert lengths.tolist() == [QWEN2_5_OMNI.audio_tokens(frames) for frames in LENGTHS]


@pytest.mark.skipif(not HAS_QWEN3, reason="this transformers has no Qwen3-Omni")
def test_audio_tokens_of_the_second_family_are_the_library_s() -> None:
    from transformers.models.qwen3_omni_moe import processing_qwen3_omni_moe

    lengths = processing_qwen3_omni_moe._get_feat_extract_output_lengths(torch.tensor(LENGTHS))
    assert lengths.tolist() == [QWEN3_OMNI.audio_tokens(frames) for frames in LENGTHS]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_full_models_and_thinkers_belong_to_their_family(family: Family) -> None:
    assert [family_of(name, "x") for name in family.model_types] == [family, family]


def test_another_architecture_is_refused_with_the_known_names() -> None:
    with pytest.raises(CheckpointError, match=r"qwen2_5_omni, .*qwen3_omni_moe_thinker"):
        family_of("llama", "folder")


def test_a_family_that_this_transformers_lacks_is_reported() -> None:
    with pytest.raises(
        CheckpointError, match=r"transformers 9\.0 or newer, which has Qwen9Thinker"
    ):
        require_library(Path("x"), replace(QWEN3_OMNI, since="9.0", thinker_class="Qwen9Thinker"))


@pytest.mark.skipif(HAS_QWEN3, reason="this transformers has Qwen3-Omni")
def test_under_an_old_transformers_the_error_names_the_version_needed() -> None:
    with pytest.raises(CheckpointError, match=r"wanted transformers 4\.57 or newer"):
        load_policy(tiny.checkpoint_dir("qwen3"))
