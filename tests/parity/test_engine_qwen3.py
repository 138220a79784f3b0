"""The tiny Qwen3-Omni in the real vLLM: ``tox -e vllm``. What agrees, and what is refused instead.

Its positions may be fractions (13 a second), which vLLM 0.32 cuts off, and vLLM pads the sound of a
clip to whole mel frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lanes import at, clip_row

from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.engines.proof import prove
from omni_grpo_core.engines.sides import Sides
from omni_grpo_core.engines.vllm_backend import EngineSettings, VllmBackend
from omni_grpo_core.engines.weights import write_checkpoint
from omni_grpo_core.errors import BatchError
from omni_grpo_core.pipeline.inputs import prepare
from omni_grpo_core.pipeline.settings import Settings, load_settings
from omni_grpo_core.tiny import checkpoint_dir, data_file
from omni_grpo_core.tolerances import ENGINE
from omni_grpo_core.types import Sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: tox -e vllm"),
    # vLLM's and its libraries' own
    pytest.mark.filterwarnings("default"),
]
CHECKPOINT = checkpoint_dir("qwen3")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(CHECKPOINT)


@pytest.fixture(scope="module")
def backend(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmBackend]:
    folder = tmp_path_factory.mktemp("weights")
    write_checkpoint(policy, policy.model.state_dict(), folder)
    backend = VllmBackend(EngineSettings(max_model_len=1024))
    backend.load(folder)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def samples() -> tuple[Sample, ...]:
    return load_samples(data_file())


def short(settings: Settings, **changes: Any) -> Settings:
    return replace(settings, temperature=1.5, max_new_tokens=24, **changes)


def proved(
    backend: VllmBackend, policy: Policy, settings: Settings, samples: list[Sample]
) -> set[tuple[str, str]]:
    """What is wrong; with nothing, logprobs are within 1e-4 (1e-5 measured)."""
    inputs = prepare(policy, samples, settings)
    proof = prove(Sides(policy, backend, settings, ENGINE["float32"]), inputs, 0)
    assert proof.numbers.get("engine/gap_max", 0) <= 1e-4
    return {(r.stage, c.name) for r in proof.records for c in r.checks if not c.ok}


def test_pictures_sounds_and_text(
    backend: VllmBackend, policy: Policy, samples: tuple[Sample, ...]
) -> None:
    settings = short(load_settings(CHECKPOINT))
    assert proved(backend, policy, settings, list(samples[16:22])) == set()


@pytest.mark.parametrize("mode", ["interleaved", "separate", "off"])
def test_clips_at_whole_positions(
    backend: VllmBackend, policy: Policy, mode: Any, tmp_path: Path
) -> None:
    """Of 4 s at one and at two frames a second: patches of 26 and 13 positions."""
    for frames, rate in ((4, 1), (8, 2)):
        settings = short(at(rate, frames), audio_in_video=mode)
        assert proved(backend, policy, settings, [clip_row(tmp_path, frames, rate)]) == set()


def test_clips_at_fractions_are_refused(
    backend: VllmBackend, policy: Policy, tmp_path: Path
) -> None:
    with pytest.raises(BatchError, match=r"6\.5 positions apart"):
        proved(backend, policy, short(at(4, 8)), [clip_row(tmp_path, 8, 4)])


def test_a_padded_sound_is_found(
    backend: VllmBackend, policy: Policy, samples: tuple[Sample, ...]
) -> None:
    """3.008 s of AAC: 39 tokens by the model's own processor, 40 in vLLM."""
    own = load_settings(CHECKPOINT)
    settings = short(own, audio_in_video="separate", media=replace(own.media, fps=2.0))
    assert proved(backend, policy, settings, [samples[12]]) == {
        ("batch", "media have the batch's size in the engine")
    }


def test_new_weights_are_taken_over(
    backend: VllmBackend, samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    """On a CPU vLLM is started anew for it: it has packed the experts' weights."""
    policy, generator = load_policy(CHECKPOINT), torch.Generator().manual_seed(0)
    for weight in policy.model.parameters():
        weight.data += 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
    write_checkpoint(policy, policy.model.state_dict(), tmp_path)
    backend.load(tmp_path)
    settings = short(load_settings(CHECKPOINT))
    assert proved(backend, policy, settings, list(samples[16:22])) == set()
