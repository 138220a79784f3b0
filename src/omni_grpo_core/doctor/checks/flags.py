"""Looks at the audio-in-video flag of every call, and at whose sound a decoded track is."""

from __future__ import annotations

import re
from collections.abc import Iterator

from omni_grpo_core.core.batch import placeholder_ids
from omni_grpo_core.doctor.call_rows import is_interleaved
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Origin
from omni_grpo_core.doctor.rendered import RenderedBatch, flag_of, rendered_batches
from omni_grpo_core.doctor.replay.batch import carried, totals
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall, ProcessorCall


def look_flag(case: Case) -> Iterator[Evidence]:
    """The audio-in-video flag of the processor fits its texts and media; that of generate and every
    forward fits the tokens that they are given."""
    for one in rendered_batches(case):
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
            elif flag_wrong(call, case):
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
        # left out means False; in a forward that is the positions' affair, see checks/positions
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


def flag_wrong(call: ProcessorCall, case: Case) -> bool:
    """Whether the processor's flag contradicts the texts and media that it was given."""
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
    wrong = any(flag_wrong(call, case) for call in case.processed)
    return "inherited" if wrong else "added"


def _model_calls(case: Case) -> list[tuple[str, GenerateCall | ForwardCall, str]]:
    return [call for one in rendered_batches(case) for call in calls_of(one)]


def calls_of(one: RenderedBatch) -> list[tuple[str, GenerateCall | ForwardCall, str]]:
    """The model's calls on a batch, each with its name in messages and its kind."""
    return [
        *(("generate", call, "generate") for call in one.generated),
        *(("the scoring forward", call, "forward") for call in one.forwards),
    ]


def _said(told: bool | None) -> str:
    return "nothing (which means False)" if told is None else str(told)


LOOKS: tuple[Look, ...] = (look_flag, look_mute_beside_heard, look_track_owners)
