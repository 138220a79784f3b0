"""The proof of agreement finds what goes wrong between trainer and engine, before any update.

The engine is transformers on its own copy of the policy: what crosses the boundary is what would
cross it to a real one. The same faults are planted in the real vLLM by ``test_vllm.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from adapted_policy import adapted
from engine_neighbours import NEIGHBOURS, Neighbour

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
from omni_grpo_core.training.trainable import adapter_off, merged_weights
from omni_grpo_core.types import Check, EngineSeen, Stage

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
    policy: Policy,
    inputs: Inputs,
    settings: Settings,
    folder: Path,
    plant: Callable[[Boundary], object] = lambda boundary: None,
) -> Proof:
    boundary = Boundary(TransformersBackend(), policy)
    plant(boundary)
    others = {"the adapter is applied in the engine": lambda: adapter_off(policy.model)}
    boundary.load(folder)
    return prove(Sides(policy, boundary, settings, ENGINE["float32"], others), inputs, 0)


def failed(proof: Proof) -> list[tuple[Stage, Check]]:
    return [(r.stage, c) for r in proof.records for c in r.checks if not c.ok]


def test_an_engine_that_agrees_is_proved_on_every_kind_of_row(
    policy: Policy, inputs: Inputs, settings: Settings, tmp_path: Path
) -> None:
    write_checkpoint(policy, policy.model.state_dict(), tmp_path)
    proof = proved(policy, inputs, settings, tmp_path)
    assert failed(proof) == []
    assert proof.numbers["engine/gap_max"] < 1e-4  # same kernels, batches of one row
    assert proof.numbers["engine/completions"] == 8 * len(ROWS)


@pytest.mark.slow
def test_chance_accuses_no_sound_engine(
    policy: Policy, inputs: Inputs, settings: Settings, tmp_path: Path
) -> None:
    """What is drawn is judged by chance: once in a million proofs, by design."""
    write_checkpoint(policy, policy.model.state_dict(), tmp_path)
    backend = TransformersBackend()
    backend.load(tmp_path)
    sides = Sides(policy, backend, settings, ENGINE["float32"])
    for seed in range(1, 9):
        assert failed(prove(sides, inputs, seed)) == [], seed


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
    fault: BoundaryFault, inputs: Inputs, settings: Settings, tmp_path: Path
) -> None:
    policy = adapted(0.1)
    write_checkpoint(policy, merged_weights(policy.model), tmp_path)
    proof = proved(policy, inputs, settings, tmp_path, fault.inject)
    found = failed(proof)
    assert found, "not found"
    assert {(stage, check.name) for stage, check in found} == {
        (fault.stage, name) for name in fault.found
    }, found


@pytest.mark.slow
@pytest.mark.parametrize("one", NEIGHBOURS, ids=lambda one: one.name)
def test_neighbours_of_the_ten_are_not_mistaken_for_them(
    one: Neighbour, policy: Policy, inputs: Inputs, settings: Settings, tmp_path: Path
) -> None:
    """The worst result is a wrong cause that is called proved."""
    write_checkpoint(policy, policy.model.state_dict(), tmp_path)
    proof = proved(policy, inputs, settings, tmp_path, one.plant)
    (seen,) = (r.value for r in proof.records if isinstance(r.value, EngineSeen))
    found = [(known.stage, known.name, known.proved) for known in seen.disagreements]
    assert found == [(one.stage, one.check, one.proved)], seen.disagreements
    assert seen.disagreements[0].rows
    assert (one.stage, one.check) in BY_ENGINE


class Exact(TransformersBackend):
    """Computes in float64."""

    def load(self, folder: Path) -> str:
        found = super().load(folder)
        assert self._policy is not None
        self._policy.model.double()
        return found


@pytest.mark.slow
def test_weights_that_amplify_rounding_are_said_to(
    inputs: Inputs, settings: Settings, tmp_path: Path
) -> None:
    """In vLLM this was named as a clip's content: a logprob was 1.5e-4 off, and with black frames
    none was. The engine is the better one here."""
    policy = adapted(1.0)
    write_checkpoint(policy, merged_weights(policy.model), tmp_path)
    backend = Exact()
    backend.load(tmp_path)
    found = failed(prove(Sides(policy, backend, settings, ENGINE["float32"]), inputs, 0))
    assert [(stage, check.name) for stage, check in found] == [
        ("logits", "the engine scores as the trainer does")
    ], found
    assert "which is rounding" in found[0][1].detail


def test_the_page_names_each_of_the_ten_as_the_proof_does() -> None:
    page = Path(__file__).parents[2] / "docs" / "pages" / "rollout-engines.md"
    rows = [line.split("|") for line in page.read_text(encoding="utf-8").splitlines()]
    shown = [(row[2].strip(), row[3].strip()) for row in rows if len(row) == 5]
    for fault in BOUNDARY:
        assert (fault.stage, "; ".join(fault.found)) in shown
        assert {(fault.stage, name) for name in fault.found} <= set(BY_ENGINE)
    assert len({fault.id for fault in BOUNDARY}) == 10
