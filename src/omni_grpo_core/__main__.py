"""``python -m omni_grpo_core`` is ``omni-grpo``."""

from omni_grpo_core.cli import main

main()
