"""At the 7B's shape in bfloat16 the fast step differs from the plain one by rounding."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from omni_grpo_core.bench.rounding import rounding
from omni_grpo_core.bench.shapes import SETTINGS, make_policy
from omni_grpo_core.tolerances import HALF

pytestmark = [pytest.mark.gpu, pytest.mark.tiny]

SETTING = replace(SETTINGS["7b"], prompt=1500, groups=2, group=4, tokens=64)
FACTOR = 1.25
"""Between two errors that are both rounding: sums in another order draw other errors of the same
size. A wrong position or mask is off by several times the plain step's error."""


# random weights amplify from layer to layer what the first rounded: four show the error itself
@pytest.mark.parametrize("layers", [4, 28])
def test_the_fast_step_is_as_near_float32_as_the_plain_one(layers: int) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    policy = make_policy("7b", "cuda", "bfloat16", layers=layers)
    found = rounding(policy, SETTING)["sides"]
    plain, alone, fast = (found[side] for side in ("plain", "alone", "fast"))
    assert fast["times_plain"]["nats"] <= FACTOR
    assert fast["times_plain"]["gradient"]["median"] <= FACTOR
    assert fast["times_plain"]["gradient"]["p99"] <= 2 * FACTOR
    # as far from the plain step as that is from itself, when padding and batch are others
    assert fast["apart"]["mean"] <= FACTOR * alone["apart"]["mean"]
    if layers == 4:
        assert fast["apart"]["max"] <= HALF.worst
        assert fast["apart"]["mean"] <= HALF.mean
    assert plain["nats"]["mean"] > 0
