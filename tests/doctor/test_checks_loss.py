"""Metrics logged with a loss that its inputs do not give, each by hand.

With ratio 1 the token losses are minus the advantages. Rows of 3, 2, 3 and 2 tokens with advantages
1, -1, 1, -1: the mean over rows is 0, the mean over tokens -(3 - 2 + 3 - 2) / 10 = -0.2.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_recordings import case, found, lost, stepped

from omni_grpo_core.doctor.checks import logged as checks_logged

LOOKS = checks_logged.LOOKS
THIRD = torch.full((4, 3), 1 / 3).log()


def facts(*values: Any) -> set[str]:
    return set(found(LOOKS, case(*values)))


def test_the_clip_rate_of_the_other_side() -> None:
    """Ratios 3/2 in the first column. Where the advantage is 1 (rows 0, 2) the clip applies: 2 of
    10 tokens; in rows 1 and 3, of the other sign, 2 of 10, it does not. With row 1's ratio 1:
    right 0.2, other 0.1."""
    old = THIRD.clone()
    old[:, 0] -= math.log(1.5)
    old[1, 0] = THIRD[1, 0]
    # l = -1.2 of three tokens in rows 0 and 2, 1.5 of two in row 3: the rest is -1 or 1
    value = ((-1.2 - 2) / 3 + 1 + (-1.2 - 2) / 3 + (1.5 + 1) / 2) / 4
    right = lost(value, old=old, metrics={"clip_ratio": 0.2})
    assert facts(right) == set()
    wrong = replace(right, metrics={"clip_ratio": 0.1})
    assert found(LOOKS, case(wrong))["clip-rate-differs"].values["other"] == pytest.approx(0.1)


def test_a_negative_kl() -> None:
    assert "kl-negative" in facts(lost(0.0, metrics={"kl": -0.1}), stepped())
