"""Calls of a step small enough to join by hand, for tests of how the doctor joins them.

Token 50 is an image's placeholder, 9 the eos, 0 padding. A picture of grid (1, 4, 4) has 16 patches
of two numbers and takes 4 placeholders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from small_recordings import EVAL
from torch import Tensor

from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.trace.calls import (
    ForwardCall,
    GenerateCall,
    LossGradient,
    ProcessorCall,
    RewardCall,
    TemplateCall,
)
from omni_grpo_core.types import StageRecord, Trace

IMAGE, EOS, PAD = 50, 9, 0
GRID = (1, 4, 4)
SEEN = (IMAGE,) * 4
"""The placeholders of one picture."""


def step(*values: Any, before: Case | None = None, **header: str) -> Case:
    """A recorded step with these calls, in order."""
    known = {"placeholders": f"image={IMAGE} video=51 audio=52", **header}
    records = tuple(StageRecord(value.stage, value, (), 0.0) for value in values)
    case = Case(Trace(known, records), None)
    return case if before is None else replace(case, before=before)


def picture(number: float) -> Tensor:
    """(16, 2): patches that differ from each other and from those of another number."""
    return torch.arange(32.0).view(16, 2) + 100 * number


def rows(
    ids: Sequence[Sequence[int]], pictures: Sequence[float] = (), left: bool = True
) -> dict[str, Tensor]:
    """Inputs of a model: ids padded to one length, their mask, and pictures in order."""
    width = max(map(len, ids))
    fill = [[PAD] * (width - len(row)) for row in ids]
    ones = [[1] * len(row) for row in ids]
    pairs = zip(fill, ids, ones, strict=True)
    joined = [
        ((*pad, *row), (*([0] * len(pad)), *one))
        if left
        else ((*row, *pad), (*one, *([0] * len(pad))))
        for pad, row, one in pairs
    ]
    held = {
        "input_ids": torch.tensor([row for row, _ in joined]),
        "attention_mask": torch.tensor([mask for _, mask in joined]),
    }
    if pictures:
        held["pixel_values"] = torch.cat([picture(number) for number in pictures])
        held["image_grid_thw"] = torch.tensor([GRID] * len(pictures))
    return held


def made(texts: Sequence[str], outputs: Mapping[str, Tensor]) -> ProcessorCall:
    return ProcessorCall(tuple(texts), False, (), (), (), {}, (), (), outputs, "left", None)


def rendered(*texts: str) -> TemplateCall:
    return TemplateCall((), {}, texts, True)


def sampled(
    inputs: Mapping[str, Tensor], completions: Sequence[Sequence[int]], texts: Sequence[str] = ()
) -> GenerateCall:
    """A rollout; as many completions as rows, or a multiple of it."""
    copies = len(completions) // len(inputs["input_ids"])
    prompts = inputs["input_ids"].repeat_interleave(copies, 0)
    width = max(map(len, completions))
    ids = torch.tensor([[*row, *([PAD] * (width - len(row)))] for row in completions])
    return GenerateCall(
        inputs=inputs, keywords={}, config={"eos_token_id": [EOS]}, modes=EVAL,
        sequences=torch.cat([prompts, ids], 1), position_ids=None, inputs_embeds=None,
        rope_deltas=None, first_logits=None, cached=(), step_positions=(), logprobs=None,
        warnings=(), error=None, decoded={"kept": tuple(texts), "skipped": tuple(texts)},
    )  # fmt: skip


def scored(inputs: Mapping[str, Tensor], grad: bool = True, **more: Any) -> ForwardCall:
    modes = replace(EVAL, grad_enabled=grad, training=grad)
    fields: dict[str, Any] = {"keywords": {}, "position_ids": None, **more}
    return ForwardCall(
        inputs=inputs, modes=modes, inputs_embeds=None, logprobs=None, logits_dtype="float32",
        warnings=(), error=None, **fields,
    )  # fmt: skip


def rewarded(
    prompts: Sequence[str], completions: Sequence[str], name: str = "length", **columns: Any
) -> RewardCall:
    values = tuple(float(len(text)) for text in completions)
    return RewardCall(
        name, f"rewards.{name}", tuple(prompts), tuple(completions), columns, values, {}, None
    )


def weighed(forward: int, weights: Tensor) -> LossGradient:
    nothing = torch.zeros_like(weights)
    return LossGradient(forward, "logits", nothing.long(), weights, nothing + 1, nothing, nothing)
