"""The open-r1-multimodal family: HumanOmniV2, VLM-R1 and their kin, which are no packages.

Some roll out inside their loss, which then takes rows; the first of them, R1-V, without a method
for it, so that of its rollout only what the model, the processor and the rewards show is seen.
"""

from omni_grpo_core.recorder.adapters.adapter import Adapter

OPEN_R1 = Adapter(
    name="open-r1-multimodal",
    rollout="_generate_and_score_completions",
    scores="_get_per_token_logps",
    whole=True,
    loss="compute_loss",
    partial="patial_advantages",
)
R1_V = Adapter(name="R1-V", scores="_get_per_token_logps", whole=True, loss="compute_loss")
