"""The proof of agreement finds what goes wrong between trainer and engine, before any update.

The engine is transformers on its own copy of the policy: what crosses the boundary is what would
cross it to a real one. The same faults are planted in the real vLLM by ``test_vllm.py``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.engines.proof import Proof, prove
from omni_grpo_core.engines.sides import Sides
from omni_grpo_core.engines.transformers_backend import TransformersBackend
from omni_grpo_core.engines.weights import write_checkpoint
from omni_grpo_core.faults.boundary import BOUNDARY, Boundary, BoundaryFault
from omni_grpo_core.pipeline.hints import BY_ENGINE
from omni_grpo_core.pipeline.inputs import Inputs, prepare
from omni_grpo_core.pipeline.settings import Settings, load_settings
from omni_grpo_core.tiny import checkpoint_dir, data_file
from omni_grpo_core.tolerances import ENGINE
from omni_grpo_core.training.config import LoraConfig
from omni_grpo_core.training.trainable import adapter_off, add_lora, merged_weights
from omni_grpo_core.types import Check, Stage

ROWS = (0, 3, 17, 19, 21)
"""Interleaved, separate, a picture, a sound, text alone."""


@pytest.fixture(scope="module")
def settings() -> Settings:
    own = load_settings(checkpoint_dir())
    return replace(own, temperature=1.5, max_new_tokens=24)


@pytest.fixture
def policy() -> Policy:
    return load_policy(checkpoint_dir())


@pytest.fixture
def inputs(policy: Policy, settings: Settings) -> Inputs:
    samples = load_samples(data_file())
    return prepare(policy, [samples[i] for i in ROWS], settings)


def proved(
    policy: Policy, inputs: Inputs, settings: Settings, folder: Path, fault: BoundaryFault | None
) -> Proof:
    boundary = Boundary(TransformersBackend(), policy)
    if fault is not None:
        fault.plant(boundary)
    others = {"the adapter is applied in the engine": lambda: adapter_off(policy.model)}
    boundary.load(folder)
    return prove(Sides(policy, boundary, settings, ENGINE["float32"], others), inputs, 0)


def failed(proof: Proof) -> list[tuple[Stage, Check]]:
    return [(r.stage, c) for r in proof.records for c in r.checks if not c.ok]


def test_an_engine_that_agrees_is_proved_on_every_kind_of_row(
    policy: Policy, inputs: Inputs, settings: Settings, tmp_path: Path
) -> None:
    write_checkpoint(policy, policy.model.state_dict(), tmp_path)
    proof = proved(policy, inputs, settings, tmp_path, None)
    assert failed(proof) == []
    assert proof.numbers["engine/gap_max"] < 1e-4  # same kernels, batches of one row
    assert proof.numbers["engine/completions"] == 8 * len(ROWS)


# the others take seconds each
QUICK = ("engine.audio-dropped", "engine.requests-reordered")


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(one, id=one.id, marks=() if one.id in QUICK else pytest.mark.slow)
        for one in BOUNDARY
    ],
)
def test_each_fault_is_named_at_its_stage(
    fault: BoundaryFault, policy: Policy, inputs: Inputs, settings: Settings, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    add_lora(policy.model, LoraConfig(rank=4), seed=0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:  # as after some steps: at the start they are 0
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    write_checkpoint(policy, merged_weights(policy.model), tmp_path)
    proof = proved(policy, inputs, settings, tmp_path, fault)
    found = failed(proof)
    assert found, "not found"
    assert {(stage, check.name) for stage, check in found} == {
        (fault.stage, name) for name in fault.found
    }, found


def test_the_page_names_each_of_the_ten_as_the_proof_does() -> None:
    page = Path(__file__).parents[2] / "docs" / "pages" / "rollout-engines.md"
    rows = [line.split("|") for line in page.read_text(encoding="utf-8").splitlines()]
    shown = [(row[2].strip(), row[3].strip()) for row in rows if len(row) == 5]
    for fault in BOUNDARY:
        assert (fault.stage, "; ".join(fault.found)) in shown
        assert {(fault.stage, name) for name in fault.found} <= set(BY_ENGINE)
    assert len({fault.id for fault in BOUNDARY}) == 10
