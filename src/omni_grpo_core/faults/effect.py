"""Whether a fault has any effect beside another one: decided from runs, never from a diagnosis.

Beside garbage completions all rewards are 0, and so are advantages of the wrong sign; where a run
has stopped, what would happen later is not reached. So a pair's run is repeated, with equal
settings and seeds, with each of its faults alone. A fault has no effect where the run without it
left the same: every recorded value and text, loss and gradient, to the last bit, and the weights
after the last step. Only the time that calls took may differ. Any other trace is one that could be
found.
"""

from __future__ import annotations

import gc
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from omni_grpo_core.doctor.load import read_traces
from omni_grpo_core.faults.config import LoopConfig
from omni_grpo_core.faults.fault import Fault
from omni_grpo_core.faults.makes import Make
from omni_grpo_core.faults.seams import Loop
from omni_grpo_core.faults.trial import Summary, diagnosed, play, steps_of

_OF_TIME = ("seconds", "body_sha256")
"""Keys of a stored step that depend on how long calls took. Its tensors are in it by checksum."""


def trial_of_pair(
    faults: Sequence[Fault], config: LoopConfig, make: Make, *, causes: bool = True
) -> tuple[Summary, tuple[str, ...]]:
    """As :func:`~omni_grpo_core.faults.trial.trial`, and the ids of the faults without effect."""
    steps = steps_of(faults)
    with tempfile.TemporaryDirectory() as folder:
        loop, raised = play(faults, config, Path(folder), make, steps)
        left = left_by(loop, Path(folder))
        found = diagnosed(read_traces(Path(folder)), raised, config, causes)
    without = []
    for fault in faults:
        # a loop and its hooks reference each other, and keep a model alive
        del loop
        gc.collect()
        others = [other for other in faults if other is not fault]
        with tempfile.TemporaryDirectory() as folder:
            loop, _ = play(others, config, Path(folder), make, steps)
            if left_by(loop, Path(folder)) == left:
                without.append(fault.id)
    return found, tuple(without)


def left_by(loop: Loop, folder: Path) -> str:
    """A checksum of what a run recorded in ``folder`` and of the weights that it ended with."""
    found = hashlib.sha256()
    for step in sorted(folder.rglob("trace.json")):
        held = json.loads(step.read_text("utf-8", "surrogatepass"), object_pairs_hook=_timeless)
        found.update(json.dumps([str(step.relative_to(folder)), held]).encode())
    for name, weight in loop.model.state_dict().items():
        found.update(name.encode())
        found.update(weight.detach().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _timeless(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if name not in _OF_TIME}
