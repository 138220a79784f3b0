"""A diagnosis as one HTML page: the broken stage, why, what to change, and the offending rows.

No scripts, no network. Someone new to the project should know what to do within a minute.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from omni_grpo_core.doctor.evidence import Case, Evidence
from omni_grpo_core.doctor.verdict import Diagnosis
from omni_grpo_core.pipeline.hints import STAGE_SUMMARY, advice
from omni_grpo_core.report import shortened, visible
from omni_grpo_core.report.html import Decode, render, tokens_per_cell
from omni_grpo_core.report.html.ribbon import Run, ribbon
from omni_grpo_core.trace.calls import GenerateCall, ProcessorCall
from omni_grpo_core.types import Modality, Row, Span

MOST_ROWS, MOST_EVIDENCE, MOST_ANSWERS = 4, 12, 8
_LONGEST = 700
_PLACEHOLDER = re.compile(r"<\|(?:(image|video|audio)(?:_pad)?|IMAGE|VIDEO|AUDIO)\|>")


PromptView = tuple[str, int, tuple[Run, ...], Sequence[str]]
"""A row of a call as the model read it: title, tokens per cell, ribbon, evidence against it."""


def doctor_page(
    cases: Sequence[Case],
    diagnoses: Sequence[Diagnosis],
    verdict: Diagnosis,
    decode: Decode | None,
) -> str:
    """The page for a recorded run; ``diagnoses`` are in the order of ``cases``.

    ``decode``: token ids -> text, special tokens kept; without it no prompts are drawn.
    """
    first = next((at for at, d in enumerate(diagnoses) if d.findings), 0)
    worst = cases[first] if cases else None
    return render(
        "doctor_page.html.j2",
        verdict=verdict,
        first=verdict.first,
        header={} if worst is None else worst.trace.header,
        states={c.stage: c.state for c in verdict.coverage},
        values_of=_values,
        most=MOST_EVIDENCE,
        steps=[
            (number, [finding.stage for finding in diagnosis.findings])
            for number, diagnosis in enumerate(diagnoses)
        ],
        shown_step=first,
        prompts=_prompts(worst, diagnoses[first], decode) if worst and decode else (),
        answers=tuple(_answers(worst))[:MOST_ANSWERS] if worst else (),
        does=STAGE_SUMMARY,
        advice=advice,
        plain=_plain,
    )


def _plain(text: str) -> str:
    return shortened(visible(text), _LONGEST)


def _values(evidence: Evidence) -> str:
    """The offending values as text; empty if there are none."""
    values = json.dumps(dict(evidence.values), ensure_ascii=False, default=str)
    return "" if values == "{}" else _plain(values)


# --------------------------------------------------------------------------- prompts, answers


def _prompts(case: Case, diagnosis: Diagnosis, decode: Decode) -> tuple[PromptView, ...]:
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
                sentence = f"{finding.stage}: {_plain(evidence.sentence)}"
                against.setdefault(evidence.row, []).append(sentence)
    rows = sorted(range(len(ids)), key=lambda row: (row not in against, row))[:MOST_ROWS]
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


def _answers(case: Case) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each completion, with its score from each reward function."""
    if not case.rewards:
        return
    for at, text in enumerate(case.rewards[0].completions):
        yield (
            _plain(text),
            [
                (call.name, "not scored" if value is None else f"{value:.4g}")
                for call in case.rewards
                for value in call.values[at : at + 1]
            ],
        )
