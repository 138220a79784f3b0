"""Looks at processor calls and at what is handed from them to the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from omni_grpo_core.core.batch import ID_DTYPE, placeholder_ids
from omni_grpo_core.doctor.call_rows import PIXELS, Counts, counts_of, is_interleaved
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Origin, say_missing
from omni_grpo_core.doctor.replay.batch import carried, given_rows, is_token_sized, sides, totals
from omni_grpo_core.doctor.replay.text import collapsed, marks
from omni_grpo_core.doctor.rounds import Round, flag_of, rounds
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall, ProcessorCall
from omni_grpo_core.types import MODALITIES

if TYPE_CHECKING:
    from torch import Tensor

    from omni_grpo_core.core.policy import Policy


def look_keywords(case: Case) -> Iterator[Evidence]:
    """No keyword is thrown away."""
    for call in case.processed:
        for name in call.ignored:
            yield Evidence(
                "batch",
                "keyword-ignored",
                f"the processor was given {name}=, which nothing in it takes: it was dropped "
                "with a warning at most",
                values={"keyword": name, "value": _short(call.keywords.get(name))},
            )


def look_raised(case: Case) -> Iterator[Evidence]:
    """The processor came to an end."""
    for one in rounds(case):
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
                # texts and media that fit together are right input
                origin="added" if agrees or _flag_wrong(call, case) else "unknown",
                values={"error": call.error},
            )


def look_flag(case: Case) -> Iterator[Evidence]:
    """The audio-in-video flag of the processor fits its texts and media; that of generate and every
    forward fits the tokens that they are given."""
    for one in rounds(case):
        for call in one.processed:
            if sounds_for_nothing(call, case):
                count = totals(call, case)
                yield Evidence(
                    "batch",
                    "media-not-for-text",
                    f"the processor was handed {len(call.audios)} sounds for {count['audio']} "
                    "audio placeholders, with audio-in-video off in every call: the first ones "
                    "are taken, all after them are another's",
                    values={
                        "modality": "audio",
                        "given": len(call.audios),
                        "want": count["audio"],
                    },
                )
            elif _flag_wrong(call, case):
                told = flag_of(call.keywords)
                count = totals(call, case)
                yield Evidence(
                    "batch",
                    "flag-differs",
                    f"the processor was told audio-in-video {_said(told)} with "
                    f"{count['video']} videos, {count['audio']} audio placeholders and "
                    f"{len(call.audios)} sounds: these need {not told}",
                    values={"call": "processor", "told": told, "want": not told},
                )
    if case.reference is None:
        return
    policy = case.reference.policy
    for name, model_call, _ in _model_calls(case):
        ids = model_call.inputs.get("input_ids")
        if ids is None or not bool((ids == placeholder_ids(policy.processor)["video"]).any()):
            continue
        want = any(is_interleaved(row, policy) for row in ids.tolist())
        told = flag_of(model_call.keywords)
        # left out means False; in a forward that is the positions' affair, see looks_positions
        if bool(told) == want or (told is None and name != "generate"):
            continue
        yield Evidence(
            "batch",
            "flag-differs",
            f"{name} was told audio-in-video {_said(told)}, its tokens have the sound "
            f"{'inside the videos' if want else 'outside the videos'}, as the processor laid them",
            origin=_flag_origin(case),
            values={"call": name, "told": told, "want": want},
        )


def look_mute_beside_heard(case: Case) -> Iterator[Evidence]:
    """With audio-in-video on, every clip of a call of the model has its sound inside: the model
    counts clips by their sound, and one without is passed over."""
    if case.reference is None:
        return
    policy = case.reference.policy
    video = placeholder_ids(policy.processor)["video"]
    for name, call, _ in _model_calls(case):
        ids = call.inputs.get("input_ids")
        if ids is None or not flag_of(call.keywords):
            continue
        clips = [n for n, row in enumerate(ids.tolist()) if video in row]
        mute = [n for n in clips if not is_interleaved(ids[n].tolist(), policy)]
        # all of them: the flag is wrong, which another look says
        if not mute or len(mute) == len(clips):
            continue
        yield Evidence(
            "batch",
            "mute-beside-heard",
            f"{name} was told audio-in-video True for {len(clips)} rows with a clip, and row "
            f"{mute[0]} is the first of {len(mute)} whose clip has no sound inside: it is passed "
            "over, and later rows take its grid",
            row=mute[0],
            values={"call": name, "mute": len(mute), "clips": len(clips)},
        )


def look_track_owners(case: Case) -> Iterator[Evidence]:
    """A processor that refuses decoded tracks was told whose they are."""
    for call in case.processed:
        if call.error is None or not _unowned(call.error):
            continue
        told = call.keywords.get("audio_from_video_indices")
        if told is None and flag_of(call.keywords) and call.audios and call.videos:
            yield Evidence(
                "batch",
                "tracks-unowned",
                f"the processor was handed {len(call.audios)} sounds beside {len(call.videos)} "
                "videos with audio-in-video on and without audio_from_video_indices, and raised "
                f"{call.error.strip().rstrip(':')}",
                values={"audios": len(call.audios), "videos": len(call.videos)},
            )


def _unowned(error: str) -> bool:
    """What transformers says from 5.23 on: the one with audio items in the text, the other
    without."""
    return "audio_from_video_indices" in error or bool(
        re.search(r"Found total 0 \S+ tokens and \d+ audio inputs", error)
    )


def look_resized(case: Case) -> Iterator[Evidence]:
    """Pictures that come resized for the model are not resized again."""
    for call in case.processed:
        for kind, media, key in (
            ("video", call.videos, "video_grid_thw"),
            ("image", call.images, "image_grid_thw"),
        ):
            grids = call.outputs.get(key)
            if grids is None or len(grids) != len(media):
                continue
            for index, (medium, grid) in enumerate(zip(media, grids.tolist(), strict=True)):
                if not medium.shape or not is_token_sized(medium):
                    continue
                (high, wide), patch = sides(medium), _patch(case)
                if (grid[1] * patch, grid[2] * patch) == (high, wide):
                    continue
                times = grid[1] * grid[2] * patch * patch / (high * wide)
                yield Evidence(
                    "batch",
                    "resized-again",
                    f"{kind} {index} came as {high} x {wide} pixels and left the processor as "
                    f"{grid[1] * patch} x {grid[2] * patch}: {times:.3g} times the tokens",
                    values={
                        "got": (grid[1] * patch, grid[2] * patch), "want": (high, wide),
                        "times": times, "do_resize": call.keywords.get("do_resize"),
                    },
                )  # fmt: skip
                break


def look_expanded(case: Case) -> Iterator[Evidence]:
    """Texts come with one placeholder a medium; expanding them is the processor's work."""
    names = marks(case)
    for call in case.processed:
        for row, text in enumerate(call.texts):
            if collapsed(text, names) != text:
                counts = {m: text.count(names[m][1]) for m in MODALITIES if names[m][1] in text}
                yield Evidence(
                    "batch",
                    "expanded-twice",
                    f"prompt {row} reached the processor with its placeholders expanded already: "
                    + ", ".join(f"{n} {m}" for m, n in counts.items()),
                    row=row,
                    values={"counts": counts},
                )
                break


