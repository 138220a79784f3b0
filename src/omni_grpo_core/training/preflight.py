"""Every stage check of ``omni-grpo check`` on a run's first samples, before anything is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.pipeline.check import check
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.training.guard import Finding, failed_checks
from omni_grpo_core.types import Sample, Trace


def preflight(
    policy: Policy, samples: Sequence[Sample], settings: Settings
) -> tuple[tuple[Finding, ...], Trace]:
    """What does not hold, in the order of the stages, and the trace of the pass. How well the
    policy answers is no matter here: a training is to make it better."""
    result = check(policy, samples, replace(settings, min_format=0.0, min_accuracy=0.0))
    unheard = tuple(
        Finding(
            f"{proof.modality} does not reach the model",
            "embeddings",
            f"other content moves the logprobs by {proof.shift:.2g} nats a token",
        )
        for proof in result.modalities
        if not proof.ok
    )
    return (*failed_checks(result.trace.stages), *unheard), result.trace
