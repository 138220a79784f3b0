"""GRPO on a checkpoint: the loop, its step, what it saves, and what stops it."""
