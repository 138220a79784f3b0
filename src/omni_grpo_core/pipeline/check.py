"""``omni-grpo check``: the reference pipeline on a checkpoint, each modality proved, a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.losses.advantages import group_advantages
from omni_grpo_core.losses.metrics import advantage_metrics, rollout_metrics
from omni_grpo_core.pipeline.ablation import ModalityProof, prove
from omni_grpo_core.pipeline.inputs import score
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.pipeline.stages import Values, run
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.types import (
    MODALITIES,
    Modality,
    Parsed,
    Sample,
    Stage,
    Trace,
)


@dataclass(frozen=True, slots=True)
class Health:
    """Numbers to watch from the first training step, over the sampled groups; ``well_formed`` over
    the greedy completions."""

    reward_mean: float
    reward_std: float
    zero_variance_groups: float
    well_formed: float
    cap_rate: float
    mean_length: float
    distinct_completions: float


@dataclass(frozen=True, slots=True, eq=False)
class CheckResult:
    """What ``check`` found. ``verdict`` is ``pass`` if every check of every stage holds and no
    modality in the data is lost."""

    verdict: Literal["pass", "fail"]
    trace: Trace
    values: Values
    modalities: tuple[ModalityProof, ...]
    health: Health

    def to_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        return {
            "verdict": self.verdict,
            "header": dict(self.trace.header),
            "stages": [
                {
                    "name": record.stage,
                    "ok": record.ok,
                    "checks": [asdict(check) for check in record.checks],
                    "seconds": round(record.seconds, 3),
                }
                for record in self.trace.stages
            ],
            "modalities": {
                proof.modality: {**asdict(proof), "ok": proof.ok, "judgement": proof.judgement}
                for proof in self.modalities
            },
            "health": asdict(self.health),
            "completions": [
                {"sample_id": c.group_id, "text": c.text, "finish_reason": c.finish_reason}
                for c in self.values["completion"].completions
            ],
        }


def check(
    policy: Policy,
    samples: Sequence[Sample],
    settings: Settings,
    *,
    on_stage: Callable[[Stage | Modality], None] = lambda name: None,
) -> CheckResult:
    """Run every stage, and prove that each modality reaches the model: blanking, inverting and
    swapping it must change the answers."""
    done = run(policy, samples, settings, on_stage=on_stage)
    proofs = []
    for modality in MODALITIES:
        on_stage(modality)
        proof = prove(policy, done.values, modality, settings)
        if proof is not None:
            proofs.append(proof)
    ok = all(record.ok for record in done.trace.stages) and all(proof.ok for proof in proofs)
    verdict: Literal["pass", "fail"] = "pass" if ok else "fail"
    return CheckResult(verdict, done.trace, done.values, tuple(proofs), health(done.values))


def health(values: Values) -> Health:
    """Health of a pass; rates and lengths are counted as at each step of training."""
    sampled = values["sampled"]
    scores = score((Accuracy(),), values["text"], values["sample"], sampled)["accuracy"]
    earned = [s.value or 0.0 for s in scores]
    groups = [completion.group_id for completion in sampled.completions]
    distinct = {(completion.group_id, completion.text) for completion in sampled.completions}
    advantages = group_advantages(earned, groups, "none")
    numbers = (rollout_metrics(sampled.completions) + advantage_metrics(advantages)).values()
    mean, flat = fmean(earned), numbers["zero_variance_rate"]
    return Health(
        reward_mean=mean,
        reward_std=fmean((v - mean) ** 2 for v in earned) ** 0.5,
        # a single completion has nothing to be compared with
        zero_variance_groups=1.0 if flat is None else flat,
        well_formed=fmean(isinstance(parsed, Parsed) for parsed in values["parsed"]),
        cap_rate=numbers["cap_rate"] or 0.0,
        mean_length=numbers["completion_length"] or 0.0,
        distinct_completions=len(distinct) / len(advantages.groups) / sampled.group_size,
    )
