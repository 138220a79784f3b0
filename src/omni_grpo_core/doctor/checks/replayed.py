"""Looks at processor calls against the reference processor's on the same texts and media."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from omni_grpo_core.core.batch import placeholder_ids
from omni_grpo_core.core.processing import ID_DTYPE
from omni_grpo_core.doctor.call_rows import PIXELS
from omni_grpo_core.doctor.checks.flags import extra_sounds
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged
from omni_grpo_core.doctor.rendered import rendered_batches
from omni_grpo_core.doctor.replay.batch import (
    Given,
    as_called,
    given_rows,
    grid_sizes,
    reference_row,
)
from omni_grpo_core.doctor.reproduce import difference, plain, reproductions, told
from omni_grpo_core.tolerances import FEATURES
from omni_grpo_core.trace.calls import ProcessorCall
from omni_grpo_core.types import MODALITIES, Modality, Row

if TYPE_CHECKING:
    from torch import Tensor

    from omni_grpo_core.core.policy import Policy


def look_replay(case: Case) -> Iterator[Evidence]:
    """Each row equals the reference processor's for the same text and media."""
    if case.reference is None:
        return
    for one in rendered_batches(case):
        for call in one.processed:
            rows = given_rows(call, case)
            resized = any(size.given != size.made for size in grid_sizes(call, case))
            if extra_sounds(call, case):
                continue  # each row's own sounds are unknown
            if rows is not None and not resized and _whole(call, rows, case):
                yield from _by_rows(call, rows, case)
            elif (made := as_called(case, call)) is not None:
                yield from _as_called(call, made, case)


def _whole(call: ProcessorCall, rows: Sequence[Given], case: Case) -> bool:
    """Whether every row can be replayed alone, which needs no keyword of the call to be right."""
    ids = call.outputs.get("input_ids")
    wanted = [reference_row(call, given, case) for given in rows]
    fits = ids is not None and ids.dim() == 2 and len(ids) == len(rows)
    return fits and all(isinstance(row, Row) for row in wanted)


def _by_rows(call: ProcessorCall, rows: Sequence[Given], case: Case) -> Iterator[Evidence]:
    if case.reference is None:
        return
    note_judged(case, "batch")
    policy = case.reference.policy
    ids, mask = call.outputs["input_ids"], call.outputs.get("attention_mask")
    for given in rows:
        wanted = reference_row(call, given, case)
        if isinstance(wanted, Row):
            # a text may hold the padding token itself
            own = str(policy.processor.tokenizer.pad_token) in given.text
            real = (ids[given.index] != policy.pad_token_id) | own
            kept = real if mask is None else mask[given.index].bool() & real
            yield from _ids(ids[given.index][kept].to(ID_DTYPE), wanted, given, policy)
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
    for modality in MODALITIES:
        key = PIXELS[modality]
        parts = [row.tensors[key] for row in wanted if isinstance(row, Row) and key in row.tensors]
        if not parts or key not in call.outputs:
            continue
        width = max(part.shape[-1] for part in parts)
        right = torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[-1])) for p in parts])
        found = _features(call, modality, right)
        if found is not None:
            yield found


def _as_called(call: ProcessorCall, made: Mapping[str, Tensor], case: Case) -> Iterator[Evidence]:
    """Everything that the checkpoint's processor makes of the same call."""
    note_judged(case, "batch")
    for modality in MODALITIES:
        right = made.get(PIXELS[modality])
        if right is not None and PIXELS[modality] in call.outputs:
            found = _features(call, modality, right)
            if found is not None:
                yield found
    for key, right in made.items():
        got = call.outputs.get(key)
        if key in PIXELS.values() or got is None or right.is_floating_point():
            continue
        if got.shape == right.shape and torch.equal(got.to(right.dtype), right):
            continue
        changes = reproductions(right, got) if got.dim() == right.dim() else ()
        said = told(f"{key} is the checkpoint's processor's", changes) if changes else (
            f"{key} is not what the checkpoint's processor makes of the same call: "
            + difference(right, got)
        )  # fmt: skip
        yield Evidence("batch", "output-differs", said, values={"key": key, **plain(changes)})


def _features(call: ProcessorCall, modality: Modality, right: Tensor) -> Evidence | None:
    """What was done to the pixels or mel features of a call."""
    key = PIXELS[modality]
    got = call.outputs[key]
    low = got.dtype in (torch.bfloat16, torch.float16)
    rtol, atol = (2**-7, 2**-7) if low else (FEATURES.rtol, FEATURES.atol)
    if got.shape == right.shape and torch.allclose(got.float(), right.float(), rtol, atol):
        return None
    axes: tuple[str, ...] = ("sounds", "mel bins", "mel frames")
    want, held = right.float(), got.float()
    if modality != "audio" and want.dim() == held.dim() == 2 and want.shape[1] % 3 == 0:
        # a patch holds one colour after the other
        axes = ("patches", "channels", "values")
        want, held = (one.reshape(len(one), 3, -1) for one in (want, held))
    changes = reproductions(want, held, rtol, axes=axes)
    said = told(f"{key} is the reference processor's for the same {modality}", changes)
    if not changes:
        said = (
            f"{key} {tuple(got.shape)} is not the reference processor's for the same {modality}, "
            f"{tuple(right.shape)}: {difference(want, held)}"
        )
    return Evidence(
        "batch",
        "features-differ",
        said,
        values={
            "modality": modality, "got": tuple(got.shape), "want": tuple(right.shape),
            "max_length": _max_length(call), **plain(changes),
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