def look_padding(case: Case) -> Iterator[Evidence]:
    """Prompts are padded on the left, the mask says where, and ids and mask are int64."""
    if case.reference is None:
        return
    pad = case.reference.policy.pad_token_id
    for one in rounds(case):
        outputs = [("the processor", call, call.outputs) for call in one.processed]
        found = [e for name, call, held in outputs for e in _padding(name, call, held, pad)]
        yield from found
        wrong = {e.fact for e in found}
        for name, model_call, own in _calls_of(one):
            made = list(_padding(name, None, model_call.inputs, pad, whole=own == "forward"))
            yield from (e for e in made if e.fact not in wrong)


def look_placeholders(case: Case) -> Iterator[Evidence]:
    """Placeholders against features: for every modality, in total and row by row."""
    if case.reference is None:
        say_missing(case, "no checkpoint: placeholders were not counted, nothing was replayed")
        return
    policy = case.reference.policy
    for one in rounds(case):
        wrong: set[str] = set()
        for call in one.processed:
            for count in _counted(call.outputs, policy):
                if not count.agree:
                    wrong.add(count.modality)
                    yield _miscount(count, "the processor's output", _input_right(call, case))
        for name, model_call, _ in _calls_of(one):
            for count in _counted(model_call.inputs, policy):
                lost = PIXELS[count.modality] not in {*model_call.inputs, *model_call.large}
                # media that were not passed on are told as such
                if not count.agree and count.modality not in wrong and not lost:
                    wrong.add(count.modality)
                    yield _miscount(count, f"what {name} was given", "added")


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
                "the completion would be generated behind them",
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
                f"hides {len(seen[first:]) - sum(seen[first:])} of its {len(seen) - first} own",
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
    more = "more features than tokens: the first are taken, all after it are shifted"
    less = "fewer features than tokens"
    told = more if got > want else less if got < want else "features of another row"
    return Evidence(
        "batch",
        "features-and-tokens",
        f"{where} holds {got} {count.modality} features in {len(count.items)} items for {want} "
        f"{count.modality} placeholders; row {row} is the first that does not fit ({told})",
        origin=origin,
        row=row,
        values={
            "modality": count.modality, "features": got, "tokens": want,
            "items": len(count.items), "by_row": count.tokens, "where": where,
        },
    )  # fmt: skip


