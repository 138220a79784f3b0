"""What became of a row's media between two calls: dropped, exchanged, left over, or changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.doctor.bundles import Fed, FedRow, Item, held_in, rows_in
from omni_grpo_core.doctor.call_rows import GRIDS, PIXELS
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.reproduce import Reproduction, difference, plain, reproductions, told
from omni_grpo_core.doctor.trail import Between, Trail, earlier_steps
from omni_grpo_core.types import MODALITIES, Modality, Stage


@dataclass(frozen=True, slots=True)
class _Change:
    """``fact`` and ``key``: of its kind, so that rows with the same change are one finding."""

    stage: Stage
    fact: str
    sentence: str
    key: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def judge_media(
    trail: Trail,
    between: Between,
    row: FedRow,
    bases: Sequence[FedRow],
    pool: Sequence[FedRow],
    stage: Stage,
) -> bool:
    """Blame every modality of ``row`` that is that of none of ``bases``, which a call before it
    made or took for the same ids; the first of them says what it should be. ``pool``: rows that may
    have been mistaken for it. Returns whether anything was blamed."""
    blamed = False
    for modality in MODALITIES:
        if any(_same(base, row, modality) for base in bases):
            continue
        change = _change(trail.case, row, bases[0], pool, modality, stage, between[1])
        if change is not None:
            blamed = True
            trail.broken(
                between,
                [row.at],
                (change.stage, change.fact, change.sentence),
                {"modality": modality, **change.values},
                key=f"{modality} {change.key}",
            )
    return blamed


def _same(base: FedRow, row: FedRow, modality: Modality) -> bool:
    made, taken = base.media.get(modality, ()), row.media.get(modality, ())
    if made is None or taken is None or len(made) != len(taken):
        return False
    return all(
        one.gives(other) is not None and _same_seconds(one.seconds, other.seconds)
        for one, other in zip(made, taken, strict=True)
    )


def _same_seconds(made: float | None, taken: float | None) -> bool:
    """All floats of a batch are cast together, these too: bfloat16 keeps 8 bits."""
    if made is None or taken is None:
        return made is None
    return math.isclose(made, taken, rel_tol=2**-7)


def _change(
    case: Case, row: FedRow, base: FedRow, pool: Sequence[FedRow], modality: Modality,
    stage: Stage, name: str,
) -> _Change | None:  # fmt: skip
    made, taken = base.media.get(modality, ()), row.media.get(modality, ())
    pixels, grid = PIXELS[modality], GRIDS[modality]
    if made is None or any(not item.contents for item in made) or _encoded(row.call):
        return None
    if grid in row.call.large or (pixels in row.call.large and pixels not in row.call.digests):
        return None
    if made and not _has(row.call, pixels):
        return _Change(
            "media", "media-dropped",
            f"{pixels} did not reach {name}, although the call before it had them: the model gets "
            f"no {modality}", values={"grid": grid in held_in(row.call)},
        )  # fmt: skip
    if made and grid not in held_in(row.call):
        return _Change(stage, "grid-dropped", f"{name} got {pixels} without {grid}")
    where = f"row {row.at} of {name}"
    if taken is None:
        items = len(held_in(row.call).get(grid, ()))
        return _Change(
            stage, "media-number",
            f"the {items} {modality} items of {name} do not fill the placeholders of its rows",
            values={"items": items},
        )  # fmt: skip
    if len(made) != len(taken):
        return _Change(
            stage, "media-number",
            f"{where} has {len(taken)} {modality} items instead of {len(made)}",
        )  # fmt: skip
    wrong = next(
        (pair for pair in zip(made, taken, strict=True) if pair[0].gives(pair[1]) is None), None
    )
    if wrong is None:
        return _Change(
            stage, "seconds",
            f"{where} has another time per grid step than the call before it",
        )  # fmt: skip
    return _item_change(case, row, base, pool, modality, stage, where, *wrong)


def _item_change(
    case: Case, row: FedRow, base: FedRow, pool: Sequence[FedRow], modality: Modality,
    stage: Stage, where: str, made: Item, taken: Item,
) -> _Change:  # fmt: skip
    for of, other, step in _others(case, base, pool, modality):
        if (
            other.contents
            and taken.contents
            and other._replace(size=taken.size).gives(taken) is not None
        ):
            values = {"of": of.at, "step": step}
            if step:
                sentence = f"{where} has {modality} content that the processor made in {step}"
                return _Change(stage, "media-stale", sentence, step, values)
            sentence = f"{where} has the {modality} of row {of.at}"
            return _Change(stage, "media-exchanged", sentence, "", values)
    if made.size != taken.size:
        sizes = [" x ".join(map(str, item.size)) for item in (taken, made)]
        sentence = f"{where} has a {GRIDS[modality]} of {sizes[0]} instead of {sizes[1]}"
        for of, other, step in _others(case, base, pool, modality):
            if not step and other.size == taken.size:
                sentence += f", that of row {of.at}"
                break
        return _Change(stage, "grid", sentence, values={"got": taken.size, "want": made.size})
    want, got = (_values(r.call, i, modality) for r, i in ((base, made), (row, taken)))
    subject = f"the {modality} of {where} is what the call before it had,"
    if want is None or got is None:
        sentence = f"{where} has other {modality} values than the call before it"
        return _Change(stage, "media-changed", sentence)
    found = reproductions(want, got) or _colours(want, got, modality)
    if found:
        sentence = told(subject, found)
        return _Change(stage, "media-changed", sentence, found[0].name, plain(found))
    sentence = f"{where} has other {modality} values than the call before it: "
    return _Change(stage, "media-changed", sentence + difference(want, got))


def _colours(want: Tensor, got: Tensor, modality: Modality) -> tuple[Reproduction, ...]:
    """Red and blue exchanged within each patch, whose values are ordered by colour."""
    if modality == "audio" or want.shape != got.shape or want.shape[-1] % 3:
        return ()
    planes = want.reshape(*want.shape[:-1], 3, -1).flip(-2).flatten(-2)
    if not torch.equal(planes.to(got.dtype), got):
        return ()
    return (Reproduction("channels-swapped", "with red and blue exchanged"),)


def _others(
    case: Case, base: FedRow, pool: Sequence[FedRow], modality: Modality
) -> Iterator[tuple[FedRow, Item, str]]:
    """Items of other rows of this step, then of earlier ones, with the name of the step."""
    for row in pool:
        if row is not base:
            yield from ((row, item, "") for item in row.media.get(modality) or ())
    for name, before in earlier_steps(case):
        calls: tuple[Fed, ...] = (*before.processed, *before.generated)
        for row in (row for call in calls for row in rows_in(before, call)):
            yield from ((row, item, name) for item in row.media.get(modality) or ())


def _values(call: Fed, item: Item, modality: Modality) -> Tensor | None:
    """An item's own values: (t, h * w, C) of a picture or clip, (frames, mel) of a sound."""
    held = held_in(call).get(PIXELS[modality])
    if held is None:
        return None
    if modality == "audio":
        return held[item.start][..., : item.units].T
    part = held[item.start : item.start + item.units]
    whole = len(part) == item.units
    return part.view(item.size[0], -1, part.shape[-1]) if whole and item.size[0] > 1 else part


def _has(call: Fed, name: str) -> bool:
    return name in held_in(call) or name in call.large or name in call.digests


def _encoded(call: Fed) -> bool:
    """Whether the towers' output was passed instead of pixels."""
    names = (*held_in(call), *call.keywords)
    return any("encoder_outputs" in name or name == "inputs_embeds" for name in names)
