"""When a policy can take the fast step, and what speaks against it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.fast.attention import takes_functions
from omni_grpo_core.fast.obstacles import in_config, refused, too_old
from omni_grpo_core.fast.step import FastStep


def choose_fast(
    fast: Literal["auto", "on", "off"], policy: Policy, warn: Callable[[str], None]
) -> FastStep | None:
    """The fast step of a policy, or ``None`` for the plain one.

    ``auto``: the fast one on a CUDA device, unless something speaks against it, which ``warn`` is
    called with; on a CPU the plain one, which is as fast there. Raises ``ConfigError`` if it is
    ``on`` and something speaks against it.
    """
    if fast == "off" or (fast == "auto" and policy.device.type == "cpu"):
        return None
    reason = obstacle(policy)
    if reason is None:
        return FastStep(policy)
    if fast == "on":
        raise refused(reason)
    warn(f"the plain step is used instead of the fast one: {reason}")
    return None


def obstacle(policy: Policy) -> str | None:
    """Why the fast step would not compute what the plain one does; ``None``: it would."""
    config: Any = policy.text_model.config
    chosen = config._attn_implementation
    if not takes_functions(policy.text_model):
        return too_old()
    if chosen != "sdpa":
        return f"attention {chosen!r}: it stands for the model's 'sdpa' alone"
    return in_config(vars(config))
