"""Looks at processor calls against the reference processor's on the same texts and media."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from omni_grpo_core.core.batch import ID_DTYPE, placeholder_ids
from omni_grpo_core.doctor.call_rows import PIXELS
from omni_grpo_core.doctor.checks.flags import extra_sounds
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged
from omni_grpo_core.doctor.rendered import rendered_batches
from omni_grpo_core.doctor.replay.batch import Given, given_rows, reference_row
from omni_grpo_core.tolerances import FEATURES
from omni_grpo_core.trace.calls import ProcessorCall
from omni_grpo_core.types import MODALITIES, Row

if TYPE_CHECKING:
    from torch import Tensor

    from omni_grpo_core.core.policy import Policy


def look_replay(case: Case) -> Iterator[Evidence]:
    """Each row equals the reference processor's for the same text and media."""
    if case.reference is None:
        return
    policy = case.reference.policy
    for one in rendered_batches(case):
        for call in one.processed:
            rows = given_rows(call, case)
            ids, mask = call.outputs.get("input_ids"), call.outputs.get("attention_mask")
            if rows is None or ids is None or ids.dim() != 2 or len(ids) != len(rows):
                continue
            if extra_sounds(call, case):
                continue  # each row's own sounds are unknown
            for given in rows:
                wanted = reference_row(call, given, case)
                if isinstance(wanted, Row):
                    note_judged(case, "batch")
                    real = ids[given.index] != policy.pad_token_id
                    kept = real if mask is None else mask[given.index].bool() & real
                    got = ids[given.index][kept].to(ID_DTYPE)
                    yield from _ids(got, wanted, given, policy)
            yield from _tensors(call, rows, case)


def _ids(got: Tensor, wanted: Row, given: Given, policy: Policy) -> Iterator[Evidence]:
    found, right = got.tolist(), wanted.input_ids.tolist()
    if found == right:
        return
    if _part_of(found, right):
        yield _cut(given.index, found, right, policy, "the processor returned")
        return
    marks_of = placeholder_ids(policy.processor)
    counts = {
        m: (found.count(token), right.count(token))
        for m, token in marks_of.items()
        if found.count(token) != right.count(token)
    }
    parts = ", ".join(f"{a} {m} placeholders instead of {b}" for m, (a, b) in counts.items())
    yield Evidence(
        "batch",
        "ids-differ",
        f"row {given.index} has {len(found)} tokens where its text and media give {len(right)}"
        + (f": {parts}" if parts else ""),
        row=given.index,
        values={"got": len(found), "want": len(right), "placeholders": counts},
    )


def _tensors(call: ProcessorCall, rows: Sequence[Given], case: Case) -> Iterator[Evidence]:
    """Pixels and mel features of the whole call, compared with its rows' in order."""
    wanted = [reference_row(call, given, case) for given in rows]
    if not all(isinstance(row, Row) for row in wanted):
        return
    for modality in MODALITIES:
        key = PIXELS[modality]
        got = call.outputs.get(key)
        parts = [row.tensors[key] for row in wanted if isinstance(row, Row) and key in row.tensors]
        if got is None or not parts:
            continue
        width = max(part.shape[-1] for part in parts)
        padded = [torch.nn.functional.pad(p, (0, width - p.shape[-1])) for p in parts]
        right = torch.cat(padded)
        if got.shape == right.shape and torch.allclose(
            got.float(), right.float(), rtol=FEATURES.rtol, atol=FEATURES.atol
        ):
            continue
        yield Evidence(
            "batch",
            "features-differ",
            f"{key} {tuple(got.shape)} is not the reference processor's for the same {modality}: "
            f"{tuple(right.shape)}"
            + (
                f", off by {float((got.float() - right.float()).abs().max()):.3g} at most"
                if got.shape == right.shape
                else ""
            ),
            values={
                "modality": modality, "got": tuple(got.shape), "want": tuple(right.shape),
                "max_length": _max_length(call),
            },
        )  # fmt: skip


def _max_length(call: ProcessorCall) -> Any:
    return call.keywords.get("max_length")


def _cut(row: int, got: Sequence[int], whole: Sequence[int], policy: Policy, how: str) -> Evidence:
    end = whole[: len(got)] == list(got)
    marks_of = placeholder_ids(policy.processor)
    lost = {
        m: whole.count(token) - got.count(token)
        for m, token in marks_of.items()
        if whole.count(token) != got.count(token)
    }
    parts = ", ".join(f"{n} {m} tokens" for m, n in lost.items()) or "no media tokens"
    return Evidence(
        "batch",
        "prompt-cut",
        f"{how} {len(got)} of the {len(whole)} tokens of row {row}, truncated on the "
        f"{'right' if end else 'left'}: {parts} among the {len(whole) - len(got)} lost",
        row=row,
        values={
            "side": "right" if end else "left", "got": len(got), "want": len(whole), "lost": lost
        },
    )  # fmt: skip


def _part_of(got: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether one end of ``whole`` was cut off."""
    if not got or len(got) >= len(whole):
        return False
    return list(whole[: len(got)]) == list(got) or list(whole[-len(got) :]) == list(got)


LOOKS: tuple[Look, ...] = (look_replay,)
