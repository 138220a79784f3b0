"""Looks at positions: those given by each row's text, grids and seconds, in every call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from omni_grpo_core.core.batch import placeholder_ids
from omni_grpo_core.doctor.bundles import rows_in
from omni_grpo_core.doctor.call_rows import GRIDS, CallRow, call_rows
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged
from omni_grpo_core.doctor.rendered import flag_of
from omni_grpo_core.doctor.replay.model import reference_positions
from omni_grpo_core.doctor.reproduce import Reproduction, plain, reproductions, told
from omni_grpo_core.doctor.trail import earlier_steps
from omni_grpo_core.recorder.thinker import rope_sections
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall
from omni_grpo_core.types import AudioInVideo, Row

if TYPE_CHECKING:
    from torch import Tensor

Call = GenerateCall | ForwardCall
_SECONDS = "video_second_per_grid"
_ROUNDED = 0.05
"""Of the largest time inside a medium: positions are whole numbers in some families."""


def named_calls(case: Case) -> list[tuple[str, Call]]:
    """Every model call on whole rows of token ids, with its name in messages.

    A forward that goes on from a cache, such as a step of a loop's own decoding, is not one: what
    it was given says nothing of what it sees.
    """
    calls: list[tuple[str, Call]] = [("generate", call) for call in case.generated]
    for call in case.forwards:
        calls.append(("the scoring forward" if call.own else "the reference's forward", call))
    return [(name, call) for name, call in calls if _is_whole(call)]


def _is_whole(call: Call) -> bool:
    ids, mask = call.inputs.get("input_ids"), call.inputs.get("attention_mask")
    if ids is None or ids.dim() != 2 or ids.shape[1] < 2:
        return False
    cached = any(call.keywords.get(name) is not None for name in ("past_key_values", "cache"))
    return not cached and (mask is None or mask.dim() != 2 or mask.shape == ids.shape)


def rows_of(case: Case, call: Call) -> tuple[CallRow, ...]:
    """:func:`call_rows` of a call, computed once."""
    return case.once(_rows_of, call)


def _rows_of(case: Case, call: Call) -> tuple[CallRow, ...]:
    if case.reference is None:
        return ()
    return call_rows({**call.inputs, **_seconds(case, call)}, case.reference.policy)


def _seconds(case: Case, call: Call) -> dict[str, Tensor]:
    """Seconds between frames that positions were made from, which were passed in their place: those
    that the processor gave for the same clips."""
    grids = call.inputs.get(GRIDS["video"])
    if grids is None or _SECONDS in call.inputs or "position_ids" not in call.inputs:
        return {}
    made = [
        item
        for one in (case, *(before for _, before in earlier_steps(case)))
        for processed in one.processed
        for row in rows_in(one, processed)
        for item in row.media.get("video") or ()
    ]
    clips = [item for row in rows_in(case, call) for item in row.media.get("video") or ()]
    found = [next((m.seconds for m in made if m.gives(clip) is not None), None) for clip in clips]
    known = [seconds for seconds in found if seconds is not None]
    return {_SECONDS: torch.tensor(known)} if len(known) == len(grids) else {}


def copies_of(rows: Sequence[CallRow], number: int) -> list[CallRow]:
    """The row behind each of ``number`` rows inside the model: ``num_return_sequences`` repeats
    every row there."""
    copies = max(number // len(rows), 1)
    return [row for row in rows for _ in range(copies)]


def look_positions(case: Case) -> Iterator[Evidence]:
    """Positions that the text model got, compared with the reference's on the call's own inputs."""
    if case.reference is None:
        return
    for name, call in named_calls(case):
        got = call.position_ids
        rows = rows_of(case, call)
        if got is None and "attention_mask" not in call.inputs:
            yield from _unmasked(case, name, rows)
        width = call.inputs["input_ids"].shape[-1]
        if got is None or got.dim() != 3 or got.shape[-1] != width or not rows:
            continue
        for place, row in enumerate(copies_of(rows, got.shape[1])):
            if row.row is None:
                continue
            note_judged(case, "positions")
            # positions of one row may be broadcast to all
            own = got[-3:, 0 if got.shape[1] == 1 else place, row.kept]
            if not torch.equal(own, reference_positions(case, row.row).to(own.dtype)):
                yield _differs(case, name, call, row, row.row, own, rows)
                break


def look_next_positions(case: Case) -> Iterator[Evidence]:
    """While generating, the first row's positions continue from the end of its prompt."""
    if case.reference is None:
        return
    for call in case.generated:
        rows = rows_of(case, call) if "input_ids" in call.inputs else ()
        if not rows or not call.step_positions or call.position_ids is None:
            continue
        if not all(bool(row.kept[-1]) for row in rows):
            continue  # after padding in any row, decoding counts differently
        # from the positions that the prompt really had, which another look judges
        prompt = call.position_ids[-3:, 0, rows[0].kept]
        first = prompt.max().item() + 1  # not whole after a clip, in some families
        note_judged(case, "positions")
        wanted = tuple(first + step for step in range(len(call.step_positions)))
        if call.step_positions != wanted:
            yield Evidence(
                "positions",
                "steps-off",
                f"after a prompt that ends at position {first - 1}, generate continued at "
                f"{_few(call.step_positions)} instead of {_few(wanted)}",
                row=0,
                values={"got": call.step_positions[:8], "want": wanted[:8]},
            )


