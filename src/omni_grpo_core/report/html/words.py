"""Plain words for the failures and numbers of a check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from omni_grpo_core.pipeline.ablation import ModalityProof
from omni_grpo_core.pipeline.check import CheckResult
from omni_grpo_core.pipeline.hints import LOST, advice
from omni_grpo_core.tolerances import LEAST_SHIFT

PROOF_IN_WORDS = (
    "How to read it: rows with a modality are run again with it blanked (black pictures, "
    "silence), inverted, and swapped with another row's. If it reaches the model, the "
    "log-probabilities must shift; a shift no larger than rounding, or than "
    f"{LEAST_SHIFT:g} nats per token, is not judged: the questions may be about something else. "
    "Accuracy falls only where the questions depend on that modality."
)


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed check or modality. ``others``: how many more failed after it."""

    where: str
    what: str
    seen: str
    fix: str
    others: int = 0


_HEALTH: Mapping[str, str] = {
    "reward_mean": "mean accuracy reward of the sampled completions, 0 to 1",
    "reward_std": "standard deviation of that reward; 0 leaves nothing to learn from",
    "zero_variance_groups": "share of groups whose completions all earn the same reward: they "
    "teach nothing (near 1 is normal for a policy that gets everything right, or nothing)",
    "well_formed": "share of completions with the context, think, answer structure",
    "cap_rate": "share of completions cut off at the length limit; should be near 0",
    "mean_length": "mean completion length in tokens",
    "distinct_completions": "share of distinct completions within a group; 1 / group size means "
    "that sampling gives the same text every time",
}


def health_words(name: str) -> str:
    """What a health metric means, or its name if it is unknown here.

    >>> health_words("some_new_number")
    'some new number'
    """
    return _HEALTH.get(name, name.replace("_", " "))


def ended(ids: Sequence[int], finish: str) -> str:
    """How long a completion is, and why it ended.

    >>> ended([5, 6, 7], "length")
    '3 tokens, cut off at the limit'
    """
    words = {"stop": "ended on its own", "length": "cut off at the limit"}
    return f"{len(ids)} tokens, {words.get(finish, finish)}"


def not_judged(proof: ModalityProof) -> str:
    """Why a modality was not judged and how to get it judged; empty if it was."""
    if proof.judgement != "not judged":
        return ""
    return (
        f"{proof.modality} not judged: other content shifts these answers by {proof.shift:.2g} "
        f"nats per token (rounding {proof.rounding:.2g}, threshold {LEAST_SHIFT:g}); add rows "
        "whose answer depends on it"
    )


def passed_line(result: CheckResult) -> str:
    """How much of a check passed, and which modalities reach the model."""
    stages = result.trace.stages
    checks = sum(len(record.checks) for record in stages)
    reach = [proof.modality for proof in result.modalities if proof.judgement == "reaches"]
    line = f"{checks} checks of {len(stages)} stages passed"
    return f"{line}; {', '.join(reach)} reach the model" if reach else line


def first_failure(result: CheckResult) -> Failure | None:
    """The first failure, stages before modalities: later ones often only follow from it."""
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
            f"other content shifts logprobs by {proof.shift:.2g} nats per token, wanted more than "
            f"the {proof.again:.2g} between two passes over the same content",
            LOST.format(proof.modality),
        )
        for proof in result.modalities
        if not proof.ok
    ]
    return found
