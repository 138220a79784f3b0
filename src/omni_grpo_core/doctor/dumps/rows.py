"""The rows of a dump, and a step of them as a trace that the doctor's own looks judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.trace.calls import (
    AdvantageSeen,
    Call,
    GenerateCall,
    LossSeen,
    Modes,
    RewardCall,
)
from omni_grpo_core.types import StageRecord, Trace

_ENGINE = Modes(False, False, False, False, "", None, None, ("rollout engine",))
Numbers = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of one completion: ``prompt`` and ``ids``, its token ids. Over ``ids``: ``counted``, whether
    they are in the loss; ``sampled``, the rollout engine's log-probabilities, ``scored`` the
    trainer's before the update, ``reference`` the reference model's; ``None``: not in the dump."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    counted: tuple[bool, ...] | None = None
    sampled: Numbers | None = None
    scored: Numbers | None = None
    reference: Numbers | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One completion, its text ``None`` where only its ids are known. ``group``: equal for those of
    one prompt, if the dump names it. ``rewards``: by function, ``None`` where it could not score.
    ``columns``: plain values beside them."""

    prompt: str
    completion: str | None
    rewards: Mapping[str, float | None]
    group: str | None = None
    advantage: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    tokens: Tokens | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one training step, in the order of the dump. ``name``: of its file and place.
    ``files``: the completions are paths of files that were generated, not text."""

    name: str
    number: int
    rows: tuple[Row, ...]
    files: bool = False


Read = Callable[[Path], Iterator[Step]]
"""The steps of a dump, in order. Raises :class:`~omni_grpo_core.errors.TraceError`."""


def trace_of(step: Step, made_by: str) -> Trace:
    """The calls that a step's rows show, under a header that says what they come from."""
    rows = step.rows
    header = {"dump": made_by, "step": str(step.number)}
    if any(row.group is None for row in rows):
        header["groups"] = "by prompt"
    if step.files:
        header["completions"] = "files"
    calls = [*_generated(rows), *_rewarded(rows), *_advantages(rows), *_scored(rows)]
    return Trace(header, tuple(StageRecord(call.stage, call, (), 0.0) for call in calls))


def _generated(rows: Sequence[Row]) -> Iterator[Call]:
    """One call per row, as engines are asked: no padding, and each stops where it stopped."""
    for row in rows:
        tokens = row.tokens
        if tokens is None:
            continue
        prompt = torch.tensor([tokens.prompt], dtype=torch.int64)
        ids = torch.tensor([tokens.ids], dtype=torch.int64)
        yield GenerateCall(
            inputs={"input_ids": prompt, "attention_mask": torch.ones_like(prompt)},
            # whatever ends a completion there is not in the dump
            keywords={"stopping_criteria": "the rollout engine's own"},
            config={"do_sample": True},
            modes=_ENGINE,
            sequences=torch.cat([prompt, ids], 1),
            position_ids=None,
            inputs_embeds=None,
            rope_deltas=None,
            first_logits=None,
            cached=(),
            step_positions=(),
            logprobs=None if tokens.sampled is None else torch.tensor([tokens.sampled]),
            warnings=(),
            error=None,
            decoded={} if row.completion is None else {"kept": (row.completion,)},
        )


def _rewarded(rows: Sequence[Row]) -> Iterator[Call]:
    columns = {name: [row.columns.get(name) for row in rows] for name in _names(rows, "columns")}
    for name in _names(rows, "rewards"):
        yield RewardCall(
            name=name,
            source="",
            prompts=tuple(row.prompt for row in rows),
            completions=tuple(text for row in rows if (text := row.completion) is not None),
            columns=columns,
            values=tuple(row.rewards.get(name) for row in rows),
            probe={},
            error=None,
        )


def _advantages(rows: Sequence[Row]) -> Iterator[Call]:
    values = [row.advantage for row in rows if row.advantage is not None]
    if len(values) == len(rows):
        totals = [sum(_known(row.rewards.values())) for row in rows]
        yield AdvantageSeen(
            rewards=torch.tensor(totals, dtype=torch.float64),
            group_ids=tuple(_group(row) for row in rows),
            advantages=torch.tensor(values, dtype=torch.float64),
            scale="",
            weights={},
            spans={},
        )


def _scored(rows: Sequence[Row]) -> Iterator[Call]:
    held = [(row, row.tokens) for row in rows if row.tokens and row.tokens.scored is not None]
    if len(held) < len(rows) or not rows:
        return
    width = max(len(tokens.ids) for _, tokens in held)
    masks = [tokens.counted or (True,) * len(tokens.ids) for _, tokens in held]
    given = [row.advantage for row in rows]
    yield LossSeen(
        completion_ids=_padded([tokens.ids for _, tokens in held], width).long(),
        mask=_padded(masks, width).bool(),
        logprobs=_padded([tokens.scored for _, tokens in held], width),
        old_logprobs=_padded([tokens.sampled for _, tokens in held], width),
        ref_logprobs=_padded([tokens.reference for _, tokens in held], width),
        advantages=None if None in given else torch.tensor(given, dtype=torch.float64),
        loss=math.nan,
        requires_grad=True,
        settings={},
        metrics={},
    )


def _padded(rows: Sequence[Sequence[float] | None], width: int) -> Any:
    """(N, width), 0 after the end of a row; ``None`` where a row has no values."""
    if any(row is None for row in rows):
        return None
    held: Tensor = torch.zeros(len(rows), width)
    for at, row in enumerate(rows):
        held[at, : len(row or ())] = torch.tensor(row, dtype=torch.float32)
    return held


def _names(rows: Sequence[Row], of: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in getattr(row, of)))


def _known(values: Any) -> Iterator[float]:
    return (value for value in values if value is not None)


def _group(row: Row) -> str:
    return row.prompt if row.group is None else row.group
