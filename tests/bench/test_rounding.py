"""Rounding in bfloat16, on the tiny model: a step that computes something else shows."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version

from omni_grpo_core.bench.rounding import rounding
from omni_grpo_core.bench.shapes import ROUNDED, make_policy
from omni_grpo_core.core.forward import first_positions
from omni_grpo_core.fast import scoring

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        Version(version("transformers")) < Version("4.57"), reason="no attention functions"
    ),
]

SETTING = ROUNDED["tiny"]


def test_the_fast_step_is_as_near_float32_as_the_plain_one() -> None:
    found = rounding(make_policy("tiny", "cpu", "bfloat16"), SETTING)["sides"]
    assert found["plain"]["times_plain"]["nats"] == 1
    # a quarter for chance: sixty tokens, of which a few have most of the error
    assert found["fast"]["times_plain"]["nats"] < 1.25
    assert found["fast"]["times_plain"]["gradient"]["median"] < 1.25
    assert 0 < found["alone"]["apart"]["max"] < 0.5


def test_a_position_that_is_off_by_one_is_not_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "first_positions", lambda *given: first_positions(*given) + 1)
    found = rounding(make_policy("tiny", "cpu", "bfloat16"), SETTING)["sides"]
    assert found["fast"]["times_plain"]["nats"] > 1.5
