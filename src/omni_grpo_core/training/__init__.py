"""GRPO training on the core, and the guard that stops a run that cannot learn."""
