"""Formats of dumps by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omni_grpo_core.doctor.dumps import nemo_rl, samples, swift, trl, verl
from omni_grpo_core.doctor.dumps.rows import Read, trace_of
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.types import Trace


@dataclass(frozen=True, slots=True)
class Format:
    """``made_by``: whose published code the format was taken from, with its version."""

    made_by: str
    read: Read


FORMATS: Mapping[str, Format] = {
    "verl": Format("verl 0.9.1", verl.read),
    "verl-omni": Format("verl-omni 0.2.0rc1", verl.read),
    "slime": Format("slime 0.3.1", samples.read),
    "miles": Format("miles 0.1.0", samples.read),
    "trl": Format("TRL 1.16.0", trl.read),
    "swift": Format("ms-swift 4.6.0", swift.read),
    "nemo-rl": Format("NeMo-RL 0.6.0", nemo_rl.read),
}


def read_dump(name: str, path: Path) -> list[tuple[str, Trace]]:
    """The steps of the dump ``path`` of the format ``name``, as recorded steps by their place.

    Raises:
        ConfigError: there is no such format.
        TraceError: the dump is not what that trainer writes.
    """
    if name not in FORMATS:
        raise ConfigError(
            f"--dump {name}",
            got="a format that is not known",
            want=", ".join(FORMATS),
            fix="name the trainer that wrote the dump",
        )
    form = FORMATS[name]
    return [(step.name, trace_of(step, form.made_by)) for step in form.read(path)]
