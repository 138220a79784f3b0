"""What a model was given in a recorded call: rows as ribbons, with the evidence against them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.verdict import Diagnosis
from omni_grpo_core.report import shortened, visible
from omni_grpo_core.report.html import Decode, tokens_per_cell
from omni_grpo_core.report.html.ribbon import Run, ribbon
from omni_grpo_core.trace.calls import GenerateCall, ProcessorCall
from omni_grpo_core.types import Modality, Row, Span

MOST_ROWS = 4
_LONGEST = 700
_PLACEHOLDER = re.compile(r"<\|(?:(image|video|audio)(?:_pad)?|IMAGE|VIDEO|AUDIO)\|>")

PromptView = tuple[str, int, tuple[Run, ...], Sequence[str]]
"""A row of a call as the model read it: title, tokens per cell, ribbon, evidence against it."""


def prompt_views(case: Case, diagnosis: Diagnosis, decode: Decode) -> tuple[PromptView, ...]:
    """Rows of the first call that has ids; rows with evidence against them come first."""
    calls: tuple[GenerateCall | ProcessorCall, ...] = (*case.generated, *case.processed)
    call = next((c for c in calls if _ids(c) is not None), None)
    if call is None:
        return ()
    ids, mask = _ids(call), _mask(call)
    assert ids is not None  # for the type checker: checked above
    against: dict[int, list[str]] = {}
    for finding in diagnosis.findings:
        for evidence in finding.evidence:
            if evidence.row is not None and evidence.row < len(ids):
                sentence = f"{finding.stage}: {shortened(visible(evidence.sentence), _LONGEST)}"
                against.setdefault(evidence.row, []).append(sentence)
    # the copies of a group say nothing more
    alike = {tuple(ids[row].tolist()): row for row in reversed(range(len(ids)))}
    known = {*alike.values(), *against}
    rows = sorted(known, key=lambda row: (row not in against, row))[:MOST_ROWS]
    return tuple(
        _prompt(row, ids[row], mask[row], _positions(call, row), against.get(row, []), decode)
        for row in rows
    )


def _ids(call: GenerateCall | ProcessorCall) -> Tensor | None:
    tensors = call.inputs if isinstance(call, GenerateCall) else call.outputs
    ids = tensors.get("input_ids")
    return ids if ids is not None and ids.dim() == 2 and not ids.is_floating_point() else None


def _mask(call: GenerateCall | ProcessorCall) -> Tensor:
    tensors = call.inputs if isinstance(call, GenerateCall) else call.outputs
    ids, mask = tensors["input_ids"], tensors.get("attention_mask")
    fits = mask is not None and mask.shape == ids.shape
    return mask.bool() if fits and mask is not None else torch.ones_like(ids, dtype=torch.bool)


def _positions(call: GenerateCall | ProcessorCall, row: int) -> Tensor | None:
    where = call.position_ids if isinstance(call, GenerateCall) else None
    return where[-3:, row] if where is not None and where.dim() == 3 else None


def _prompt(
    row: int,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor | None,
    against: Sequence[str],
    decode: Decode,
) -> PromptView:
    kept = ids[mask].to(torch.int64)
    where = None
    if positions is not None and positions.shape[1] == len(mask):
        where = positions[:, mask]
    spans = tuple(_spans(kept.tolist(), decode))
    drawn = ribbon(Row(f"row {row}", kept, "off", spans, {}), where, decode)
    counts = {
        modality: sum(span.length for span in spans if span.modality == modality)
        for modality in dict.fromkeys(span.modality for span in spans)
    }
    media = ", ".join(f"{count} {modality}" for modality, count in counts.items()) or "no media"
    title = f"row {row}: {len(kept)} tokens, {media}; {int((~mask).sum())} masked out"
    return title, tokens_per_cell(len(kept)), drawn, against


def _spans(ids: Sequence[int], decode: Decode) -> Iterator[Span]:
    """Runs of placeholders, recognised by the text of their tokens."""
    kinds: dict[int, Modality | None] = {}
    for token in set(ids):
        match = _PLACEHOLDER.fullmatch(decode([token]))
        name = match and re.sub(r"[^a-z]|_?pad", "", match[0].lower())
        kinds[token] = next((m for m in ("image", "video", "audio") if m == name), None)
    start, items = 0, dict.fromkeys(("image", "video", "audio"), 0)
    for kind, run in groupby(ids, kinds.__getitem__):
        length = len(tuple(run))
        if kind is not None:
            yield Span(kind, items[kind], start, length)
            items[kind] += 1
        start += length