def _unmasked(case: Case, name: str, rows: Sequence[CallRow]) -> Iterator[Evidence]:
    """The model uses positions 0, 1, 2, … where it gets neither positions nor a mask."""
    for row in rows:
        if row.row is None:
            continue
        wanted = reference_positions(case, row.row)
        line = row.kept.nonzero().flatten().expand(3, -1)
        if not torch.equal(wanted, line):
            off = int((wanted - line).abs().max())
            yield Evidence(
                "positions",
                "one-dimensional",
                f"{name} was called without attention_mask: row {row.index} gets one-dimensional "
                f"positions 0, 1, 2, …, up to {off} off",
                row=row.index,
                values={"call": name, "mask": False, "off": off},
            )
            return


def _differs(
    case: Case, name: str, call: Call, row: CallRow, own_row: Row, own: Tensor,
    rows: Sequence[CallRow],
) -> Evidence:  # fmt: skip
    wanted = reference_positions(case, own_row)
    flag = flag_of(call.keywords)
    as_passed: AudioInVideo = "interleaved" if flag else "off"
    values: dict[str, Any] = {"call": name, "mask": "attention_mask" in call.inputs, "told": flag}
    line = torch.arange(own.shape[-1]).expand(3, -1)
    off = int((own - wanted).abs().max())
    where = f"row {row.index} of {name}"
    if as_passed != own_row.audio_in_video and torch.equal(
        own, reference_positions(case, own_row, as_passed).to(own.dtype)
    ):
        missing = flag is None
        return Evidence(
            "positions",
            "flag-missing" if missing else "flag-followed",
            f"{where} has positions as without audio-in-video, although its sound is inside its "
            f"video: up to {off} off"
            if as_passed == "off"
            else f"{where} has positions as with audio-in-video, although its sound is not inside "
            f"its video: up to {off} off",
            # a forward without the flag is itself at fault; a wrong flag was passed on to it
            origin="added" if missing and name != "generate" else "inherited",
            row=row.index,
            values={**values, "off": off},
        )
    fact, sentence = "positions-differ", f"{where} is up to {off} positions off"
    flat = bool((own == own[:1]).all())
    times = _video_times(case, own_row, own)
    others = [r.row for r in rows if r.row is not None and r.index != row.index]
    if flat and bool((own - own[:, :1] == line).all()) and not bool((wanted == wanted[:1]).all()):
        fact = "one-dimensional"
        sentence = f"{where} has one-dimensional positions 0, 1, 2, …, up to {off} off"
        if not values["mask"]:
            sentence += "; it was called without attention_mask"
    elif "attention_mask" not in call.inputs and flat:
        fact = "one-dimensional"
        sentence = (
            f"{where} has one-dimensional positions, counted over the padding; it was called "
            "without attention_mask"
        )
    elif times is not None and len(set(times)) == 1:
        fact = "time-collapsed"
        sentence = f"{where} has every frame of its video at time {times[0]}"
    elif any(_is_of(case, own, other) for other in others):
        fact, sentence = (
            "another-rows",
            f"{where} has the positions of another row, up to {off} off",
        )
    elif len(set((own - wanted).flatten().tolist())) == 1:
        fact, sentence = (
            "all-shifted",
            f"all positions of {where} are shifted by {int((own - wanted)[0, 0])}",
        )
    else:
        tail = _tail_shift(own, wanted)
        if tail is not None:
            place, shift = tail
            fact = "tail-shifted"
            sentence = f"{where} is right up to token {place} and off by {shift} from there on"
            values["shift"] = shift
    if fact == "positions-differ" and (found := _changed(own_row, wanted, own)):
        sentence = told(f"the positions of {where} are the reference's", found)
        values |= plain(found)
    return Evidence("positions", fact, sentence, row=row.index, values={**values, "off": off})


