"""How far floats may be from a golden, per platform: calibrated once, recorded, and never widened
to let an upgrade pass.

``golden/tolerances.yaml`` holds what ``omni-grpo golden calibrate`` measured::

    cuda-sm90-bf16:
      float32: {atol: 0.05, rtol: 0.015625}
      gradient: {atol: 0.4, rtol: 0.015625}   # of one stage, whatever the dtype
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.golden.classify import base_stage
from omni_grpo_core.golden.environment import DTYPES
from omni_grpo_core.golden.results import ORDER
from omni_grpo_core.io.strict import merge, read_mapping
from omni_grpo_core.tolerances import Tolerance, Tolerances

TOLERANCES = "tolerances.yaml"
_LANES = "lanes.yaml"
"""The file's name before 0.2."""
_COMPUTED = ("float32", "float")


@dataclass(frozen=True, slots=True)
class _File:
    platforms: Mapping[str, Mapping[str, Tolerance]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StageTolerances:
    """``plain``: by dtype. ``stages``: by stage, overriding ``plain``."""

    plain: Tolerances = field(default_factory=Tolerances)
    stages: Mapping[str, Tolerance] = field(default_factory=dict)

    def of(self, stage: str) -> Tolerances:
        """The tolerances of one stage.

        >>> StageTolerances(stages={"gradient": Tolerance(0.5, 0.0)}).of("gradient.2").of("float")
        Tolerance(atol=0.5, rtol=0.0)
        """
        own = self.stages.get(base_stage(stage))
        return self.plain if own is None else Tolerances(dict.fromkeys(self.plain.by_dtype, own))


def default_tolerances(key: str) -> Tolerances:
    """The default tolerances. On a platform that computes in half precision, its float32 outputs
    (scores, logprobs) are no more precise than that.

    >>> default_tolerances("cuda-sm90-bf16").of("float32").atol
    0.05
    >>> default_tolerances("cpu-fp32").of("float32").atol
    1e-05
    """
    plain = Tolerances()
    dtype = DTYPES.get(key.rpartition("-")[2], "float32")
    if dtype == "float32":
        return plain
    return Tolerances({**plain.by_dtype, **dict.fromkeys(_COMPUTED, plain.of(dtype))})


def _check_tolerance(item: str, tolerance: Tolerance) -> None:
    """A NaN tolerance would reject everything, an infinite one nothing."""
    for name, value in (("atol", tolerance.atol), ("rtol", tolerance.rtol)):
        if not 0 <= value < (1 if name == "rtol" else math.inf):
            raise ConfigError(
                item,
                got=f"{name}: {value}",
                want="0 or more, finite; an rtol below 1",
                fix="correct it, or restore it from version control",
            )


def tolerances_file(folder: Path) -> Path:
    """The path of a golden folder's tolerances: under the old name, with a warning, if only that
    exists."""
    old = folder / _LANES
    if os.path.lexists(folder / TOLERANCES) or not os.path.lexists(old):
        return folder / TOLERANCES
    warnings.warn(f"{old} is called {TOLERANCES} since 0.2: rename it", FutureWarning, 2)
    return old


def load_tolerances(folder: Path, key: str) -> StageTolerances:
    """A platform's tolerances: the defaults, overridden by those recorded in the golden folder.

    Raises ``ConfigError`` for a file that is not YAML, has an unknown key or an invalid tolerance.
    """
    file = tolerances_file(folder)
    plain = default_tolerances(key)
    if not os.path.lexists(file):
        return StageTolerances(plain)
    read: _File = merge(_File(), {"platforms": read_mapping(file)}, str(file))
    for platform, by_name in read.platforms.items():
        for name, tolerance in by_name.items():
            _check_tolerance(f"{file}: {platform}: {name}", tolerance)
    recorded = read.platforms.get(key, {})
    types = {name: tolerance for name, tolerance in recorded.items() if name in plain.by_dtype}
    stages = {name: tolerance for name, tolerance in recorded.items() if name in ORDER}
    unknown = sorted({*recorded} - {*types} - {*stages})
    if unknown:
        raise ConfigError(
            f"{file}: {key}",
            got=unknown[0],
            want=f"a dtype ({', '.join(plain.by_dtype)}) or a stage ({', '.join(ORDER)})",
            fix="correct the name",
        )
    return StageTolerances(Tolerances({**plain.by_dtype, **types}), stages)
