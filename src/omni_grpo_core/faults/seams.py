"""What every loop of the catalogue has in common: the seams at which a fault is put in.

A seam is a method with a fixed meaning. Loops call them in an order of their own, with as many rows
at a time as they like, and implement them apart from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from omni_grpo_core.core.conversation import build_conversation
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.faults.config import LoopConfig
from omni_grpo_core.faults.fixtures import Clips, Drawn
from omni_grpo_core.faults.scoring import context_mask
from omni_grpo_core.recorder.hooks import patched
from omni_grpo_core.trace.calls import AdvantageSeen
from omni_grpo_core.types import Media

Messages = list[dict[str, Any]]


class Notebook(Protocol):
    """The part of a recorder that a loop writes to explicitly."""

    def note(self, value: Any) -> None: ...


@dataclass(slots=True, eq=False)
class Rolled:
    """The rows of one scoring call after their rollout; N of them.

    ``inputs``: the processor's output. ``ids``, ``mask``: (N, C), the mask up to the first eos.
    ``advantages``: (N,) or (N, C). ``old``, ``reference``: (N, C) or ``None``.
    """

    drawn: list[Drawn]
    inputs: dict[str, Tensor]
    ids: Tensor
    mask: Tensor
    texts: list[str]
    rewards: Tensor
    advantages: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step logged: ``losses``, one per backward; ``rewards``, (N, functions); texts."""

    losses: tuple[float, ...]
    rewards: tuple[tuple[float, ...], ...]
    texts: tuple[str, ...]


def outcome_of(losses: Iterable[float], rolled: Sequence[Rolled]) -> StepOutcome:
    """A step's losses with the rewards and texts of its rollout."""
    return StepOutcome(
        tuple(losses),
        tuple(tuple(row.tolist()) for one in rolled for row in one.rewards),
        tuple(text for one in rolled for text in one.texts),
    )


class Calls:
    """Seams that are a single call in every loop."""

    config: LoopConfig
    clips: Clips
    policy: Policy
    processor: Any
    use_audio_in_video: bool

    def replaced(self, **methods: Callable[..., Any]) -> AbstractContextManager[None]:
        return patched(self, **methods)

    def has_track(self, path: str) -> bool:
        return self.clips.has_track(path)

    def conversation(self, drawn: Drawn) -> Messages:
        tracks = {path: self.has_track(path) for path in drawn.videos}
        return self.clips.messages(
            build_conversation(drawn.sample, audio_in_video=self.config.audio, tracks=tracks)
        )

    def render(self, conversations: list[Messages]) -> list[str]:
        texts: list[str] = self.processor.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=True
        )
        return texts

    def load(self, messages: Messages) -> Media:
        return self.clips.load(messages, self.use_audio_in_video)

    def call_processor(self, **keywords: Any) -> Mapping[str, Any]:
        made: Mapping[str, Any] = self.processor(**keywords)
        return made

    def partial_spans(self, ids: Tensor, mask: Tensor) -> Tensor:
        return context_mask(self.policy, ids, mask)

    def forward(self, model: Any, keywords: dict[str, Any]) -> Any:
        return model(**keywords)

    def loss_mask(self, rolled: Rolled) -> Tensor:
        return rolled.mask

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]


