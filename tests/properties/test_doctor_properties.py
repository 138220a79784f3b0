"""Missing parts of a clean recording cause no finding: call types that were not recorded, a run
killed midway, tensors too large to keep, no checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from doctor_recordings import steps_with
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_grpo_core.doctor.checks.batch import LOOKS as BATCH
from omni_grpo_core.doctor.checks.conversation import LOOKS as CONVERSATION
from omni_grpo_core.doctor.checks.embeddings import LOOKS as EMBEDDINGS
from omni_grpo_core.doctor.checks.media import LOOKS as MEDIA
from omni_grpo_core.doctor.checks.positions import LOOKS as POSITIONS
from omni_grpo_core.doctor.checks.text import LOOKS as TEXT
from omni_grpo_core.doctor.continuity import LOOKS as EDGES
from omni_grpo_core.doctor.diagnose import diagnose
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.trace.calls import (
    ForwardCall,
    GenerateCall,
    MediumSeen,
    ProcessorCall,
    SamplesSeen,
    TemplateCall,
    TensorSeen,
)
from omni_grpo_core.types import StageRecord, Trace

LOOKS = (*CONVERSATION, *TEXT, *MEDIA, *BATCH, *EDGES, *EMBEDDINGS, *POSITIONS)
AUDIO = ("interleaved", "separate", "off")


def reduced(value: Any, large: frozenset[str]) -> Any:
    """``value`` from a recorder for which the tensors named in ``large`` were too large."""
    described = dict.fromkeys(large, TensorSeen("float32", (0,), 0.0, 0.0, 0.0, 0.0, ()))
    if isinstance(value, ProcessorCall):
        return replace(
            value,
            outputs={k: v for k, v in value.outputs.items() if k not in large},
            large={k: v for k, v in described.items() if k in value.outputs},
            videos=tuple(without_values(m) if "videos" in large else m for m in value.videos),
            audios=tuple(without_values(m) if "audios" in large else m for m in value.audios),
        )
    if isinstance(value, GenerateCall | ForwardCall):
        return replace(
            value,
            inputs={k: v for k, v in value.inputs.items() if k not in large},
            large={k: v for k, v in described.items() if k in value.inputs},
            inputs_embeds=None if "inputs_embeds" in large else value.inputs_embeds,
            position_ids=None if "position_ids" in large else value.position_ids,
        )
    return value


def without_values(medium: MediumSeen) -> MediumSeen:
    return replace(medium, values=None)


KINDS = (SamplesSeen, TemplateCall, ProcessorCall, GenerateCall, ForwardCall)
TENSORS = (
    *("pixel_values_videos", "input_features", "pixel_values", "inputs_embeds", "position_ids"),
    *("videos", "audios"),
)


# an example takes tenths of a second
@settings(max_examples=20, deadline=None)
@given(
    audio=st.sampled_from(AUDIO),
    unseen=st.sets(st.sampled_from(KINDS)),
    end=st.integers(1, 20),
    large=st.frozensets(st.sampled_from(TENSORS)),
    reference=st.booleans(),
)
def test_missing_recordings_cause_no_finding(
    audio: str, unseen: set[type], end: int, large: frozenset[str], reference: bool
) -> None:
    rows = {"interleaved": (12, 16, 20), "separate": (12, 18, 20), "off": (9, 16, 20)}[audio]
    (step,) = steps_with(audio=audio, rows=rows)
    kept = tuple(
        StageRecord(record.stage, reduced(record.value, large), (), 0.0)
        for record in step.trace.stages[:end]
        if type(record.value) not in unseen
    )
    partial = Case(Trace(step.trace.header, kept), step.reference if reference else None)
    diagnosis = diagnose(partial, looks=LOOKS, rules=())
    assert [e.sentence for finding in diagnosis.findings for e in finding.evidence] == []
    assert [note for note in diagnosis.missing if "failed on this recording" in note] == []
