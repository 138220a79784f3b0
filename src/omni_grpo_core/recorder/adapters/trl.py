"""TRL's ``GRPOTrainer`` and its subclasses."""

from omni_grpo_core.recorder.adapters.adapter import Adapter

TRL = Adapter(
    name="TRL's GRPOTrainer",
    package="trl",
    rollout="_generate_and_score_completions",
    scores="_get_per_token_logps_and_entropies",
    loss="_compute_loss",
)
