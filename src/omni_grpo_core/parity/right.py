"""Who is right, by the model's own definition, where the tokens or positions of clips differ."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from omni_grpo_core.parity.definition import interleaved, positions_per_second, runs, said
from omni_grpo_core.parity.given import Setup
from omni_grpo_core.parity.ids_causes import clips_of
from omni_grpo_core.parity.layout import Names, parse
from omni_grpo_core.parity.results import Right
from omni_grpo_core.tolerances import POSITION
from omni_grpo_core.trace.store import value_at
from omni_grpo_core.types import Row, Trace


def right_order(rows: tuple[Row, Row], names: Names, setup: Setup) -> tuple[Right, str]:
    """By the model's definition, for clips whose sound is inside them. Each side is held against
    its own grids, and the seconds that one lasts to it."""
    verdicts, why = [], ""
    merge = int(setup.processor.image_processor.merge_size)
    fallback = rows[0].tensors
    sides = [
        tuple(p.body for p in parse(row.input_ids.tolist(), names) if p.kind == "both")
        for row in rows
    ]
    if sides[0] == sides[1] or not all(sides):
        return "", ""
    for row in rows:
        tensors = {**fallback, **row.tensors}
        pieces = parse(row.input_ids.tolist(), names)
        clips = clips_of(replace(row, tensors=tensors), pieces, names, merge)
        videos = [piece for piece in pieces if piece.kind in ("video", "both")]
        fits = bool(clips)
        for clip, piece in zip(clips, videos, strict=False):
            if piece.kind != "both":
                continue
            want = interleaved(clip, setup.policy.family)
            found = runs(
                "audio" if t == names.placeholder["audio"] else "video" for t in piece.body
            )
            fits &= want == found
            why = why or (
                f"{clip.grids} grids of {clip.seconds:g} s with {clip.per_grid} tokens each and "
                f"{clip.audio} audio tokens are {said(want)} by the model's definition"
            )
        verdicts.append(fits)
    right: Right = (
        "both" if all(verdicts) else "a" if verdicts[0] else "b" if verdicts[1] else "neither"
    )
    return right, why


def right_positions(a: Trace, b: Trace, row: Row, names: Names, setup: Setup) -> tuple[Right, str]:
    """By the model's definition: a token's time position is its time, by so many a second."""
    pieces = parse(row.input_ids.tolist(), names)
    clips = clips_of(row, pieces, names, int(setup.processor.image_processor.merge_size))
    fits, why = [True, True], ""
    rate = positions_per_second(setup.policy.family)
    start, clip = 0, iter(clips)
    for piece in pieces:
        first = start + len(piece.before)
        start += len(piece.ids)
        if piece.kind not in ("video", "both") or not clips:
            continue
        shown = next(clip)
        places = [first + n for n, t in enumerate(piece.body) if t == names.placeholder["video"]]
        want = torch.arange(shown.grids).repeat_interleave(shown.per_grid) * shown.seconds * rate
        if setup.policy.family.whole_positions:
            want = want.trunc()
        for side, trace in enumerate((a, b)):
            times = position_ids(trace)[0, places].float()
            fits[side] &= len(times) == len(want) and bool(
                ((times - times[0] - want).abs() < POSITION).all()
            )
        why = why or (
            f"{rate} positions a second: pairs of frames that are {shown.seconds:g} s apart are "
            f"{want[-1] / max(1, shown.grids - 1):g} apart in time, all tokens of a pair at one"
        )
    if all(fits) or not any(fits):
        return "", ""
    return "a" if fits[0] else "b", why


def position_ids(trace: Trace) -> Tensor:
    """(3, L)."""
    found: Tensor = value_at(trace, "positions", dict)["position_ids"][:, 0]
    return found
