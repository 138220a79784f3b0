"""How far floats may be from a golden, by platform: calibrated once, recorded, and never widened to
let an upgrade pass.

``golden/lanes.yaml`` holds what ``omni-grpo golden calibrate`` measured::

    cuda-sm90-bf16:
      float32: {atol: 0.05, rtol: 0.015625}
      gradient: {atol: 0.4, rtol: 0.015625}   # a stage's own, whatever the type
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.golden.classify import base_stage
from omni_grpo_core.golden.results import ORDER
from omni_grpo_core.io.strict import merge, read_mapping
from omni_grpo_core.trace.divergence import Lane, Tolerances

LANES = "lanes.yaml"
_COMPUTED = ("float32", "float")
_SHORT = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, slots=True)
class _File:
    platforms: Mapping[str, Mapping[str, Lane]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Lanes:
    """``plain``: by float type. ``stages``: by stage, over those."""

    plain: Tolerances = field(default_factory=Tolerances)
    stages: Mapping[str, Lane] = field(default_factory=dict)

    def of(self, stage: str) -> Tolerances:
        """The tolerances that hold for one stage.

        >>> Lanes(stages={"gradient": Lane(0.5, 0.0)}).of("gradient.2").lane("float")
        Lane(atol=0.5, rtol=0.0)
        """
        own = self.stages.get(base_stage(stage))
        return self.plain if own is None else Tolerances(dict.fromkeys(self.plain.lanes, own))


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


def _check_lane(item: str, lane: Lane) -> None:
    """A lane of NaN lets nothing pass, an endless one everything."""
    for name, value in (("atol", lane.atol), ("rtol", lane.rtol)):
        if not 0 <= value < (1 if name == "rtol" else math.inf):
            raise ConfigError(
                item,
                got=f"{name}: {value}",
                want="0 or more, finite; an rtol below 1",
                fix="correct it, or take it from version control again",
            )


def load_lanes(folder: Path, key: str) -> Lanes:
    """The lanes of a platform: those recorded in the golden folder over the default ones.

    Raises ``ConfigError`` for a file that is not YAML, has an unknown key or a lane that is none.
    """
    file = folder / LANES
    plain = default_lanes(key)
    if not os.path.lexists(file):
        return Lanes(plain)
    read: _File = merge(_File(), {"platforms": read_mapping(file)}, str(file))
    for platform, lanes in read.platforms.items():
        for name, lane in lanes.items():
            _check_lane(f"{file}: {platform}: {name}", lane)
    recorded = read.platforms.get(key, {})
    types = {name: lane for name, lane in recorded.items() if name in plain.lanes}
    stages = {name: lane for name, lane in recorded.items() if name in ORDER}
    unknown = sorted({*recorded} - {*types} - {*stages})
    if unknown:
        raise ConfigError(
            f"{file}: {key}",
            got=unknown[0],
            want=f"a float type ({', '.join(plain.lanes)}) or a stage ({', '.join(ORDER)})",
            fix="correct the name",
        )
    return Lanes(Tolerances({**plain.lanes, **types}), stages)
