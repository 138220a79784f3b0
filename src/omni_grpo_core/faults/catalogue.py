"""Every fault there is, in pipeline order."""

from __future__ import annotations

from omni_grpo_core.faults import (
    batch,
    conversation,
    generation,
    learning,
    media,
    model,
    rewarding,
)
from omni_grpo_core.faults.fault import Fault

FAULTS: tuple[Fault, ...] = tuple(
    fault
    for area in (conversation, media, batch, model, generation, rewarding, learning)
    for fault in area.shelf.faults
)
BY_ID = {fault.id: fault for fault in FAULTS}
