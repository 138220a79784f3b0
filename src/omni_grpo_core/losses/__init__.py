"""From rewards to a gradient: advantages, log-probabilities, loss and their metrics.

Everything here but :mod:`~omni_grpo_core.losses.exhausted` is a pure function, and checks the
shapes of its tensors. Nothing is imported here, so that ``omni_grpo_core.losses.advantages`` stays
usable without loading its siblings.
"""
