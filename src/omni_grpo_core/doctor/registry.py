"""Every look and every rule, by area: what a diagnosis goes through.

An area adds its own tuples here, one import line each, with the stages that its looks may blame.
"""

from __future__ import annotations

from collections.abc import Mapping

from omni_grpo_core.doctor import (
    looks_advantage,
    looks_batch,
    looks_completion,
    looks_conversation,
    looks_degenerate,
    looks_embeddings,
    looks_gradient,
    looks_groups,
    looks_logged,
    looks_logits,
    looks_loss,
    looks_media,
    looks_partial,
    looks_policy,
    looks_positions,
    looks_readings,
    looks_reward,
    looks_rows,
    looks_run,
    looks_text,
    rules_batch,
    rules_completion,
    rules_conversation,
    rules_loss,
    rules_media,
    rules_reward,
)
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
