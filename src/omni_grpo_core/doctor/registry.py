"""Every look and every rule, by area: what a diagnosis goes through.

An area adds its own tuples here, one import line each, with the stages that its looks may blame.
"""

from __future__ import annotations

from collections.abc import Mapping

from omni_grpo_core.doctor.causes import batch as rules_batch
from omni_grpo_core.doctor.causes import completion as rules_completion
from omni_grpo_core.doctor.causes import conversation as rules_conversation
from omni_grpo_core.doctor.causes import loss as rules_loss
from omni_grpo_core.doctor.causes import media as rules_media
from omni_grpo_core.doctor.causes import reward as rules_reward
from omni_grpo_core.doctor.checks import advantage as looks_advantage
from omni_grpo_core.doctor.checks import batch as looks_batch
from omni_grpo_core.doctor.checks import completion as looks_completion
from omni_grpo_core.doctor.checks import conversation as looks_conversation
from omni_grpo_core.doctor.checks import degenerate as looks_degenerate
from omni_grpo_core.doctor.checks import embeddings as looks_embeddings
from omni_grpo_core.doctor.checks import gradient as looks_gradient
from omni_grpo_core.doctor.checks import groups as looks_groups
from omni_grpo_core.doctor.checks import logged as looks_logged
from omni_grpo_core.doctor.checks import logits as looks_logits
from omni_grpo_core.doctor.checks import loss as looks_loss
from omni_grpo_core.doctor.checks import media as looks_media
from omni_grpo_core.doctor.checks import partial as looks_partial
from omni_grpo_core.doctor.checks import policy as looks_policy
from omni_grpo_core.doctor.checks import positions as looks_positions
from omni_grpo_core.doctor.checks import readings as looks_readings
from omni_grpo_core.doctor.checks import reward as looks_reward
from omni_grpo_core.doctor.checks import rows as looks_rows
from omni_grpo_core.doctor.checks import run as looks_run
from omni_grpo_core.doctor.checks import text as looks_text
from omni_grpo_core.doctor.evidence import Look, Rule
from omni_grpo_core.types import Stage

_AREAS: tuple[tuple[tuple[Look, ...], tuple[Stage, ...]], ...] = (
    (looks_conversation.LOOKS, ("conversation",)),
    (looks_text.LOOKS, ("text",)),
    (looks_media.LOOKS, ("media",)),
    (looks_batch.LOOKS, ("batch",)),
    (looks_rows.LOOKS, ("batch",)),
    (looks_policy.LOOKS, ("policy",)),
    (looks_embeddings.LOOKS, ("embeddings",)),
    (looks_positions.LOOKS, ("positions",)),
    (looks_logits.LOOKS, ("logits", "completion")),
    (looks_completion.LOOKS, ("completion",)),
    (looks_degenerate.LOOKS, ("completion",)),
    (looks_groups.LOOKS, ("completion", "reward", "advantage")),
    (looks_reward.LOOKS, ("parsed", "reward")),
    (looks_advantage.LOOKS, ("advantage",)),
    (looks_partial.LOOKS, ("advantage",)),
    (looks_readings.LOOKS, ("completion", "loss")),
    (looks_loss.LOOKS, ("advantage", "loss")),
    (looks_logged.LOOKS, ("loss",)),
    (looks_gradient.LOOKS, ("loss", "gradient")),
    (looks_run.LOOKS, ("gradient",)),
)
"""The looks of each area, and the stages that they may blame."""

LOOKS: tuple[Look, ...] = tuple(look for looks, _ in _AREAS for look in looks)
"""In the order in which they run. A look never knows of causes."""

BLAMES: Mapping[Look, tuple[Stage, ...]] = {look: of for looks, of in _AREAS for look in looks}
"""The stages of which nothing can be said once a look has failed."""

RULES: tuple[Rule, ...] = (
    *rules_conversation.RULES,
    *rules_media.RULES,
    *rules_batch.RULES,
    *rules_completion.RULES,
    *rules_reward.RULES,
    *rules_loss.RULES,
)
"""Explain evidence; never make any."""
