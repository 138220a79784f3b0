"""Every tolerance within which two floats count as the same, with its reason.

None is ever widened to let a change pass. How far a platform's goldens may drift is measured and
kept in ``golden/tolerances.yaml``; :data:`BY_DTYPE` is its starting point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


def distance(was: float, now: float) -> float:
    """``|was - now|``; infinite if only one is finite, 0 for the same infinity or two NaN.

    >>> distance(1.0, 1.5), distance(math.nan, math.nan), distance(math.nan, 1.0)
    (0.5, 0.0, inf)
    """
    if was == now or (math.isnan(was) and math.isnan(now)):
        return 0.0
    apart = abs(was - now)
    return math.inf if math.isnan(apart) else apart


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a float may be from the one it is compared with: ``atol + rtol * |was|``."""

    atol: float
    rtol: float

    def allows(self, was: float, now: float, scale: float | None = None) -> bool:
        """Whether ``now`` is close enough to ``was``; ``scale`` replaces ``|was|``.

        >>> Tolerance(atol=0.1, rtol=0.0).allows(1.0, 1.05)
        True
        """
        apart = distance(was, now)
        size = abs(was) if scale is None else scale
        return apart == 0 or (apart < math.inf and apart <= self.atol + self.rtol * size)


@dataclass(frozen=True, slots=True)
class Limit:
    """How far two arrays may be apart: ``mean`` over all elements, ``worst`` for any one."""

    mean: float
    worst: float


FLOAT32 = Tolerance(atol=1e-5, rtol=1e-4)
"""A hundred times what left-padded against single rows differ by on the tiny checkpoint (1e-6 to
1e-5)."""
BY_DTYPE: Mapping[str, Tolerance] = {
    "float64": FLOAT32,
    "float32": FLOAT32,
    "float": FLOAT32,
    # relative: two spacings of the type; absolute: measured on logits
    "bfloat16": Tolerance(atol=5e-2, rtol=2**-6),
    "float16": Tolerance(atol=5e-3, rtol=2**-9),
}
"""Two passes of one pipeline over one input, by torch's name for the type."""


@dataclass(frozen=True, slots=True)
class Tolerances:
    """A tolerance for each float type, by torch's name (``float`` for Python floats). A type
    without one must agree exactly, as must every integer.

    >>> Tolerances().of("float32")
    Tolerance(atol=1e-05, rtol=0.0001)
    """

    by_dtype: Mapping[str, Tolerance] = field(default_factory=lambda: BY_DTYPE)

    def of(self, dtype: str) -> Tolerance:
        return self.by_dtype.get(dtype, Tolerance(0.0, 0.0))


HALF = Limit(mean=0.05, worst=0.5)
"""Logits and logprobs of one policy computed in two ways (row alone or in a batch, with or without
cache) in half precision: at worst 0.33 measured on the tiny checkpoint."""
DRIFT: Mapping[str, float] = {"float32": 1e-3, "bfloat16": HALF.worst}
"""Nats, at worst, between sampling and scoring in a training run, by its precision. Measured
on the tiny checkpoint, 18 steps of 32 completions at temperatures 1 to 3: up to 2e-6 and 0.081;
sampling at 1.3 times the temperature moves some token by more than 1."""
FOREIGN: Mapping[str, Limit] = {
    # float32 sums in another order: 1e-5 measured on the tiny checkpoint, 1e-4 at 7B's depth
    "float32": Limit(1e-3, 1e-2),
    "float64": Limit(1e-3, 1e-2),
    # 8 bits of mantissa through every layer, and kernels that are not ours
    "bfloat16": Limit(0.1, 2.0),
    "float16": Limit(0.02, 0.5),
}
"""Logprobs, in nats, of a third-party trainer and of the reference, both correct."""
ENGINE: Mapping[str, Limit] = {
    # measured with vLLM 0.32 on the tiny checkpoint: 1e-5 at worst; positions one token early: 0.3
    "float32": Limit(1e-5, 1e-4),
    # kernels that are not ours; not measured, no GPU engine has been run
    "bfloat16": FOREIGN["bfloat16"],
}
"""Logprobs, in nats, of a rollout engine and of the policy, with the same weights, by precision."""
FEATURES = Tolerance(atol=1e-4, rtol=1e-4)
"""Normalised pixels and mel features are a few units large, and went through the same float32
arithmetic in two processes."""
POSITION = 0.01
"""For a time position: float32 resolves this up to 100,000."""

EQUAL_REWARDS = 1e-8
"""Rewards of a group that lie within this of each other are equal: weighted sums of the same
scores differ by rounding."""
EQUAL_RECORDED_REWARDS = 1e-6
"""The same for recorded rewards, which a trainer may keep as float32."""

LEAST_SHIFT = 1e-3
"""Nats per token. Where a question is about a medium, removing it moves the answer's logprobs by
far more (0.1 to 10 on the tiny checkpoint)."""
NEAR_TIE = 0.1
"""Nats. Rounding flips ties of 1e-5 (float32) and, in bfloat16, of about this size."""
MARGIN_LOST = 0.1
"""Share of a margin that drift may use up; the same number of nats where the margin was small."""
TRAINING = Tolerance(atol=1e-4, rtol=0.02)
"""A number of a GRPO step: a weight matrix off by a thousandth moves loss and gradient by less, a
wrong normaliser or advantage by far more. The absolute floor is for what is zero up to rounding,
such as the loss of balanced advantages."""
CLIP_RATE = Tolerance(atol=0.02, rtol=0.02)
"""The same for a share of tokens: drift may push one or two over the clip bound, or back."""


def equal_rewards(scores: Sequence[float]) -> bool:
    """Whether two or more rewards are all equal.

    >>> equal_rewards([0.1 + 0.2, 0.3]), equal_rewards([0.3])
    (True, False)
    """
    return len(scores) > 1 and max(scores) - min(scores) <= EQUAL_REWARDS
