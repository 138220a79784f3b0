"""Every look and every rule, by area: what a diagnosis goes through.

An area adds its own tuples here, one import line each.
"""

from __future__ import annotations

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

LOOKS: tuple[Look, ...] = (
    *looks_conversation.LOOKS,
    *looks_text.LOOKS,
    *looks_media.LOOKS,
    *looks_batch.LOOKS,
    *looks_rows.LOOKS,
    *looks_policy.LOOKS,
    *looks_embeddings.LOOKS,
    *looks_positions.LOOKS,
    *looks_logits.LOOKS,
    *looks_completion.LOOKS,
    *looks_degenerate.LOOKS,
    *looks_groups.LOOKS,
    *looks_reward.LOOKS,
    *looks_advantage.LOOKS,
    *looks_partial.LOOKS,
    *looks_readings.LOOKS,
    *looks_loss.LOOKS,
    *looks_logged.LOOKS,
    *looks_gradient.LOOKS,
    *looks_run.LOOKS,
)
"""In the order in which they run. A look never knows of causes."""

RULES: tuple[Rule, ...] = (
    *rules_conversation.RULES,
    *rules_media.RULES,
    *rules_batch.RULES,
    *rules_completion.RULES,
    *rules_reward.RULES,
    *rules_loss.RULES,
)
"""Explain evidence; never make any."""
