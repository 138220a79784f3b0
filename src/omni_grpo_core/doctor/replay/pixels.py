"""Media that were too large to keep in a model's call, made anew from those of the processor's."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

import torch

from omni_grpo_core.doctor.call_rows import PIXELS, CallRow
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.replay.batch import given_rows, reference_row
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall
from omni_grpo_core.types import Row


def with_pixels(
    case: Case, call: GenerateCall | ForwardCall, rows: Sequence[CallRow]
) -> tuple[CallRow, ...]:
    """``rows`` of ``call`` with the pixels and mel features that it was given and that were too
    large to keep, as the reference processor makes them of the media that were recorded; as they
    are, where none is missing or the call cannot be matched."""
    large = {name for name in PIXELS.values() if name in call.large}
    if not large:
        return tuple(rows)
    made = [found for found in case.once(_processed) if _of(found, rows)]
    if len(made) != 1:
        return tuple(rows)
    return tuple(
        row if row.row is None else replace(row, row=_filled(row.row, own, large))
        for row, own in zip(rows, made[0], strict=True)
    )


def _filled(row: Row, own: Row, names: Set[str]) -> Row:
    found = {name: tensor for name, tensor in own.tensors.items() if name in names}
    return replace(row, tensors={**found, **row.tensors})


def _of(made: Sequence[Row], rows: Sequence[CallRow]) -> bool:
    """Whether the rows of a model's call begin with those of a processor's."""
    return len(made) == len(rows) and all(
        row.row is not None and torch.equal(row.row.input_ids[: len(own.input_ids)], own.input_ids)
        for row, own in zip(rows, made, strict=True)
    )


def _processed(case: Case) -> list[tuple[Row, ...]]:
    """The reference rows of every processor call that can be replayed whole."""
    found = []
    for call in case.processed:
        rows = [reference_row(call, given, case) for given in given_rows(call, case) or ()]
        whole = tuple(row for row in rows if isinstance(row, Row))
        if whole and len(whole) == len(rows):
            found.append(whole)
    return found
