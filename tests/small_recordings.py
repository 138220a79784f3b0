"""Values of a recorded step, small enough to check by hand; the defaults are healthy.

Two prompts of three tokens, two completions each. Token 9 is the eos, 0 is padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Reference
from omni_grpo_core.trace.calls import (
    AdvantageSeen,
    Call,
    GenerateCall,
    GradientSeen,
    LayerSeen,
    LossSeen,
    Modes,
    RewardCall,
    SamplesSeen,
    StepSeen,
)
from omni_grpo_core.types import StageRecord, Trace

EOS, PAD = 9, 0
PROMPTS = ((1, 2, 3), (1, 2, 4))
COMPLETIONS = ((5, 6, EOS), (5, EOS, PAD), (7, 8, EOS), (8, EOS, PAD))
MASK = ((1, 1, 1), (1, 1, 0), (1, 1, 1), (1, 1, 0))
GROUPS = ("a", "a", "b", "b")
REWARDS = (1.0, 0.0, 2.0, 0.0)

EVAL = Modes(False, False, False, False, "float32", None, None, ())


def case(*values: Call, reference: Reference | None = None) -> Case:
    """The values as one recorded step, in this order."""
    records = tuple(StageRecord(value.stage, value, (), 0.0) for value in values)
    return Case(Trace({}, records), reference)


def found(looks: Sequence[Look], recorded: Case) -> dict[str, Evidence]:
    """What the looks found, by fact; the first of each."""
    seen: dict[str, Evidence] = {}
    for look in looks:
        for evidence in look(recorded):
            seen.setdefault(evidence.fact, evidence)
    return seen


def samples(ids: tuple[str, ...] = ("a", "b")) -> SamplesSeen:
    rows = tuple({"sample_id": name, "problem": f"who is {name}?"} for name in ids)
    return SamplesSeen(rows, ids)


def generated(
    completions: Sequence[Sequence[int]] = COMPLETIONS,
    prompts: Sequence[int] = (0, 0, 1, 1),
    config: Mapping[str, Any] | None = None,
    modes: Modes = EVAL,
    cached: tuple[int | None, ...] = (3, 4),
    logprobs: Tensor | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> GenerateCall:
    """A rollout; ``prompts``: index of each row's prompt."""
    ids = torch.tensor([PROMPTS[at] for at in prompts])
    settings = {"do_sample": True, "temperature": 1.0, "eos_token_id": [EOS], "max_new_tokens": 3}
    return GenerateCall(
        inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids), **(inputs or {})},
        keywords={},
        config={**settings, **(config or {})},
        modes=modes,
        sequences=torch.cat([ids, torch.tensor(completions)], 1),
        position_ids=None,
        inputs_embeds=None,
        rope_deltas=None,
        first_logits=None,
        cached=cached,
        step_positions=(),
        logprobs=logprobs,
        warnings=(),
        error=None,
    )


def rewarded(
    values: Sequence[float | None] = REWARDS,
    name: str = "length",
    columns: Mapping[str, Any] | None = None,
    probe: Mapping[str, Any] | None = None,
    completions: Sequence[str] = ("one", "two", "three", "four"),
    error: str | None = None,
) -> RewardCall:
    return RewardCall(
        name=name,
        source=f"rewards.{name}",
        prompts=tuple(f"who is {group}?" for group in GROUPS),
        completions=tuple(completions),
        columns={"sample_id": list(GROUPS)} if columns is None else columns,
        values=tuple(values),
        probe=probe or {},
        error=error,
    )


def advantaged(
    advantages: Tensor | Sequence[float] = (1.0, -1.0, 1.0, -1.0),
    rewards: Sequence[float] = REWARDS,
    group_ids: tuple[str, ...] = GROUPS,
    weights: Mapping[str, float] | None = None,
    spans: Mapping[str, Tensor] | None = None,
    scale: str = "group",
) -> AdvantageSeen:
    """The standard deviations of (1, 0) and (2, 0) are 1 / sqrt 2 and sqrt 2, so unbiased scaling
    gives 1 / sqrt 2 for each; ``advantages`` is multiplied by that."""
    values = torch.as_tensor(advantages, dtype=torch.float64)
    return AdvantageSeen(
        rewards=torch.tensor(rewards),
        group_ids=group_ids,
        advantages=values * 0.5**0.5 if scale == "group" else values,
        scale=scale,
        weights={"length": 1.0} if weights is None else weights,
        spans=spans or {},
    )


