"""Plain words for failures and numbers of a check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from omni_grpo_core.pipeline.ablation import ModalityProof
from omni_grpo_core.pipeline.check import CheckResult
from omni_grpo_core.pipeline.hints import LOST, advice
from omni_grpo_core.tolerances import LEAST_SHIFT

PROOF_IN_WORDS = (
    "How to read it: the rows that have a modality are asked again with it blanked (black "
    "pictures, silence), inverted and with another row's in its place. If it reaches the "
    "model, that must shift the log-probabilities; up to what rounding may do, or "
    f"{LEAST_SHIFT:g} nats a token, it is not judged: the questions may be about something else. "
    "Accuracy falls only as far as they are about that modality, and the rest stay right."
)


@dataclass(frozen=True, slots=True)
class Failure:
    """The first thing that failed. ``others``: how many checks and modalities failed after it."""

    where: str
    what: str
    seen: str
    fix: str
    others: int = 0


_HEALTH: Mapping[str, str] = {
    "reward_mean": "mean accuracy reward of the sampled completions, 0 to 1",
    "reward_std": "how much that reward varies; 0 leaves nothing to learn from",
    "zero_variance_groups": "share of groups whose completions all earn the same: they teach "
    "nothing (near 1 is normal for a policy that gets everything right, or nothing)",
    "well_formed": "share of completions with the context, think, answer structure",
    "cap_rate": "share of completions cut off at the length limit; should be near 0",
    "mean_length": "tokens of a completion, on average",
    "distinct_completions": "share of different completions within a group; 1 / group size means "
    "that sampling gives the same text every time",
}


def health_words(name: str) -> str:
    """What a health number means, or its name if it is new here.

    >>> health_words("some_new_number")
    'some new number'
    """
    return _HEALTH.get(name, name.replace("_", " "))


def ended(ids: Sequence[int], finish: str) -> str:
    """How long a completion is, and why it is no longer.

    >>> ended([5, 6, 7], "length")
    '3 tokens, cut off at the limit'
    """
    words = {"stop": "ended by itself", "length": "cut off at the limit"}
    return f"{len(ids)} tokens, {words.get(finish, finish)}"


def not_judged(proof: ModalityProof) -> str:
    """Why a modality was not judged and what would judge it; empty where it was."""
    if proof.judgement != "not judged":
        return ""
    return (
        f"{proof.modality} not judged: other content shifts these answers by {proof.shift:.2g} "
        f"nats a token (rounding {proof.rounding:.2g}, bar {LEAST_SHIFT:g}); add rows whose "
        "question it decides"
    )


def first_failure(result: CheckResult) -> Failure | None:
    """What failed first, stages before modalities: what fails later often only follows from it."""
    found = failures(result)
    return replace(found[0], others=len(found) - 1) if found else None


def failures(result: CheckResult) -> list[Failure]:
    """Every check and modality that failed, stages before modalities."""
    found = [
        Failure(record.stage, check.name, check.detail, advice(record.stage, check.name))
        for record in result.trace.stages
        for check in record.checks
        if not check.ok
    ]
    found += [
        Failure(
            f"{proof.modality} proof",
            f"{proof.modality} reaches the model",
            f"shift of {proof.shift:.2g} nats a token under other content, wanted more than the "
            f"{proof.again:.2g} between two passes over the same",
            LOST.format(proof.modality),
        )
        for proof in result.modalities
        if not proof.ok
    ]
    return found
