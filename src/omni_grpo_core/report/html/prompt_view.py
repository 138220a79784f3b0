"""What a model was given in a recorded call: rows as ribbons, with the evidence against them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.verdict import Diagnosis
from omni_grpo_core.report import shortened, visible
from omni_grpo_core.report.html import Decode, tokens_per_cell
from omni_grpo_core.report.html.ribbon import Run, ribbon
from omni_grpo_core.trace.calls import GenerateCall, ProcessorCall
from omni_grpo_core.trace.store import value_at
from omni_grpo_core.types import Batch, EngineSeen, Modality, Row, Span

MOST_ROWS = 4
_LONGEST = 700
_PLACEHOLDER = re.compile(r"<\|(?:(image|video|audio)(?:_pad)?|IMAGE|VIDEO|AUDIO)\|>")

PromptView = tuple[str, int, tuple[Run, ...], Sequence[str]]
"""A row of a call as the model read it: title, tokens per cell, ribbon, evidence against it."""


def prompt_views(case: Case, diagnosis: Diagnosis, decode: Decode) -> tuple[PromptView, ...]:
    """Rows of the first call that has ids; rows with evidence against them come first. Of a run
    that a rollout engine stopped: those rows to the trainer, and to the engine."""
    against = _against(diagnosis)
    for engine in (value for value in case.values if isinstance(value, EngineSeen)):
        return tuple(_both_sides(case, engine, against, decode))
    calls: tuple[GenerateCall | ProcessorCall, ...] = (*case.generated, *case.processed)
    call = next((c for c in calls if _ids(c) is not None), None)
    if call is None:
        return ()
    ids, mask = _ids(call), _mask(call)
    assert ids is not None  # for the type checker: checked above
    # the copies of a group say nothing more
    alike = {tuple(ids[row].tolist()): row for row in reversed(range(len(ids)))}
    known = {*alike.values(), *(row for row in against if row < len(ids))}
    rows = sorted(known, key=lambda row: (row not in against, row))[:MOST_ROWS]
    return tuple(
        _prompt(
            f"row {row}", ids[row], mask[row], _positions(call, row), against.get(row, []), decode
        )
        for row in rows
    )


def _against(diagnosis: Diagnosis) -> dict[int, list[str]]:
    """Sentences by row."""
    found: dict[int, list[str]] = {}
    for finding in diagnosis.findings:
        for evidence in finding.evidence:
            if evidence.row is not None:
                sentence = f"{finding.stage}: {shortened(visible(evidence.sentence), _LONGEST)}"
                found.setdefault(evidence.row, []).append(sentence)
    return found


def _both_sides(
    case: Case, engine: EngineSeen, against: Mapping[int, Sequence[str]], decode: Decode
) -> Iterator[PromptView]:
    batch = value_at(case.trace, "batch", Batch)
    for row in sorted(against)[:MOST_ROWS]:
        own, read = batch.rows[row].input_ids, torch.tensor(engine.prompt_ids[row])
        alike = torch.equal(own, read)
        sides = (
            {"both read": own} if alike else {"the trainer reads": own, "the engine reads": read}
        )
        for side, ids in sides.items():
            name = f"row {row}, {batch.rows[row].sample_id}, as {side} it"
            shown = against[row] if ids is own else ()
            yield _prompt(name, ids, torch.ones_like(ids, dtype=torch.bool), None, shown, decode)


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
    name: str,
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
    drawn = ribbon(Row(name, kept, "off", spans, {}), where, decode)
    counts = {
        modality: sum(span.length for span in spans if span.modality == modality)
        for modality in dict.fromkeys(span.modality for span in spans)
    }
    media = ", ".join(f"{count} {modality}" for modality, count in counts.items()) or "no media"
    masked = int((~mask).sum())
    title = f"{name}: {len(kept)} tokens, {media}" + (f"; {masked} masked out" if masked else "")
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