def _input_right(call: ProcessorCall, case: Case) -> Origin:
    """Whether texts and media went in right, so that the processor's keywords are to blame."""
    if given_rows(call, case) is not None or _flag_wrong(call, case):
        return "added"
    return "unknown"


def _flag_wrong(call: ProcessorCall, case: Case) -> bool:
    how, told = carried(call, case), bool(flag_of(call.keywords))
    count = totals(call, case)
    if how == "contradictory" or not count["video"] or how == ("interleaved" if told else "apart"):
        return False
    # no sound at all, while it was to come out of the videos: it was lost before
    return bool(call.audios) or not told


def sounds_for_nothing(call: ProcessorCall, case: Case) -> bool:
    """Sound is listed on its own and no call means to take any out of the videos, and yet there is
    one more for each video."""
    later = [*(c.keywords for c in case.generated), *(c.keywords for c in case.forwards)]
    off = not any(map(flag_of, (call.keywords, *later)))
    return off and carried(call, case) == "interleaved" and totals(call, case)["audio"] > 0


def _flag_origin(case: Case) -> Origin:
    """A processor that was told wrong laid the tokens wrong: the model's own flag is then right."""
    wrong = any(_flag_wrong(call, case) for call in case.processed)
    return "inherited" if wrong else "added"


def _model_calls(case: Case) -> list[tuple[str, GenerateCall | ForwardCall, str]]:
    return [call for one in rounds(case) for call in _calls_of(one)]


def _calls_of(one: Round) -> list[tuple[str, GenerateCall | ForwardCall, str]]:
    return [
        *(("generate", call, "generate") for call in one.generated),
        *(("the scoring forward", call, "forward") for call in one.forwards),
    ]


def _counted(held: Mapping[str, Tensor], policy: Policy) -> Sequence[Counts]:
    return counts_of(held, policy) if "input_ids" in held else ()


def _patch(case: Case) -> int:
    if case.reference is None:
        return 14
    return int(case.reference.policy.processor.image_processor.patch_size)


def _keyword(call: ProcessorCall | None, name: str) -> Any:
    if call is None:
        return None
    inner = call.keywords.get("text_kwargs")
    return call.keywords.get(name, inner.get(name) if isinstance(inner, Mapping) else None)


def _said(told: bool | None) -> str:
    return "nothing (which means False)" if told is None else str(told)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


LOOKS: tuple[Look, ...] = (
    look_keywords,
    look_flag,
    look_mute_beside_heard,
    look_track_owners,
    look_expanded,
    look_resized,
    look_padding,
    look_placeholders,
    look_raised,
)
