"""How good the policy is on rows it does not learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.pipeline.check import check
from omni_grpo_core.pipeline.hints import LOST
from omni_grpo_core.pipeline.inputs import prepare, score
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.training.config import TrainConfig
from omni_grpo_core.training.guard import Finding, failed_checks
from omni_grpo_core.types import Prompt, Row, Sample, Trace

_BATCH = 32


class Evaluator:
    """Measures accuracy on ``eval_data`` every ``eval_every`` steps, and after the last one."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._samples: tuple[Sample, ...] = ()
        if config.eval_data:
            root = Path(config.root) if config.root else None
            self._samples = load_samples(config.eval_data, root=root, format=config.data_format)
        self._ready: list[tuple[Sample, Prompt, Row]] = []

    def due(self, step: int) -> bool:
        """Whether the policy is measured after ``step``."""
        every, last = self._config.eval_every, step + 1 == self._config.steps
        return bool(self._samples and every and (last or (step + 1) % every == 0))

    def accuracy(self, policy: Policy) -> dict[str, float]:
        """``eval/accuracy`` and ``eval/accuracy_greedy``: the mean accuracy reward of one sampled
        and of one greedy completion per row.

        Every process evaluates all rows, which takes longer but needs no gathering.
        """
        settings = self._config.settings
        if not self._ready:
            self._ready = _prepared(policy, self._samples, settings)
        sums = {"eval/accuracy": 0.0, "eval/accuracy_greedy": 0.0}
        for start in range(0, len(self._ready), _BATCH):
            samples, prompts, rows = zip(*self._ready[start : start + _BATCH], strict=True)
            batch = collate(rows, policy.pad_token_id)
            for name, temperature in zip(sums, (settings.temperature, 0.0), strict=True):
                rolled = rollout(
                    policy,
                    batch,
                    group_size=1,
                    max_new_tokens=settings.max_new_tokens,
                    temperature=temperature,
                    seed=self._config.seed,
                )
                scores = score([Accuracy()], prompts, samples, rolled)["accuracy"]
                sums[name] += sum(one.value or 0.0 for one in scores)
        return {name: total / len(self._ready) for name, total in sums.items()}


def _prepared(
    policy: Policy, samples: tuple[Sample, ...], settings: Settings
) -> list[tuple[Sample, Prompt, Row]]:
    """Processed rows are kept, decoded media are not: those are far larger."""
    ready: list[tuple[Sample, Prompt, Row]] = []
    for start in range(0, len(samples), _BATCH):
        inputs = prepare(policy, samples[start : start + _BATCH], settings)
        ready += zip(inputs.samples, inputs.prompts, inputs.batch.rows, strict=True)
    return ready


def preflight(
    policy: Policy, samples: Sequence[Sample], settings: Settings
) -> tuple[tuple[Finding, ...], Trace]:
    """What fails, in the order of the stages, and the trace of the pass. How well the policy
    answers does not matter here: training is meant to improve it."""
    result = check(policy, samples, replace(settings, min_format=0.0, min_accuracy=0.0))
    unheard = tuple(
        Finding(
            f"{proof.modality} does not reach the model",
            "embeddings",
            f"other content shifts the logprobs by {proof.shift:.2g} nats a token; "
            + LOST.format(proof.modality),
        )
        for proof in result.modalities
        if not proof.ok
    )
    return (*failed_checks(result.trace.stages), *unheard), result.trace
