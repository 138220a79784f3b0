"""Looks at processor calls and at what is passed from them to the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from omni_grpo_core.core.processing import ID_DTYPE
from omni_grpo_core.doctor.call_rows import GRIDS, PIXELS, Counts, counts_of
from omni_grpo_core.doctor.checks import flags
from omni_grpo_core.doctor.checks.flags import calls_of, flag_wrong
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Origin, note_judged, note_missing
from omni_grpo_core.doctor.rendered import RenderedBatch, rendered_batches
from omni_grpo_core.doctor.replay.batch import given_rows, grid_sizes
from omni_grpo_core.doctor.replay.text import collapsed, marks
from omni_grpo_core.doctor.reproduce import (
    Reproduction,
    difference,
    plain,
    reproductions,
    told,
)
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall, ProcessorCall
from omni_grpo_core.types import MODALITIES, Modality

if TYPE_CHECKING:
    from torch import Tensor

    from omni_grpo_core.core.policy import Policy


_ROUNDED = 2**-7
"""Relative: a trainer may cast every input to bfloat16."""


def look_keywords(case: Case) -> Iterator[Evidence]:
    """No keyword is ignored."""
    for call in case.processed:
        for name in call.ignored:
            yield Evidence(
                "batch",
                "keyword-ignored",
                f"the processor was called with {name}=, which no part of it accepts: it was "
                "dropped, with at most a warning",
                values={"keyword": name, "value": _short(call.keywords.get(name))},
            )


def look_raised(case: Case) -> Iterator[Evidence]:
    """The processor does not raise."""
    for one in rendered_batches(case):
        for call in one.processed:
            if call.error is None:
                continue
            agrees = given_rows(call, case) is not None and not call.ignored
            yield Evidence(
                "batch",
                "processor-raised",
                f"the processor raised {call.error.strip().rstrip(':')}, with {len(call.texts)} "
                f"texts, {len(call.images)} images, {len(call.videos)} videos and "
                f"{len(call.audios)} sounds",
                # texts and media that match are right input
                origin="added" if agrees or flag_wrong(call, case) else "unknown",
                values={"error": call.error},
            )


def look_resized(case: Case) -> Iterator[Evidence]:
    """Pictures already resized for the model are not resized again."""
    for call in case.processed:
        if grid_sizes(call, case):
            note_judged(case, "batch")
        again = next((one for one in grid_sizes(call, case) if one.again), None)
        if again is None:
            continue
        (high, wide), (new_high, new_wide) = again.given, again.made
        times = new_high * new_wide / (high * wide)
        yield Evidence(
            "batch",
            "resized-again",
            f"{again.name} entered the processor with {high} x {wide} pixels and left it with "
            f"{new_high} x {new_wide}: {times:.3g} times the tokens",
            values={
                "got": again.made, "want": again.given, "times": times,
                "do_resize": call.keywords.get("do_resize"),
            },
            severity="differs",
        )  # fmt: skip


def look_expanded(case: Case) -> Iterator[Evidence]:
    """Texts come with one placeholder per media item; the processor expands them."""
    names = marks(case)
    for call in case.processed:
        for row, text in enumerate(call.texts):
            if collapsed(text, names) != text:
                counts = {m: text.count(names[m][1]) for m in MODALITIES if names[m][1] in text}
                yield Evidence(
                    "batch",
                    "expanded-twice",
                    f"prompt {row} reached the processor with its placeholders already expanded: "
                    + ", ".join(f"{n} {m}" for m, n in counts.items()),
                    row=row,
                    values={"counts": counts},
                )
                break


def look_padding(case: Case) -> Iterator[Evidence]:
    """Prompts are padded on the left, the mask shows where, and ids and mask are int64."""
    if case.reference is None:
        return
    pad = case.reference.policy.pad_token_id
    padding = str(case.reference.policy.processor.tokenizer.pad_token)
    for one in rendered_batches(case):
        if any(padding in text for call in one.processed for text in call.texts):
            continue  # as one that begins with it: which of them is padding, ids don't tell
        outputs = [("the processor", call, call.outputs) for call in one.processed]
        found = [e for name, call, held in outputs for e in _padding(name, call, held, pad)]
        if outputs:
            note_judged(case, "batch")
        yield from found
        wrong = {e.fact for e in found}
        for name, model_call, own in calls_of(one):
            made = list(_padding(name, None, model_call.inputs, pad, whole=own == "forward"))
            yield from (e for e in made if e.fact not in wrong)


def look_placeholders(case: Case) -> Iterator[Evidence]:
    """Placeholders and features match in number: for every modality, in total and row by row."""
    if case.reference is None:
        note_missing(case, "no checkpoint: placeholders not counted, nothing replayed")
        return
    policy = case.reference.policy
    for one in rendered_batches(case):
        wrong: set[str] = set()
        for call in one.processed:
            if not (call.images or call.videos or call.audios) or not any(call.texts):
                continue  # text or media on their own; what the model gets is counted too
            for count in _counted(call.outputs, policy):
                note_judged(case, "batch")
                if not count.agree:
                    wrong.add(count.modality)
                    yield _miscount(count, "the processor's output", _input_right(call, case))
        for name, model_call, _ in calls_of(one):
            for count in _counted(model_call.inputs, policy):
                lost = PIXELS[count.modality] not in {*model_call.inputs, *model_call.large}
                # media that were not passed on are reported by another look
                if not count.agree and count.modality not in wrong and not lost:
                    wrong.add(count.modality)
                    yield _exchanged(one, model_call, name, count.modality) or _miscount(
                        count, f"the input of {name}", "added"
                    )


def look_seconds(case: Case) -> Iterator[Evidence]:
    """The seconds between frames reach the model as the processor gave them."""
    key = "video_second_per_grid"
    for one in rendered_batches(case):
        made = [call.outputs[key].flatten() for call in one.processed if key in call.outputs]
        for name, call, _ in calls_of(one) if made else ():
            got = call.inputs.get(key)
            if got is None:
                continue
            note_judged(case, "batch")
            right, got = torch.cat(made).double(), got.flatten().double()
            near = (got[:, None] - right[None]).abs() <= _ROUNDED * right.abs()
            if bool(near.any(1).all()):
                continue
            times = float(got[0] / right[0])
            scaled = Reproduction("times", f"times {times:.4g}", {"times": times})
            same = len(set(right.tolist())) == len(set(got.tolist())) == 1
            found = (scaled,) if same else reproductions(right, got, _ROUNDED)
            yield Evidence(
                "batch",
                "seconds-changed",
                told(f"{key} of {name} is the processor's", found)
                if found
                else f"{key} of {name} is not the processor's: {difference(right, got)}",
                values={"call": name, **plain(found)},
            )


def _padding(
    name: str,
    call: ProcessorCall | None,
    held: Mapping[str, Tensor],
    pad: int,
    whole: bool = False,
) -> Iterator[Evidence]:
    """``whole``: prompt and completion, whose end may be padded as well."""
    ids, mask = held.get("input_ids"), held.get("attention_mask")
    for key, tensor in (("input_ids", ids), ("attention_mask", mask)):
        if tensor is not None and tensor.dtype not in (ID_DTYPE, torch.bool):
            kind = str(tensor.dtype).removeprefix("torch.")
            yield Evidence(
                "batch",
                "dtype",
                f"{key} of {name} is {kind}, not int64",
                values={"key": key, "dtype": kind, "call": name},
            )
    if ids is None or ids.dim() != 2 or whole:
        return
    real = ids != pad
    for row, line in enumerate(real.tolist()):
        if not any(line):
            continue
        first, last = line.index(True), len(line) - 1 - line[::-1].index(True)
        if last < len(line) - 1:
            config = call is not None and call.padding_side == "right"
            yield Evidence(
                "batch",
                "padded-right",
                f"row {row} of {name} has {len(line) - 1 - last} padding tokens after its prompt: "
                "the completion would be generated after them",
                row=row,
                values={
                    "pads": len(line) - 1 - last, "side": call.padding_side if call else "",
                    "config": config, "keyword": _keyword(call, "padding_side"), "call": name,
                },
            )  # fmt: skip
            return
        if mask is None or mask.shape != ids.shape:
            continue
        seen = mask[row].bool().tolist()
        if any(seen[:first]) or not all(seen[first:]):
            yield Evidence(
                "batch",
                "mask-wrong",
                f"the mask of {name} keeps {sum(seen[:first])} padding tokens of row {row} and "
                f"hides {len(seen[first:]) - sum(seen[first:])} of its {len(seen) - first} tokens",
                row=row,
                values={
                    "kept": sum(seen[:first]),
                    "hidden": len(seen[first:]) - sum(seen[first:]),
                    "call": name,
                },
            )
            return


def _miscount(count: Counts, where: str, origin: Origin) -> Evidence:
    row = count.first_wrong
    got, want = sum(count.items), sum(count.tokens)
    more = "more features than tokens: the first are used, all later ones are shifted"
    less = "fewer features than tokens"
    why = more if got > want else less if got < want else "features of another row"
    return Evidence(
        "batch",
        "features-and-tokens",
        f"{where} has {got} {count.modality} features in {len(count.items)} items for {want} "
        f"{count.modality} placeholders; row {row} is the first that does not match ({why})",
        origin=origin,
        row=row,
        values={
            "modality": count.modality, "features": got, "tokens": want,
            "items": len(count.items), "by_row": count.tokens, "where": where,
        },
    )  # fmt: skip


def _exchanged(
    one: RenderedBatch, call: GenerateCall | ForwardCall, name: str, modality: Modality
) -> Evidence | None:
    """Grids in another order than the processor's, beside its own pixels in its own order."""
    grid, pixels = GRIDS[modality], PIXELS[modality]
    made = [processed.outputs for processed in one.processed]
    wanted, given = ([part[key] for part in made if key in part] for key in (grid, pixels))
    got, shown = call.inputs.get(grid), call.inputs.get(pixels)
    if got is None or shown is None or len(wanted) != len(given) or not wanted:
        return None
    want, held = torch.cat(wanted), torch.cat(given)
    if got.shape != want.shape or sorted(got.tolist()) != sorted(want.tolist()):
        return None
    if torch.equal(got, want) or not torch.equal(shown, held.to(shown.dtype)):
        return None
    at = int((got != want).any(1).nonzero()[0])
    sizes = [" x ".join(map(str, grids[at].tolist())) for grids in (got, want)]
    return Evidence(
        "batch",
        "grids-exchanged",
        f"{grid} of {name} has the processor's grids in another order, beside its {pixels} in its "
        f"own: item {at} is cut as {sizes[0]}, and was made as {sizes[1]}",
        values={"modality": modality, "call": name, "grid": grid, "pixels": pixels},
    )


def _input_right(call: ProcessorCall, case: Case) -> Origin:
    """``added`` where texts and media match, so that the processor's keywords are to blame."""
    if given_rows(call, case) is not None or flag_wrong(call, case):
        return "added"
    return "unknown"


def _counted(held: Mapping[str, Tensor], policy: Policy) -> Sequence[Counts]:
    return counts_of(held, policy) if "input_ids" in held else ()


def _keyword(call: ProcessorCall | None, name: str) -> Any:
    if call is None:
        return None
    inner = call.keywords.get("text_kwargs")
    return call.keywords.get(name, inner.get(name) if isinstance(inner, Mapping) else None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


LOOKS: tuple[Look, ...] = (
    look_keywords,
    *flags.LOOKS,
    look_expanded,
    look_resized,
    look_padding,
    look_seconds,
    look_placeholders,
    look_raised,
)
