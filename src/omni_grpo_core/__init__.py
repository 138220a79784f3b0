"""A test-first GRPO core for Qwen-Omni models, with goldens that say what an upgrade changed."""

__version__ = "0.1.0"
