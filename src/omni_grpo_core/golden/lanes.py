"""How far floats may be from a golden, by platform: calibrated once, recorded, and never widened to
let an upgrade pass.

``golden/lanes.yaml`` holds what ``omni-grpo golden calibrate`` measured::

    cpu-fp32:
      float32: {atol: 1.0e-05, rtol: 1.0e-04}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omni_grpo_core.strict import merge, read_mapping
from omni_grpo_core.trace.divergence import Lane, Tolerances

LANES = "lanes.yaml"
_COMPUTED = ("float32", "float")
_SHORT = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, slots=True)
class _File:
    platforms: Mapping[str, Mapping[str, Lane]] = field(default_factory=dict)


def default_lanes(key: str) -> Tolerances:
    """The lanes to start from. On a platform that computes in half precision what it hands on as
    float32 (scores, logprobs) is as coarse as that.

    >>> default_lanes("cuda-sm90-bf16").lane("float32").atol
    0.05
    >>> default_lanes("cpu-fp32").lane("float32").atol
    1e-05
    """
    plain = Tolerances()
    half = _SHORT.get(key.rpartition("-")[2])
    if half is None:
        return plain
    return Tolerances({**plain.lanes, **dict.fromkeys(_COMPUTED, plain.lane(half))})


def load_lanes(folder: Path, key: str) -> Tolerances:
    """The lanes of a platform: those recorded in the golden folder over the default ones.

    Raises ``ConfigError`` for a file that is not YAML or has an unknown key.
    """
    file = folder / LANES
    plain = default_lanes(key)
    if not file.is_file():
        return plain
    recorded: _File = merge(_File(), {"platforms": read_mapping(file)}, str(file))
    return Tolerances({**plain.lanes, **recorded.platforms.get(key, {})})
