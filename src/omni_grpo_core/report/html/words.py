"""Plain words for stages, failures and numbers: what each does, what to do when it fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from omni_grpo_core.pipeline.check import LEAST_SHIFT, CheckResult, ModalityProof

PROOF_IN_WORDS = (
    "How to read it: the rows that have a modality are asked again with it blanked (black "
    "pictures, silence), turned upside down and with another row's in its place. If it reaches the "
    "model, that must shift the log-probabilities; up to what rounding may do, or "
    f"{LEAST_SHIFT:g} nats a token, it is not judged: the questions may be about something else. "
    "Accuracy falls only as far as they are about that modality, and the rest stay right."
)


@dataclass(frozen=True, slots=True)
class StageWords:
    """``does``: what the stage does. ``fix``: what to do when one of its checks fails."""

    does: str
    fix: str


@dataclass(frozen=True, slots=True)
class Failure:
    """The first thing that failed. ``others``: how many checks and modalities failed after it."""

    where: str
    what: str
    seen: str
    fix: str
    others: int


_STAGES: Mapping[str, StageWords] = {
    "sample": StageWords(
        "rows of the data set are read",
        "Mend the rows named: unique ids, files that exist, gold answers inside <answer> tags.",
    ),
    "conversation": StageWords(
        "messages are built, and it is decided how a video's sound travels",
        "A row's media and its audio-in-video mode contradict each other: list each file once, or "
        "choose another mode with --audio-in-video.",
    ),
    "text": StageWords(
        "the checkpoint's chat template writes the prompt",
        "Restore the chat template that came with the base model: training and prompting must "
        "render the same text.",
    ),
    "media": StageWords(
        "files are decoded into frames and 16 kHz sound",
        "Look at the frames and sounds of the samples, play the named file, and check the frame "
        "rate and pixel limits of the settings.",
    ),
    "batch": StageWords(
        "the processor turns text and media into token ids and features",
        "Processor and media disagree. Use the processor files that came with the checkpoint and a "
        "supported version of transformers; look at the samples' tokens.",
    ),
    "embeddings": StageWords(
        "features of the towers take the place of the placeholder tokens",
        "What the towers saw is not what the text model gets. Check the version of transformers "
        "and that config and weights belong together.",
    ),
    "positions": StageWords(
        "every token gets a time, a height and a width",
        "Use one audio-in-video mode and the frame rate that was really sampled in every stage; "
        "check the version of transformers.",
    ),
    "logits": StageWords(
        "the model scores the token that follows the prompt",
        "A row in the batch differs from the row alone: look at left padding, attention mask and "
        "position ids; if scores are not finite, try float32.",
    ),
    "completion": StageWords(
        "the model answers, greedily and sampled",
        "Generation is at fault, or the weights are not trained for this. Generate in eval mode "
        "with gradient checkpointing off and the cache on, with eos ids set; then read the "
        "completions.",
    ),
    "parsed": StageWords(
        "answers are taken apart into context, think and answer",
        "Too few completions have the structure that the system prompt asks for: see the place "
        "marked in each, and whether the completion stage holds.",
    ),
    "reward": StageWords(
        "answers are scored",
        "A reward pays for garbage, cannot score a completion, or too few answers are right: the "
        "reasons stand with each sample.",
    ),
    "advantage": StageWords(
        "scores are compared within each group",
        "Check that groups are formed by sample id and that rewards vary within them.",
    ),
    "loss": StageWords(
        "advantages and log-probabilities become one number",
        "Check the completion mask, the shift by one token and the temperature of the logprobs.",
    ),
    "gradient": StageWords(
        "the number says how each weight should move",
        "Check which weights are frozen, and that the loss is not detached from the model.",
    ),
}
_UNKNOWN = StageWords("", "Read the failed check: it says what was seen.")

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


def stage_words(stage: str) -> StageWords:
    """Words for a stage; a stage that is new here is still shown.

    >>> stage_words("media").does
    'files are decoded into frames and 16 kHz sound'
    """
    return _STAGES.get(stage, _UNKNOWN)


def health_words(name: str) -> str:
    """What a health number means, or its name if it is new here.

    >>> health_words("some_new_number")
    'some new number'
    """
    return _HEALTH.get(name, name.replace("_", " "))


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
        Failure(record.stage, check.name, check.detail, stage_words(record.stage).fix, 0)
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
            f"The {proof.modality} is lost between file and text model: follow it through the "
            "samples (file, features, tokens), and check that every stage is handed it.",
            0,
        )
        for proof in result.modalities
        if not proof.ok
    ]
    return found
