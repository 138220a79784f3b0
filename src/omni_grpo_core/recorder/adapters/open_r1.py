"""The open-r1-multimodal family: HumanOmniV2, VLM-R1 and their kin, which are no packages."""

from omni_grpo_core.recorder.adapters.adapter import Adapter

OPEN_R1 = Adapter(
    name="open-r1-multimodal",
    rollout="_generate_and_score_completions",
    scores="_get_per_token_logps",
    whole=True,
    loss="compute_loss",
    partial="patial_advantages",
)