def lost(
    loss: float,
    advantages: Sequence[float] | Tensor = (1.0, -1.0, 1.0, -1.0),
    logprobs: Tensor | None = None,
    old: Tensor | None = None,
    ref: Tensor | None = None,
    mask: Sequence[Sequence[int]] = MASK,
    ids: Sequence[Sequence[int]] = COMPLETIONS,
    settings: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    requires_grad: bool = True,
) -> LossSeen:
    """Every token has probability 1/3 by default: not representable in 16 bits."""
    rows, width = torch.tensor(mask).shape
    given = torch.full((rows, width), 1 / 3).log() if logprobs is None else logprobs
    return LossSeen(
        completion_ids=torch.tensor(ids),
        mask=torch.tensor(mask).bool(),
        logprobs=given,
        old_logprobs=old,
        ref_logprobs=ref,
        advantages=torch.as_tensor(advantages, dtype=torch.float64),
        loss=loss,
        requires_grad=requires_grad,
        settings={"loss_type": "grpo", "beta": 0.0, "epsilon": 0.2, **(settings or {})},
        metrics=metrics or {},
    )


def layer(
    name: str = "text layer 0",
    part: str = "text",
    elements: int = 100,
    held: int | None = None,
    rates: tuple[float, ...] = (1e-3,),
    norm: float | None = 0.5,
    moved: bool = True,
    **more: Any,
) -> LayerSeen:
    """A layer of trainable parameters; ``norm`` of its gradient, ``None``: it has none."""
    gradient = None if norm is None else GradientSeen(norm, (norm, -norm), norm)
    values: dict[str, Any] = {
        "name": name,
        "part": part,
        "elements": elements,
        "trainable": elements,
        "held": elements if held is None else held,
        "rates": () if held == 0 else rates,
        "dtype": "float32",
        "stale": 0.0,
        "backward": gradient,
        "before": gradient,
        "norm": norm or 0.0,
        "odd": {},
        "size": elements,
        "moved": float(moved),
        "change": 1e-3 * moved,
        "between": None,
    }
    return LayerSeen(**{**values, **more})


def stepped(
    step: int = 0,
    trainable: Mapping[str, int] | None = None,
    norms: Mapping[str, float] | None = None,
    held: Mapping[str, int] | None = None,
    changed: Mapping[str, bool] | None = None,
    losses: tuple[float, ...] = (0.5,),
    settings: Mapping[str, Any] | None = None,
    warnings: tuple[str, ...] = (),
    layers: tuple[LayerSeen, ...] | None = None,
    **more: Any,
) -> StepSeen:
    """A step; one layer per part of ``trainable``, unless ``layers`` are given."""
    learning = {"text": 10, "head": 10} if trainable is None else trainable
    optimized = learning if held is None else held
    given = dict.fromkeys(learning, 0.5) if norms is None else norms
    made = tuple(
        layer(
            part if part in ("head", "adapter") else f"{part} layer 0",
            part,
            10,
            trainable=learning.get(part, 0),
            held=optimized.get(part, 0),
            norm=given.get(part),
            moved=optimized.get(part, 0) > 0 if changed is None else changed.get(part, False),
            size=0 if changed is not None and part not in changed else 10,
        )
        for part in {"text": 0, "head": 0, **learning, **given}
    )
    values: dict[str, Any] = {
        "outcome": "stepped", "factor": 1.0, "scale": None, "rates": (1e-3,), "planned": (),
        "others": 0, **more
    }  # fmt: skip
    return StepSeen(
        step=step,
        layers=made if layers is None else layers,
        losses=losses,
        settings=settings or {},
        warnings=warnings,
        **values,
    )