class Loop(Protocol):
    """A GRPO loop to put faults into, on a copy of a policy's weights.

    A recorder attaches to ``model`` (possibly wrapped by PEFT), ``processor``, ``optimizer`` and
    ``reward_funcs``. N rows of a call, C completion tokens, B prompts, G completions of each.
    """

    config: LoopConfig
    policy: Policy
    clips: Clips
    processor: Any
    model: Any
    reference: Any
    eos: list[int]
    pad: int
    suppressed: list[int]
    use_audio_in_video: bool
    reward_funcs: list[Callable[..., list[float | None]]]
    reward_weights: list[float]
    steps_done: int
    optimizer: torch.optim.Optimizer

    @property
    def thinker(self) -> Any:
        """The model inside its wrappers."""

    def replaced(self, **methods: Callable[..., Any]) -> AbstractContextManager[None]:
        """For a fault: replaces methods of this loop, restored on exit even after an error."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        """An optimizer over all trainable parameters."""

    # ----------------------------------------------------------------- rows to inputs

    def draw(self, micro: int) -> list[Drawn]:
        """The rows of a micro-batch, one per prompt."""

    def has_track(self, path: str) -> bool:
        """Whether a clip has an audio track."""

    def conversation(self, drawn: Drawn) -> Messages:
        """The messages of one row: the system's first, the user's last."""

    def render(self, conversations: list[Messages]) -> list[str]:
        """Their prompts."""

    def load(self, messages: Messages) -> Media:
        """The media that messages name; called once a conversation, in their order."""

    def repeat(self, values: list[Any]) -> list[Any]:
        """For the group: 1 1 2 2."""

    def processor_keywords(self, media: Sequence[Media]) -> dict[str, Any]:
        """The processor's keywords besides text and media."""

    def process(self, texts: list[str], media: list[Media]) -> dict[str, Tensor]:
        """Prompts and media to the model's inputs, left-padded."""

    def call_processor(self, **keywords: Any) -> Mapping[str, Any]:
        """The one call of the processor."""

    def expand(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the processor returned, with a row for every completion: what generation and scoring
        get."""

    # ----------------------------------------------------------------- completions

    def generation_keywords(self) -> dict[str, Any]:
        """The sampling keywords."""

    def generate(self, inputs: dict[str, Tensor]) -> Tensor:
        """Prompts and completions, (N, L + C): in eval mode, with the cache, checkpointing off."""

    def call_generate(self, keywords: dict[str, Any]) -> Tensor:
        """The one call of ``generate``."""

    def cut(self, sequences: Tensor, prompt_length: int) -> tuple[Tensor, Tensor]:
        """Completion ids and the mask of the tokens up to and including the first eos, (N, C)."""

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        """Completions as text, for rewards and logs."""

    # ----------------------------------------------------------------- rewards

    def columns(self, drawn: list[Drawn]) -> dict[str, list[Any]]:
        """The columns of the data set, one value per completion."""

    def score(self, prompts: list[str], texts: list[str], drawn: list[Drawn]) -> Tensor:
        """(N, functions), NaN where a function could not score."""

    def group_ids(self, drawn: list[Drawn]) -> list[str]:
        """The group of each completion."""

    def normalise(self, rewards: Tensor, groups: Sequence[str]) -> Tensor:
        """(N,): reward minus the group's mean, divided by its standard deviation."""

    def partial_spans(self, ids: Tensor, mask: Tensor) -> Tensor:
        """bool, (N, C): the tokens of the context, on which the partial reward acts."""

    def advantages(
        self, rewards: Tensor, drawn: list[Drawn], ids: Tensor, mask: Tensor
    ) -> AdvantageSeen:
        """Advantages as used in the loss."""

    # ----------------------------------------------------------------- loss

    def scoring_inputs(self, rolled: Rolled) -> dict[str, Any]:
        """Prompt and completion as inputs of a forward."""

    def forward(self, model: Any, keywords: dict[str, Any]) -> Any:
        """The one call of the scoring forward."""

    def completion_logits(self, logits: Tensor, length: int) -> Tensor:
        """(N, C, V): those that predict each completion token."""

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Of the sampled distribution, in float32: same temperature and suppressed ids."""

    def logprobs(self, model: Any, rolled: Rolled) -> Tensor:
        """(N, C): logprobs of the completion's tokens, 0 where masked out."""

    def reference_logprobs(self, rolled: Rolled) -> Tensor:
        """Logprobs under the initial policy: a copy, or the model with its adapters off."""

    def token_loss(self, logprobs: Tensor, rolled: Rolled) -> tuple[Tensor, dict[str, float]]:
        """Loss per token, (N, C), and the metrics logged with it."""

    def clipped(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """bool, (N, C): tokens whose gradient is removed by clipping."""

    def kl(self, logprobs: Tensor, reference: Tensor) -> Tensor:
        """(N, C): the k3 estimate of KL(policy || reference)."""

    def loss_mask(self, rolled: Rolled) -> Tensor:
        """bool, (N, C): tokens included in the loss."""

    def reduce(self, per_token: Tensor, mask: Tensor, rolled: Sequence[Rolled]) -> Tensor:
        """One backward's share of the step's loss; ``rolled``: all of the step."""

    def settings(self) -> dict[str, Any]:
        """The run's settings as it logs them."""

    # ----------------------------------------------------------------- the step

    def rollout(self, micro: int, notebook: Notebook | None) -> list[Rolled]:
        """From rows to advantages: one entry for every backward of this part of the step."""

    def learn(self, one: Rolled, rolled: Sequence[Rolled], notebook: Notebook | None) -> float:
        """Forward, loss and backward of one entry."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one loss."""

    def update(self) -> None:
        """The optimizer's step."""

    def step(self, notebook: Notebook | None = None) -> StepOutcome:
        """One rollout and ``iterations`` optimizer steps on it."""