def _changed(row: Row, wanted: Tensor, own: Tensor) -> tuple[Reproduction, ...]:
    """What was done to all positions, or to the times inside one kind of media."""
    found = reproductions(wanted, own, axes=("axes", "tokens"))
    for span in () if found else row.spans:
        inside = slice(span.start, span.start + span.length)
        right, got = (one[0, inside].double() - one[0, span.start] for one in (wanted, own))
        for one in reproductions(right, got, _ROUNDED):
            if one.name == "times":
                said = f"with the time inside its {span.modality} {one.sentence}"
                return (Reproduction("time-scaled", said, one.values),)
    return found


def _video_times(case: Case, row: Row, own: Tensor) -> list[int] | None:
    """Time positions of a row's video tokens, where it has more than one frame."""
    if case.reference is None or "video_grid_thw" not in row.tensors:
        return None
    video = placeholder_ids(case.reference.policy.processor)["video"]
    frames = int(row.tensors["video_grid_thw"][:, 0].max())
    times: list[int] = own[0, row.input_ids == video].tolist()
    return times if frames > 1 and times else None


def _is_of(case: Case, own: Tensor, other: Row) -> bool:
    """Whether positions are another row's, over their common length (without padding, aligned at
    the end or the beginning)."""
    theirs = reference_positions(case, other).to(own.dtype)
    width = min(own.shape[-1], theirs.shape[-1])
    return torch.equal(own[:, :width], theirs[:, :width]) or torch.equal(
        own[:, -width:], theirs[:, -width:]
    )


def _tail_shift(own: Tensor, wanted: Tensor) -> tuple[int, int] | None:
    """(token, shift) of a constant shift from a token to the end, after right positions."""
    gaps = own - wanted
    differing = gaps.abs().amax(0).nonzero().flatten()
    first = int(differing[0])
    rest = set(gaps[:, first:].flatten().tolist())
    return (first, int(rest.pop())) if first and len(rest) == 1 else None


def _few(numbers: Sequence[float]) -> str:
    shown = ", ".join(map(str, numbers[:3]))
    return f"{shown}, …" if len(numbers) > 3 else shown


def look_rope(case: Case) -> Iterator[Evidence]:
    """The model's rope sections are the checkpoint's."""
    used = case.trace.header.get("rope_sections")
    if used is None or case.reference is None:
        return
    body = case.reference.policy.model.model
    wanted = rope_sections(getattr(body, "language_model", body))
    if used != wanted:
        yield Evidence(
            "policy",
            "rope-sections-differ",
            f"the model rotates positions with mrope_section [{used or 'none'}], the checkpoint "
            f"was trained with [{wanted}]",
            values={"got": used, "want": wanted},
        )


LOOKS: tuple[Look, ...] = (look_positions, look_next_positions)
MODEL: tuple[Look, ...] = (look_rope,)
"""Looks at the model itself, independent of the step."""
