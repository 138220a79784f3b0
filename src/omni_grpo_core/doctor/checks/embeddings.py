"""Looks at embeddings: every placeholder holds its own media item's feature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from omni_grpo_core.core.batch import placeholder_ids
from omni_grpo_core.doctor.call_rows import PIXELS, CallRow
from omni_grpo_core.doctor.checks.positions import Call, copies_of, named_calls, rows_of
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Origin, note_judged, note_missing
from omni_grpo_core.doctor.replay.batch import with_pixels
from omni_grpo_core.doctor.replay.model import Feature, reference_features, token_embeddings
from omni_grpo_core.types import Modality, Row, Span

if TYPE_CHECKING:
    from torch import Tensor

_FAR = 0.5
"""In units of the feature's norm: another item's feature is about 1.4 away, the same one with
different rounding or after a few optimizer steps below 0.1."""
_STRANGE = 0.5
"""The same, of token embeddings: above it the weights are not the checkpoint's."""


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
        places = copies_of(rows, len(held))
        if not _own_weights(case, ids, held[:: len(held) // len(rows)]):
            note_missing(case, "the model's weights are not the checkpoint's: embeddings unjudged")
            return
        every = [
            feature
            for row in rows
            if row.row is not None
            for feature in reference_features(case, row.row) or ()
        ]
        reported: set[str] = set()
        for place, row in enumerate(places):
            if row.row is None:
                continue
            own = held[place][row.kept].float()
            note_judged(case, "embeddings")
            for evidence in _row(case, name, call, row.index, row.row, own, every):
                if len(held) > len(rows) and evidence.values["modality"] != "audio":
                    # generate repeated the rows, pixels patch by patch: these were wrong on input
                    evidence = replace(evidence, origin="inherited")
                if evidence.fact not in reported:
                    reported.add(evidence.fact)
                    yield evidence


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


def _row(
    case: Case, name: str, call: Call, index: int, row: Row, own: Tensor,
    every: Sequence[Feature],
) -> Iterator[Evidence]:  # fmt: skip
    features = reference_features(case, row) or ()
    bare = token_embeddings(case, row.input_ids)
    for feature in features:
        span = feature.span
        got = own[span.start : span.start + span.length]
        gap = _gap(got, feature.values)
        if gap <= _FAR:
            continue
        if _gap(got, bare[span.start : span.start + span.length]) <= _FAR or (
            span.length > 1 and _uniform(own, span)
        ):
            yield _not_injected(name, index, span)
            continue
        if _elsewhere(got, feature, every):
            yield Evidence(
                "embeddings",
                "features-misordered",
                f"the {span.length} {span.modality} placeholders at token {span.start} of row "
                f"{index} of {name} hold features that belong elsewhere",
                row=index,
                values={"modality": span.modality, "start": span.start, "call": name},
            )
            continue
        yield Evidence(
            "embeddings",
            "features-off",
            f"the {span.length} {span.modality} placeholders at token {span.start} of row {index} "
            f"of {name} differ from the tower's features by {gap:.2g} of their norm",
            row=index,
            values={"modality": span.modality, "start": span.start, "gap": gap, "call": name},
        )


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


def _elsewhere(got: Tensor, own: Feature, every: Sequence[Feature]) -> bool:
    """Whether the vectors are near features of the call, though not the right ones."""
    pool = [f.values for f in every if f.span.modality == own.span.modality]
    if not pool:
        return False
    near = torch.cdist(got, torch.cat(pool)).min(1).values / got.norm(dim=1).clamp(min=1e-6)
    return bool(near.median() <= _FAR)


def _own_weights(case: Case, ids: Tensor, held: Tensor) -> bool:
    """Whether text tokens have the checkpoint's embeddings."""
    if case.reference is None:
        return False
    known = token_embeddings(case, ids.clamp(min=0)).float()
    size = known.norm(dim=-1).clamp(min=1e-6)
    return bool(((held.float() - known).norm(dim=-1) / size).median() <= _STRANGE)


def _uniform(own: Tensor, span: Span) -> bool:
    part = own[span.start : span.start + span.length]
    return bool(torch.equal(part, part[:1].expand_as(part)))


def _gap(got: Tensor, wanted: Tensor) -> float:
    """Distance in units of the wanted feature's norm, averaged over tokens."""
    size = wanted.norm(dim=-1).clamp(min=1e-6)
    return float(((got - wanted).norm(dim=-1) / size).mean())


LOOKS: tuple[Look, ...] = (look_injected, look_uniform)
