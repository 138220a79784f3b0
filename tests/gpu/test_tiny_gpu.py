"""The shipped checkpoint on a CUDA device, in float32 and in the usual training precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from omni_grpo_core import tiny
from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.forward import prefill
from omni_grpo_core.core.policy import Policy, generating, load_policy
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.pipeline.check import CheckResult, check
from omni_grpo_core.pipeline.checks import scoring_drift
from omni_grpo_core.pipeline.inputs import Inputs, prepare
from omni_grpo_core.pipeline.settings import Settings, load_settings
from omni_grpo_core.rewards.degenerate import degenerate
from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.types import Parsed, Rollout, Sample

pytestmark = [pytest.mark.gpu, pytest.mark.tiny]

BATCH_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}
"""Largest difference of a row's logits in a padded batch and alone. float32: matrix products of
other sizes are summed in another order (1e-5 on a CPU, a little more with CUDA's tiles); bfloat16:
measured 0.33 on the tiny checkpoint (its logits reach 30, where neighbours are 0.25 apart)."""


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def cuda_policy(request: pytest.FixtureRequest) -> Policy:
    return load_policy(tiny.checkpoint_dir(), device="cuda", dtype=request.param)


@pytest.fixture(scope="module")
def tiny_settings() -> Settings:
    return load_settings(tiny.checkpoint_dir())


@pytest.fixture(scope="module")
def ready(cuda_policy: Policy, samples: tuple[Sample, ...], tiny_settings: Settings) -> Inputs:
    return prepare(cuda_policy, samples, tiny_settings)


@pytest.fixture(scope="module")
def greedy(cuda_policy: Policy, ready: Inputs) -> Rollout:
    return rollout(cuda_policy, ready.batch, group_size=1, max_new_tokens=64, temperature=0.0)


@pytest.fixture(scope="module")
def checked(
    cuda_policy: Policy, samples: tuple[Sample, ...], tiny_settings: Settings
) -> CheckResult:
    return check(cuda_policy, samples, tiny_settings)


def test_check_passes(checked: CheckResult) -> None:
    broken = [(r.stage, c) for r in checked.trace.stages for c in r.checks if not c.ok]
    assert checked.verdict == "pass", broken
    assert checked.trace.header["device"] == "cuda"


def test_answers_depend_on_the_media(checked: CheckResult) -> None:
    for proof in checked.modalities:
        assert proof.ok, proof
        assert proof.moved > 0, proof


def test_generations_are_sound_and_well_formed(cuda_policy: Policy, greedy: Rollout) -> None:
    special = cuda_policy.suppressed.nonzero().flatten().tolist()
    for completion in greedy.completions:
        assert not degenerate(
            completion.token_ids,
            completion.text,
            finish_reason=completion.finish_reason,
            eos_ids=cuda_policy.eos_token_ids,
            special_ids=special,
        )
        assert isinstance(parse(completion.text), Parsed), completion.text


def test_a_model_left_in_train_mode_answers_as_in_eval_mode(
    cuda_policy: Policy, ready: Inputs, greedy: Rollout
) -> None:
    """The incident: train mode and checkpointing while generating. Here they have no effect."""
    model = cuda_policy.model
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        again = rollout(cuda_policy, ready.batch, group_size=1, max_new_tokens=64, temperature=0.0)
        assert model.training
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    assert [c.token_ids for c in again.completions] == [c.token_ids for c in greedy.completions]


def test_a_row_in_the_batch_equals_the_row_alone(cuda_policy: Policy, ready: Inputs) -> None:
    with generating(cuda_policy.model), torch.no_grad():
        together = prefill(cuda_policy, ready.batch).logits.values
        alone = [
            prefill(cuda_policy, collate([row], cuda_policy.pad_token_id)).logits.values[0]
            for row in ready.batch.rows
        ]
    tolerance = BATCH_TOLERANCE[str(cuda_policy.model.dtype).removeprefix("torch.")]
    worst = max(float((a - b).abs().max()) for a, b in zip(together, alone, strict=True))
    assert worst <= tolerance


def test_logprobs_of_sampling_equal_those_of_scoring(
    cuda_policy: Policy, ready: Inputs, tiny_settings: Settings
) -> None:
    settings = replace(tiny_settings, temperature=0.9)
    rolled = rollout(
        cuda_policy,
        ready.batch,
        group_size=4,
        max_new_tokens=64,
        temperature=settings.temperature,
        seed=1,
    )
    close, worst = scoring_drift(cuda_policy, ready.batch, rolled)
    assert close, worst


def test_the_device_answers_as_the_cpu_does(
    cuda_policy: Policy, greedy: Rollout, policy: Policy, inputs: Inputs
) -> None:
    """float32: the same greedy ids. Half precision may choose another word where the margin is
    small, but not another answer."""
    cpu = rollout(policy, inputs.batch, group_size=1, max_new_tokens=64, temperature=0.0)
    if cuda_policy.model.dtype == torch.float32:
        assert [c.token_ids for c in greedy.completions] == [c.token_ids for c in cpu.completions]
    assert answers(greedy) == answers(cpu)


def answers(rolled: Rollout) -> list[str]:
    parsed = [parse(completion.text) for completion in rolled.completions]
    return [one.answer.text if isinstance(one, Parsed) else "" for one in parsed]
