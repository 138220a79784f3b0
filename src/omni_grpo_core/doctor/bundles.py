"""What one row of a call holds: its ids without padding and its own media, by content.

Rows are compared between calls by this alone, so that padding, casts, repetition and slicing in
between do not matter, and tensors need not have been kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from omni_grpo_core.core.batch import placeholder_ids
from omni_grpo_core.core.family import QWEN2_5_OMNI, QWEN3_OMNI
from omni_grpo_core.doctor.call_rows import GRIDS, PIXELS
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall, ProcessorCall
from omni_grpo_core.trace.digest import digest_of
from omni_grpo_core.types import MODALITIES, Modality

Fed = ProcessorCall | GenerateCall | ForwardCall
"""Calls that make or take rows of token ids."""

_CASTS = ("bfloat16", "float16")
_MERGE = 2
"""Patches of a side that make one token, in every published Qwen-VL and Qwen-Omni model."""
_SECONDS = ("video_second_per_grid", "second_per_grid_ts")


@dataclass(frozen=True, slots=True)
class Markers:
    """``tokens``: each modality's placeholder id. ``audio_tokens``: mel frames -> placeholders."""

    tokens: Mapping[Modality, int]
    merge: int
    audio_tokens: Callable[[int], int]


class Item(NamedTuple):
    """One media item of a row. ``size``: its grid (t, h, w), or its mel frames. ``seconds``: per
    grid step of a clip, if the call had them. ``contents``: digests of its units as bytes, first in
    the dtype of the call, then of casts; none where the call had no values for it. ``start``,
    ``units``: its place among the units of the call's tensor."""

    size: tuple[int, ...]
    seconds: float | None
    contents: tuple[bytes, ...]
    start: int
    units: int

    def gives(self, other: Item) -> str | None:
        """How ``other``, in a later call, holds the same values: ``""``, the dtype of a cast, or
        ``None`` where it does not."""
        if self.size != other.size or not other.contents:
            return None
        for name, content in zip(("", *_CASTS), self.contents, strict=False):
            if content == other.contents[0]:
                return name
        return None


Items = Mapping[Modality, tuple[Item, ...] | None]
"""The media of a row by modality; ``None`` where they cannot be told from other rows'."""


@dataclass(frozen=True, slots=True, eq=False)
class FedRow:
    """Row ``at`` of ``call``. ``ids``: without padding, by the call's own mask; ``raw``: all of
    them. ``kept``: bool (L,), that mask. ``masked``: whether the call had one."""

    call: Fed
    at: int
    ids: tuple[int, ...]
    raw: tuple[int, ...]
    kept: Tensor
    masked: bool
    media: Items

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for rows of equal content."""
        items = tuple(
            (modality, None if held is None else tuple(i[:1] + i.contents[:1] for i in held))
            for modality, held in self.media.items()
        )
        return (self.ids, items)


def held_in(call: Fed) -> Mapping[str, Tensor]:
    """The tensors that a call made or took."""
    return call.outputs if isinstance(call, ProcessorCall) else call.inputs


def ids_in(call: Fed) -> Tensor | None:
    """(N, L): its token ids; ``None`` where it had none."""
    held = held_in(call)
    ids = held.get("input_ids", held.get("inputs"))
    if ids is None or ids.dim() not in (1, 2) or ids.is_floating_point():
        return None
    return ids if ids.dim() == 2 else ids[None]


def markers_of(case: Case) -> Markers | None:
    """From the reference, else from the recording's header."""
    return case.once(_markers_of)


def _markers_of(case: Case) -> Markers | None:
    if case.reference is not None:
        policy = case.reference.policy
        merge = int(policy.processor.image_processor.merge_size)
        return Markers(placeholder_ids(policy.processor), merge, policy.family.audio_tokens)
    header = case.trace.header
    named = dict(pair.split("=") for pair in header.get("placeholders", "").split())
    tokens = {m: int(named[m]) for m in MODALITIES if m in named}
    family = QWEN3_OMNI if header.get("model", "").startswith("Qwen3Omni") else QWEN2_5_OMNI
    return Markers(tokens, int(named.get("merge", _MERGE)), family.audio_tokens) if tokens else None


def rows_in(case: Case, call: Fed) -> tuple[FedRow, ...]:
    """The rows of a call, in order; none where it had no ids."""
    return case.once(_rows_in, call)


