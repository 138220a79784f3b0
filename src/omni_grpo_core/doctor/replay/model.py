"""What the model should have computed from a call's inputs before its first layer: positions and
embeddings, row by row, with each row's own audio-in-video layout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.forward import embed, positions
from omni_grpo_core.doctor.call_rows import PIXELS
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.types import AudioInVideo, Row, Span, audio_words

if TYPE_CHECKING:
    from torch import Tensor

    from omni_grpo_core.core.policy import Policy


@dataclass(frozen=True, slots=True, eq=False)
class Feature:
    """What one span's placeholders should hold: ``values`` float32, (span.length, H)."""

    span: Span
    values: Tensor


def reference_positions(case: Case, row: Row, mode: AudioInVideo | None = None) -> Tensor:
    """(3, length): time, height and width of one row; ``mode`` overrides the row's layout."""
    row = row if mode is None else replace(row, audio_in_video=mode)
    # positions depend on grids alone: neither on copies nor on pixels
    row = replace(row, tensors={k: v for k, v in row.tensors.items() if k not in PIXELS.values()})
    return case.once(_positions, row, key=_key(row))


def _positions(case: Case, row: Row) -> Tensor:
    policy = _policy(case)
    return positions(policy, collate([row], policy.pad_token_id)).position_ids[:, 0]


def reference_features(case: Case, row: Row) -> tuple[Feature, ...] | None:
    """The features of each span of a row; ``None`` where its media were too large to keep."""
    if any(PIXELS[span.modality] not in row.tensors for span in row.spans):
        return None
    if not row.spans:
        return ()
    # tokens after the last media item, such as a completion, make no difference
    end = max(span.start + span.length for span in row.spans)
    row = replace(row, input_ids=row.input_ids[:end])
    return case.once(_features, row, key=_key(row))


def _features(case: Case, row: Row) -> tuple[Feature, ...]:
    policy = _policy(case)
    with torch.no_grad():
        (found,) = embed(policy, collate([row], policy.pad_token_id)).features
    return tuple(
        Feature(span, values.float().cpu()) for span, values in zip(row.spans, found, strict=True)
    )


def token_embeddings(case: Case, ids: Tensor) -> Tensor:
    """(length, H), float32: of the tokens themselves, including placeholders."""
    policy = _policy(case)
    with torch.no_grad():
        found: Tensor = policy.model.get_input_embeddings()(ids.to(policy.device))
    return found.float().cpu()


def _policy(case: Case) -> Policy:
    if case.reference is None:
        raise ValueError("a replay needs a reference")
    return case.reference.policy


def _key(row: Row) -> str:
    digest = hashlib.sha256(audio_words(row.audio_in_video).encode())
    digest.update(row.input_ids.numpy().tobytes())
    tensors: Mapping[str, Tensor] = row.tensors
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].float().contiguous().numpy().tobytes())
    return digest.hexdigest()
