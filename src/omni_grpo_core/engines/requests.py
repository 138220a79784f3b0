"""What goes to a rollout engine and what comes back: plain values, made from the same text and the
same decoded media as the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import TrainError
from omni_grpo_core.pipeline.inputs import Inputs
from omni_grpo_core.types import AudioInVideos, Completion, FinishReason, Media, Rollout


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt for an engine."""

    text: str
    """Rendered by the chat template, placeholders unexpanded."""
    media: Media
    """Decoded and resized, as for the batch."""
    audio_in_video: AudioInVideos
    """The conversation's decision: an engine that guesses it reads another prompt."""
    second_per_grid: tuple[float, ...]
    """Seconds that each video's temporal patch lasts: what interleaving goes by."""
    seed: int
    """Of this prompt's completions, 31 bits."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How every prompt of a call is sampled; nothing is left to a generation config."""

    group_size: int
    """G, by the engine's own ``n``."""
    max_new_tokens: int
    """Most tokens of a completion."""
    temperature: float
    """0 is greedy."""
    eos_ids: tuple[int, ...]
    """Any of them ends a completion, and is its last token."""
    allowed_ids: tuple[int, ...]
    """All that may be sampled: eos and everything that is not suppressed."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One completion as an engine reports it."""

    token_ids: tuple[int, ...]
    """Raw ids, with the eos."""
    logprobs: tuple[float, ...]
    """Of each token, among the allowed ones, at the sampling temperature."""
    finish_reason: FinishReason
    """``length``: the cap was hit before an eos."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine returns for one request."""

    prompt_ids: tuple[int, ...]
    """The ids that it read, after its own expansion of the placeholders."""
    drawn: tuple[Drawn, ...]
    """G completions."""


class Backend(Protocol):
    """An engine by itself, wherever it runs: knows no policy, batch or reward."""

    @property
    def name(self) -> str:
        """Name, version and place (``"vllm 0.32.0, in this process"``)."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        """One answer per request, in their order. Raises :class:`EngineLost` if it cannot."""

    def load(self, folder: Path) -> str:
        """Take the weights of a checkpoint folder, or on top of them those of an adapter folder
        (:mod:`~omni_grpo_core.engines.weights`), and return the fingerprint of what was read. All
        that was computed with earlier weights is forgotten."""

    def sleep(self) -> None:
        """Give up memory until :meth:`wake`, where the engine offers that."""

    def wake(self) -> None:
        """Before the next :meth:`load`."""

    def restart(self) -> None:
        """Begin anew after :class:`EngineLost`, without weights."""

    def close(self) -> None:
        """End what was started."""


class EngineLost(TrainError):
    """An engine that was killed, hangs, is out of memory or cannot be reached. Nothing of the step
    has been applied: a rollout comes before its update."""


def make_requests(inputs: Inputs, seed: int) -> list[Request]:
    """One request per row of ``inputs``. A completion's seed depends on ``seed`` and the sample
    alone, so that it is the same in a resumed run and in another order of rows."""
    return [
        Request(
            prompt.text,
            media,
            conversation.audio_in_video,
            tuple(row.tensors["video_second_per_grid"].tolist())
            if "video_second_per_grid" in row.tensors
            else (),
            request_seed(seed, row.sample_id),
        )
        for prompt, media, conversation, row in zip(
            inputs.prompts, inputs.media, inputs.conversations, inputs.batch.rows, strict=True
        )
    ]


def request_seed(seed: int, sample_id: str) -> int:
    """31 bits: what every engine takes.

    >>> request_seed(0, "a") == request_seed(0, "a"), request_seed(0, "a") == request_seed(0, "b")
    (True, False)
    """
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def sampling_of(
    policy: Policy, group_size: int, max_new_tokens: int, temperature: float
) -> Sampling:
    """Eos and allowed ids of ``policy``, in full."""
    allowed = tuple((~policy.suppressed).nonzero().flatten().tolist())
    return Sampling(group_size, max_new_tokens, temperature, policy.eos_token_ids, allowed)


def as_rollout(
    policy: Policy, inputs: Inputs, answers: Sequence[Answer], sampling: Sampling, seed: int
) -> Rollout:
    """Answers as a rollout, G consecutive completions per row.

    Raises ``TrainError`` for another number of answers or completions than was asked for.
    """
    counts = [len(answer.drawn) for answer in answers]
    if counts != [sampling.group_size] * len(inputs.batch.rows):
        raise TrainError(
            "rollout engine",
            got=f"{len(answers)} answers with {', '.join(map(str, counts))} completions",
            want=f"{len(inputs.batch.rows)} answers with {sampling.group_size} each",
            fix="compare the engine's version with the ones that were tested",
        )
    completions = []
    for row, answer in zip(inputs.batch.rows, answers, strict=True):
        for index, drawn in enumerate(answer.drawn):
            ended = drawn.finish_reason == "stop"
            ids = drawn.token_ids
            text = policy.decode(ids[:-1] if ended else ids)
            completions.append(
                Completion(row.sample_id, index, ids, text, drawn.finish_reason, drawn.logprobs)
            )
    return Rollout(tuple(completions), sampling.group_size, sampling.temperature, seed)
