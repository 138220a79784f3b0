"""``omni-grpo`` whose completions all have ``max_new_tokens`` tokens, for times that compare: each
process has the same work in every step."""

from __future__ import annotations

from omni_grpo_core.__main__ import main
from omni_grpo_core.core import policy

_suppressed = policy._suppressed
policy._suppressed = lambda tokenizer, vocabulary, eos: _suppressed(tokenizer, vocabulary, ())

if __name__ == "__main__":
    main()
