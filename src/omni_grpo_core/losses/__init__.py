"""From rewards to a gradient: advantages, log-probabilities, loss and their metrics.

Everything here but ``step`` and ``train`` is a pure function of tensors. Nothing is imported here,
so that ``omni_grpo_core.losses.advantages`` stays usable without loading its siblings.
"""
