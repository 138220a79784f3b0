"""The loops that a campaign plants faults in, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.faults.config import LoopConfig
from omni_grpo_core.faults.loop_buffered import BufferedLoop
from omni_grpo_core.faults.loop_experience import ExperienceLoop
from omni_grpo_core.faults.loop_per_prompt import PerPromptLoop
from omni_grpo_core.faults.reference_loop import ReferenceLoop
from omni_grpo_core.faults.seams import Loop


@dataclass(frozen=True, slots=True)
class Make:
    """A loop, and what a recorder is told of it. ``shape``: which loop; ``noted``: it hands over
    its settings and what it can note, otherwise a recorder gets the model, the processor and the
    reward functions alone. ``config``: how it is run unless a fault needs something else.
    ``recipe``: as a healthy loop's."""

    name: str
    shape: str
    build: Callable[[Policy, LoopConfig], Loop]
    noted: bool = False
    config: LoopConfig = field(default_factory=LoopConfig)
    recipe: tuple[str, ...] = ()


_DAPO = LoopConfig(loss_type="dapo")

MAKES: Mapping[str, Make] = {
    make.name: make
    for make in (
        Make("reference", "reference", ReferenceLoop, noted=True),
        Make("per-prompt", "per-prompt", PerPromptLoop),
        Make("buffered", "buffered", BufferedLoop, config=_DAPO),
        Make("experience", "experience", ExperienceLoop, config=_DAPO),
        Make("per-prompt-noted", "per-prompt", PerPromptLoop, noted=True),
        Make("buffered-noted", "buffered", BufferedLoop, noted=True, config=_DAPO),
    )
}
"""A fault is planted in those without ``-noted``; one that only notes can show, in the three that
note. Their shapes share no code but the seams that are one call."""
