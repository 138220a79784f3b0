"""Text in, scores and reasons out. See :mod:`omni_grpo_core.rewards.base` for the contract.

Nothing is imported here, so that ``omni_grpo_core.rewards.parse`` stays light.
"""
