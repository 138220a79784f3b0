"""Both halves of the fast step for one policy, and what they share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.fast.compiled import Compiled
from omni_grpo_core.fast.prompts import Prompts
from omni_grpo_core.fast.rollout import shared_rollout
from omni_grpo_core.fast.scoring import packed_scores
from omni_grpo_core.losses.logprobs import ScoredTokens
from omni_grpo_core.types import Batch, Rollout


class FastStep:
    """Stands for the plain rollout and the plain scoring forward of ``policy``."""

    def __init__(self, policy: Policy, prompts: Prompts | None = None) -> None:
        self.policy = policy
        self._compiled = Compiled(policy)
        self._prompts = prompts or Prompts(policy)

    def of_copy(self, policy: Policy) -> FastStep:
        """That of a copy as the policy is now: what frozen towers computed is the same there."""
        return FastStep(policy, self._prompts if self._prompts.frozen else None)

    def rollout(self, batch: Batch, **settings: Any) -> Rollout:
        """As :func:`~omni_grpo_core.core.rollout.rollout`; begins a step."""
        self._prompts.forget()
        return shared_rollout(
            self.policy, batch, prompts=self._prompts, compiled=self._compiled, **settings
        )

    def scores(
        self, batch: Batch, ids: Tensor, mask: Tensor, *, temperature: float
    ) -> ScoredTokens:
        """As the plain scoring forward. With whole groups in ``batch``, each prompt is computed
        once; frozen towers were in the rollout."""
        return packed_scores(
            self.policy, batch, ids, mask, temperature=temperature, prompts=self._prompts
        )
