"""Which stages of a recorded step were judged; of the others, why not, and what would show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from omni_grpo_core.doctor.evidence import Case, Finding
from omni_grpo_core.doctor.verdict import STATES, Coverage, State
from omni_grpo_core.trace.calls import (
    AdvantageSeen,
    ForwardCall,
    GenerateCall,
    LossGradient,
    LossSeen,
    ProcessorCall,
    RewardCall,
    StepSeen,
    TemplateCall,
)
from omni_grpo_core.types import STAGES, Stage


@dataclass(frozen=True, slots=True)
class _Shown:
    """``by``: the calls that carry values of a stage. ``unseen``: why there are none, to the user.
    ``needs``: what it could not be compared with; ``reference``: that needs a checkpoint."""

    by: tuple[type, ...]
    unseen: str
    needs: str
    reference: bool = False


_NO_FORWARD = "no forward of the recorded model: pass the model that generates and scores"
_SHOWN: Mapping[Stage, _Shown] = {
    "conversation": _Shown(
        (TemplateCall,),
        "no apply_chat_template call was recorded",
        "the data set's rows were not recorded (recorder.note hands them over), so its questions "
        "and media have nothing to be compared with",
    ),
    "text": _Shown(
        (TemplateCall, ProcessorCall),
        "neither apply_chat_template nor the processor was called",
        "its prompts are not ChatML",
    ),
    "media": _Shown(
        (ProcessorCall,),
        "the processor was not called: pass the processor that prepares the prompts",
        "no image, clip or sound could be followed to its source",
    ),
    "batch": _Shown(
        (ProcessorCall,),
        "the processor was not called: pass the processor that prepares the prompts",
        "its rows could not be made again",
        reference=True,
    ),
    "embeddings": _Shown(
        (GenerateCall, ForwardCall), _NO_FORWARD, "no row with media was kept", reference=True
    ),
    "positions": _Shown(
        (GenerateCall, ForwardCall), _NO_FORWARD, "no row's positions were kept", reference=True
    ),
    "logits": _Shown(
        (ForwardCall, GenerateCall), _NO_FORWARD, "no score could be made again", reference=True
    ),
    "completion": _Shown(
        (GenerateCall,),
        "generate was not called: a rollout engine in another process is not seen",
        "its completions were not kept",
    ),
    "parsed": _Shown(
        (RewardCall,),
        "no reward function was called: pass reward_funcs",
        "no reward asks for a structure",
    ),
    "reward": _Shown(
        (RewardCall,),
        "no reward function was called: pass reward_funcs",
        "no reward could be probed, so none is known to be right",
    ),
    "advantage": _Shown(
        (AdvantageSeen, LossGradient),
        "neither advantages nor the gradient of a loss were recorded",
        "no reward could be followed to its advantage",
    ),
    "loss": _Shown(
        (LossSeen, LossGradient),
        "no loss was recorded, and no gradient at the logits of a scoring forward",
        "its value and gradient could not be read",
    ),
    "gradient": _Shown(
        (StepSeen,), "no optimizer step was recorded", "nothing of the step could be compared"
    ),
}
"""Each stage that a call makes visible, in pipeline order."""


def coverage_of(
    case: Case,
    findings: Sequence[Finding],
    inherited: Iterable[Stage],
    failed: Mapping[Stage, str],
) -> tuple[Coverage, ...]:
    """What is known of each stage of a step. ``failed``: how a look that may blame it failed."""
    found: dict[Stage, Coverage] = {}
    for stage, shown in _SHOWN.items():
        found[stage] = _unjudged(case, stage, shown)
    for stage in case.judged:
        found[stage] = Coverage(stage, "sound")
    for stage, why in failed.items():
        if stage in _SHOWN and found[stage].state != "unseen":
            found[stage] = Coverage(stage, "failed", why)
    for stage in inherited:
        found[stage] = Coverage(stage, "inherited")
    for finding in findings:
        state: State = "broken" if finding.severity == "breaks" else "differs"
        found[finding.stage] = Coverage(finding.stage, state)
    return _in_order(found)


def merged(several: Iterable[Sequence[Coverage]]) -> tuple[Coverage, ...]:
    """What is known of each stage from all steps: the most that any of them shows."""
    found: dict[Stage, Coverage] = {}
    for coverage in (c for step in several for c in step):
        held = found.get(coverage.stage)
        if held is None or STATES.index(coverage.state) > STATES.index(held.state):
            found[coverage.stage] = coverage
    return _in_order(found)


def _unjudged(case: Case, stage: Stage, shown: _Shown) -> Coverage:
    if case.checked:
        kept = any(record.stage == stage for record in case.trace.stages)
        if kept:
            return Coverage(stage, "unjudged", "it was kept, and nothing of it was checked")
        return Coverage(stage, "unseen", "the run was stopped before it, or keeps nothing of it")
    if not any(isinstance(value, shown.by) for value in case.values):
        return Coverage(stage, "unseen", "not in this dump" if case.dumped else shown.unseen)
    noted = [sentence for sentence, stages in case.missing.items() if stage in stages]
    if noted:
        return Coverage(stage, "unjudged", noted[0])
    if case.dumped:
        return Coverage(stage, "unseen", "not in this dump")
    if shown.reference and case.reference is None:
        return Coverage(stage, "unjudged", f"no reference: {case.no_reference}")
    return Coverage(stage, "unjudged", shown.needs)


def _in_order(found: Mapping[Stage, Coverage]) -> tuple[Coverage, ...]:
    return tuple(found[stage] for stage in STAGES if stage in found)
