"""Looks at embeddings: every placeholder holds its own media item's feature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from omni_grpo_core.core.batch import placeholder_ids
from omni_grpo_core.doctor.call_rows import PIXELS, CallRow
from omni_grpo_core.doctor.checks.positions import Call, copies_of, named_calls, rows_of
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Origin, note_judged, note_missing
from omni_grpo_core.doctor.replay.batch import with_pixels
from omni_grpo_core.doctor.replay.model import Feature, reference_features, token_embeddings
from omni_grpo_core.doctor.reproduce import plain, reproductions, told
from omni_grpo_core.doctor.reproduction import within
from omni_grpo_core.doctor.rollouts import first_step
from omni_grpo_core.types import MODALITIES, Modality, Span

if TYPE_CHECKING:
    from torch import Tensor

_FAR = 0.5
"""In units of the feature's norm: another item's feature is about 1.4 away, the same one with
different rounding or after a few optimizer steps below 0.1."""
_STRANGE = 0.5
"""The same, of text tokens' embeddings: above it the weights are not the checkpoint's."""
_ROUNDING: Mapping[str, float] = {"float32": 1e-3, "float64": 1e-3}
_COARSE = 2**-5
"""How far a feature may be from the reference's, by its largest value, with equal weights: batches
sum in another order; 8 bits of mantissa through every layer of a tower."""


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """One span of a call: what its placeholders hold, what they should hold, and the embedding of
    the placeholders themselves; each (span.length, H)."""

    row: int
    feature: Feature
    got: Tensor
    bare: Tensor

    @property
    def gap(self) -> float:
        return _gap(self.got, self.feature.values)

    @property
    def where(self) -> str:
        span = self.feature.span
        return f"{span.length} {span.modality} placeholders at token {span.start} of row {self.row}"


def look_injected(case: Case) -> Iterator[Evidence]:
    """Placeholder embeddings, compared with the towers' features of the call's own media."""
    if case.reference is None:
        return
    for name, call in named_calls(case):
        held = call.inputs_embeds
        ids = call.inputs["input_ids"]
        rows = with_pixels(case, call, rows_of(case, call))
        if held is None and "inputs_embeds" in call.large:
            note_missing(case, "inputs_embeds were too large to keep: embeddings unjudged")
        if held is None or not rows or held.shape[1] != ids.shape[1] or len(held) % len(rows):
            continue
        limit = _ROUNDING.get(call.modes.autocast or call.modes.dtype, _COARSE)
        copies = len(held) // len(rows)
        wrong = _text_off(case, name, ids, held[::copies], rows, limit)
        if wrong is not None:
            yield from wrong
            return
        places = _places(case, copies_of(rows, len(held)), held)
        if places:
            note_judged(case, "embeddings")
        for modality in MODALITIES:
            own = [p for p in places if p.feature.span.modality == modality]
            found = _off(name, own, limit, loaded=first_step(case))
            if found is not None and copies > 1 and modality != "audio":
                # generate repeated the rows, pixels patch by patch: these were wrong on input
                found = replace(found, origin="inherited")
            if found is not None:
                yield found


def look_uniform(case: Case) -> Iterator[Evidence]:
    """Where a row could not be replayed: the embeddings of a placeholder run are not all equal."""
    if case.reference is None:
        return
    tokens = placeholder_ids(case.reference.policy.processor)
    for name, call in named_calls(case):
        held, ids = call.inputs_embeds, call.inputs["input_ids"]
        if held is None or held.shape[:2] != ids.shape:
            continue
        rows = with_pixels(case, call, rows_of(case, call))
        yield from _bare(case, name, call, held, rows, tokens)


def _bare(
    case: Case, name: str, call: Call, held: Tensor, rows: Sequence[CallRow],
    tokens: Mapping[Modality, int],
) -> Iterator[Evidence]:  # fmt: skip
    for modality, token in tokens.items():
        for row in rows:
            if row.row is not None and reference_features(case, row.row) is not None:
                continue
            there = (call.inputs["input_ids"][row.index] == token) & row.kept
            own = held[row.index][there]
            if len(own) > 1 and torch.equal(own, own[:1].expand_as(own)):
                given = PIXELS[modality] in call.inputs or PIXELS[modality] in call.large
                span = Span(modality, 0, int(there.nonzero()[0]), len(own))
                yield _not_injected(name, row.index, span, "added" if given else "inherited")
                break


def _text_off(
    case: Case, name: str, ids: Tensor, held: Tensor, rows: Sequence[CallRow], limit: float
) -> list[Evidence] | None:
    """``None`` where text tokens have the checkpoint's embeddings; else what was done to them,
    nothing where the weights are others."""
    if case.reference is None:
        return None
    waiting = torch.tensor(list(placeholder_ids(case.reference.policy.processor).values()))
    text = ~torch.isin(ids, waiting) & torch.stack([row.kept for row in rows]) & (ids >= 0)
    if not bool(text.any()):
        return None
    note_judged(case, "embeddings")
    known, got = token_embeddings(case, ids[text]), held[text].float()
    size = known.norm(dim=-1).clamp(min=1e-6)
    if bool(((got - known).norm(dim=-1) / size).median() <= _STRANGE):
        return None
    found = reproductions(known, got, limit, axes=("tokens", "values"))
    if not found:
        note_missing(case, "the model's weights are not the checkpoint's: embeddings unjudged")
        return []
    said = told(f"the embeddings of {len(got)} text tokens of {name} are the checkpoint's", found)
    return [Evidence("embeddings", "text-off", said, values={"call": name, **plain(found)})]


def _places(case: Case, rows: Sequence[CallRow], held: Tensor) -> list[_Place]:
    found = []
    for place, row in enumerate(rows):
        if row.row is None:
            continue
        own = held[place][row.kept].float()
        bare = token_embeddings(case, row.row.input_ids)
        for feature in reference_features(case, row.row) or ():
            part = slice(feature.span.start, feature.span.start + feature.span.length)
            found.append(_Place(row.index, feature, own[part], bare[part]))
    return found


def _off(name: str, places: Sequence[_Place], limit: float, *, loaded: bool) -> Evidence | None:
    """What is wrong with the features of one modality in a call: the first span that is off.
    ``loaded``: whether the weights are still those of the checkpoint."""
    off = [p for p in places if not within(limit)(p.feature.values, p.got)]
    far = [place for place in off if place.gap > _FAR]
    if not off:
        return None
    first = (far or off)[0]
    span = first.feature.span
    known: dict[str, Any] = {
        "modality": span.modality, "start": span.start, "gap": first.gap, "call": name,
        "spans": len(off),
    }  # fmt: skip
    where = f"the {first.where} of {name}"
    if _gap(first.got, first.bare) <= _FAR or (span.length > 1 and _uniform(first.got)):
        return _not_injected(name, first.row, span)
    pool = {f"the {p.where}": p.feature.values for p in places if p is not first}
    axes = ("tokens", "values")
    found = reproductions(first.feature.values, first.got, limit, axes=axes, others=pool)
    all_right, all_got = (
        torch.cat([p.feature.values for p in places]),
        torch.cat([p.got for p in places]),
    )
    whole = reproductions(all_right, all_got, limit, axes=axes)
    if whole and not {one.name for one in whole} & {one.name for one in found}:
        said = told(f"the {span.modality} features of {name} are the tower's", whole)
        found, where = whole, f"all {span.modality} placeholders of {name}"
    else:
        said = told(f"{where} hold the tower's features", found) if found else ""
    if _ORDERS & {one.name for one in found} or (far and not found and _elsewhere(first, places)):
        said = said or f"{where} hold features that belong elsewhere"
        return Evidence("embeddings", "features-misordered", said, row=first.row,
                        values={**known, **plain(found)})  # fmt: skip
    if not found and not (far and loaded):
        return None  # an optimizer step, or kernels that are not ours, explain this
    said = said or f"{where} differ from the tower's features by {first.gap:.2g} of their norm"
    return Evidence("embeddings", "features-off", said, row=first.row,
                    values={**known, **plain(found)})  # fmt: skip


def _not_injected(name: str, index: int, span: Span, origin: Origin = "added") -> Evidence:
    return Evidence(
        "embeddings",
        "features-not-injected",
        f"the {span.length} {span.modality} placeholders at token {span.start} of row {index} of "
        f"{name} hold the placeholder's own embedding: the model gets no {span.modality}",
        origin=origin,
        row=index,
        values={"modality": span.modality, "start": span.start, "call": name},
    )


def _elsewhere(first: _Place, places: Sequence[_Place]) -> bool:
    """Whether the vectors are near features of the call, though not the right ones."""
    pool = torch.cat([place.feature.values for place in places])
    apart = torch.cdist(first.got, pool).min(1).values
    return bool((apart / first.got.norm(dim=1).clamp(min=1e-6)).median() <= _FAR)


def _uniform(part: Tensor) -> bool:
    return bool(torch.equal(part, part[:1].expand_as(part)))


def _gap(got: Tensor, wanted: Tensor) -> float:
    """Distance in units of the wanted feature's norm, averaged over tokens."""
    size = wanted.norm(dim=-1).clamp(min=1e-6)
    return float(((got - wanted).norm(dim=-1) / size).mean())


_ORDERS = {"reversed", "rolled", "items-swapped", "permuted", "chosen", "swapped-with"}

LOOKS: tuple[Look, ...] = (look_injected, look_uniform)
