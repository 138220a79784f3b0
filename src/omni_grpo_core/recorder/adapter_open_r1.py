"""open-r1-multimodal, VLM-R1, HumanOmniV2: a trainer with a ``vlm_module``.

They grew from an early TRL: ``compute_loss`` makes the loss itself, and ``_get_per_token_logps``
scores prompt and completion alike. HumanOmniV2 adds partial rewards, each with a token mask, under
a key that it spells ``patial_advantages``. What ``prepare_prompt`` and ``prepare_model_inputs`` do
is seen at the processor.
"""

from __future__ import annotations

from omni_grpo_core.recorder.trainer_watch import Style

OPEN_R1 = Style(
    name="open-r1",
    loss="compute_loss",
    scores="_get_per_token_logps",
    whole=True,
    partial="patial_advantages",
)
