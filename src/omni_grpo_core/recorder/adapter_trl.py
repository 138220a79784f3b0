"""TRL's ``GRPOTrainer``, 1.0 and later: scores of the completion only, ``_compute_loss``."""

from __future__ import annotations

from omni_grpo_core.recorder.trainer_watch import Style

TRL = Style(
    name="trl",
    loss="_compute_loss",
    scores="_get_per_token_logps_and_entropies",
    whole=False,
)