def _rows_in(case: Case, call: Fed) -> tuple[FedRow, ...]:
    ids = ids_in(call)
    if ids is None or "attention_mask" in call.large:  # padding cannot be told
        return ()
    if isinstance(call, ProcessorCall) and not any(call.texts):  # its prompts are made elsewhere
        return ()
    mask = held_in(call).get("attention_mask")
    if mask is not None and mask.dim() == 1:
        mask = mask[None]
    masked = mask is not None and mask.shape == ids.shape
    kept = mask.bool() if mask is not None and masked else torch.ones_like(ids, dtype=torch.bool)
    media = _media(call, ids, kept, markers_of(case))
    return tuple(
        FedRow(call, at, tuple(row[kept[at]].tolist()), tuple(row.tolist()), kept[at], masked, held)
        for at, (row, held) in enumerate(zip(ids, media, strict=True))
    )


def _media(call: Fed, ids: Tensor, kept: Tensor, markers: Markers | None) -> list[Items]:
    rows: list[dict[Modality, tuple[Item, ...] | None]] = [{} for _ in ids]
    for modality in MODALITIES:
        items, lengths = _items(call, modality, markers)
        token = _token(modality, ids, sum(lengths), markers)
        counts = [0] * len(ids) if token is None else ((ids == token) & kept).sum(1).tolist()
        if not items and not any(counts):
            continue
        shares = _shares(lengths, counts) if token is not None else None
        used = 0
        for row, count in zip(rows, counts, strict=True):
            if shares is None:
                row[modality] = None
            elif count:
                row[modality] = tuple(items[used : used + shares[0]])
                used += shares.pop(0)
            else:
                shares.pop(0)
    return list(rows)


def _shares(lengths: Sequence[int], counts: Sequence[int]) -> list[int] | None:
    """How many items fill each row's placeholders; ``None`` where no whole number does.

    >>> _shares([4, 4, 6], [8, 0, 6]), _shares([4, 4, 6], [6, 0, 8])
    ([2, 0, 1], None)
    """
    left, shares = list(lengths), []
    for count in counts:
        number = 0
        while count > 0 and left:
            count -= left.pop(0)
            number += 1
        if count:
            return None
        shares.append(number)
    return None if left else shares


def _items(call: Fed, modality: Modality, markers: Markers | None) -> tuple[list[Item], list[int]]:
    """A call's items of one modality, and the placeholders that each fills."""
    held, grid = held_in(call), held_in(call).get(GRIDS[modality])
    if grid is None or grid.dim() != 2:
        return [], []
    audio_tokens = QWEN2_5_OMNI.audio_tokens if markers is None else markers.audio_tokens
    merge = _MERGE if markers is None else markers.merge
    seconds = next((held[name] for name in _SECONDS if name in held), None)
    timed = modality == "video" and seconds is not None and seconds.numel() == len(grid)
    known = _digests(call, PIXELS[modality])
    items, lengths, start = [], [], 0
    for at, one in enumerate(grid):
        sound = modality == "audio"
        size = (int(one.sum()),) if sound else tuple(int(n) for n in one)
        units = size[0] if sound else int(one.prod())
        if sound:
            parts = [d[at, :units] for d in known if d.dim() == 2 and len(d) == len(grid)]
        else:
            parts = [d[start : start + units] for d in known if d.dim() == 1]
        contents = tuple(p.contiguous().numpy().tobytes() for p in parts if len(p) == units)
        rate = float(seconds.flatten()[at]) if timed and seconds is not None else None
        items.append(Item(size, rate, contents, at if sound else start, units))
        lengths.append(audio_tokens(units) if sound else units // merge**2)
        start += units
    return items, lengths


def _digests(call: Fed, name: str) -> list[Tensor]:
    """Of a tensor as it was, then, where a call made it, of its casts."""
    kept = held_in(call).get(name)
    names = [name] + [f"{name}@{cast}" for cast in _CASTS] * isinstance(call, ProcessorCall)
    found = [call.digests[one] for one in names if one in call.digests]
    if found or kept is None or not kept.is_floating_point():
        return found
    own = [digest_of(name, kept)]
    if isinstance(call, ProcessorCall):
        own += [digest_of(name, kept.to(getattr(torch, cast))) for cast in _CASTS]
    return own


def _token(modality: Modality, ids: Tensor, total: int, markers: Markers | None) -> int | None:
    """A modality's placeholder id; without markers the only id that occurs ``total`` times."""
    if markers is not None:
        return markers.tokens.get(modality)
    values, counts = torch.unique(ids, return_counts=True)
    fitting = values[counts == total].tolist() if total > 1 else []
    return int(fitting[0]) if len(fitting) == 1 else None
