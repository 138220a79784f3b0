"""``omni-grpo`` whose completions all have ``max_new_tokens`` tokens, for times that compare: each
process has the same work in every step."""

from __future__ import annotations

from omni_grpo_core import __main__ as command
from omni_grpo_core.core import policy


def main() -> None:
    suppressed = policy._suppressed
    policy._suppressed = lambda tokenizer, vocabulary, eos: suppressed(tokenizer, vocabulary, ())
    command.main()


if __name__ == "__main__":
    main()
