"""One call of an engine, and what the trainer makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.completions import CompletionTensors, stack_completions
from omni_grpo_core.core.forward import completion_logits, token_logprobs
from omni_grpo_core.core.policy import Policy, generating
from omni_grpo_core.engines.requests import Answer, Backend, as_rollout, make_requests, sampling_of
from omni_grpo_core.pipeline.inputs import Inputs, make_batch
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.tolerances import Limit
from omni_grpo_core.types import Media, Positions, Rollout

GROUP = 8
"""Completions per row: with eight rows, 64 in all."""


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """``gap``: engine's minus trainer's logprob of each token, float64, (N, C), 0 outside the
    mask."""

    inputs: Inputs
    answers: list[Answer]
    rolled: Rollout
    tokens: CompletionTensors
    temperature: float
    gap: Tensor = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Sides:
    """An engine and the policy that it should sample as.

    ``lane``: how far their logprobs may be apart. ``others``: by what they would prove, states of
    the policy in which it scores otherwise, such as adapters switched off.
    """

    policy: Policy
    backend: Backend
    settings: Settings
    lane: Limit
    others: Mapping[str, Callable[[], AbstractContextManager[Any]]] = field(default_factory=dict)

    def ask(self, inputs: Inputs, seed: int, temperature: float, length: int) -> list[Answer]:
        """The engine's answers on ``inputs``, ``GROUP`` completions of each."""
        sampling = sampling_of(self.policy, GROUP, length, temperature)
        return self.backend.generate(make_requests(inputs, seed), sampling)

    def read(
        self, inputs: Inputs, answers: Sequence[Answer], temperature: float, length: int
    ) -> Sampled:
        """Answers beside the trainer's scores of them."""
        sampling = sampling_of(self.policy, GROUP, length, temperature)
        rolled = as_rollout(self.policy, inputs, answers, sampling, 0)
        tokens = stack_completions(
            rolled.completions, pad_id=self.policy.pad_token_id, eos_ids=self.policy.eos_token_ids
        )
        gap = self.gap(inputs, tokens, temperature)
        return Sampled(inputs, list(answers), rolled, tokens, temperature, gap)

    @torch.no_grad()
    def gap(
        self,
        inputs: Inputs,
        tokens: CompletionTensors,
        temperature: float,
        where: Positions | None = None,
    ) -> Tensor:
        """Reported logprobs minus the trainer's under ``inputs``, at other positions if ``where``:
        float64, (N, C)."""
        with generating(self.policy.model):
            ours = token_logprobs(self.policy, inputs.batch, tokens, temperature, where=where)
        return torch.where(tokens.mask, tokens.logprobs - ours.double(), 0.0)

    @torch.no_grad()
    def scores(self, sampled: Sampled) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token: the logits that it was drawn from, float32, (tokens, V); its id, (tokens,
        1); the logprob that the engine reported, float64, (tokens,). On the CPU."""
        tokens = sampled.tokens
        with generating(self.policy.model):
            logits = completion_logits(
                self.policy, sampled.inputs.batch, tokens.ids, tokens.mask.to(torch.int64)
            )
        mask = tokens.mask
        return logits.float().cpu()[mask], tokens.ids[mask][:, None], tokens.logprobs[mask]

    def agree(self, gap: Tensor, tokens: CompletionTensors) -> bool:
        """Whether gaps are within the lane, in mean and for each token."""
        found = gap.abs()[tokens.mask]
        return bool(found.mean() <= self.lane.mean and found.max() <= self.lane.worst)

    def chosen(self, inputs: Inputs, rows: Sequence[int]) -> Inputs:
        """Some rows of ``inputs``."""
        return Inputs(
            tuple(inputs.samples[i] for i in rows),
            tuple(inputs.conversations[i] for i in rows),
            tuple(inputs.prompts[i] for i in rows),
            tuple(inputs.media[i] for i in rows),
            collate([inputs.batch.rows[i] for i in rows], self.policy.pad_token_id),
        )

    def changed(
        self, inputs: Inputs, rows: Sequence[int], change: Callable[[Media], Media]
    ) -> Inputs:
        """Some rows of ``inputs`` with other media."""
        old = self.chosen(inputs, rows)
        media = tuple(map(change, old.media))
        batch = make_batch(self.policy, old.prompts, old.conversations, media, self.settings)
        return Inputs(old.samples, old.conversations, old.prompts, media, batch)
