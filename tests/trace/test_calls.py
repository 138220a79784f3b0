"""Each recorded call has a stage; a stage's value is requested by its type."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from small_traces import small_trace

from omni_grpo_core.errors import TraceError
from omni_grpo_core.trace.calls import CALLS, Call, SamplesSeen, TemplateCall, calls_of
from omni_grpo_core.trace.codec import encode
from omni_grpo_core.trace.store import value_at
from omni_grpo_core.types import STAGES, Batch, Rollout, StageRecord, Trace

TEMPLATE = TemplateCall((), {}, ("a",), False)
SAMPLES = SamplesSeen(({"problem": "why?"},), None)


def first_text(call: Call) -> str | None:
    # mypy narrows the union by its members' stages
    return call.texts[0] if call.stage == "text" else None


def test_every_call_has_a_stage() -> None:
    stages = [kind.stage for kind in CALLS]
    assert {*stages} <= {*STAGES}
    assert [first_text(call) for call in (SAMPLES, TEMPLATE)] == [None, "a"]
    assert get_args(Call) == CALLS


def test_the_stage_is_a_class_variable_and_not_stored() -> None:
    assert "stage" not in encode(TEMPLATE)[0]
    assert all("stage" not in {f.name for f in dataclasses.fields(kind)} for kind in CALLS)


def test_calls_of_one_kind_in_order() -> None:
    other = dataclasses.replace(TEMPLATE, texts=("b",))
    records = tuple(StageRecord(c.stage, c, (), 0.0) for c in (TEMPLATE, SAMPLES, other))
    assert calls_of(Trace({}, records), TemplateCall) == (TEMPLATE, other)


def test_the_value_of_a_stage_has_the_requested_type() -> None:
    trace = small_trace()
    assert value_at(trace, "batch", Batch).input_ids.dtype == torch.int64
    with pytest.raises(TraceError, match="batch: found a Batch, wanted a Rollout"):
        value_at(trace, "batch", Rollout)
    with pytest.raises(TraceError, match="gradient: found nothing, wanted a Batch"):
        value_at(trace, "gradient", Batch)
