"""Looks at the audio-in-video flag of every call, and at which video a decoded track is from."""

from __future__ import annotations

import re
from collections.abc import Iterator

from omni_grpo_core.core.batch import placeholder_ids
from omni_grpo_core.doctor.bundles import ids_in
from omni_grpo_core.doctor.call_rows import is_interleaved
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Origin, note_judged
from omni_grpo_core.doctor.rendered import RenderedBatch, flag_of, rendered_batches
from omni_grpo_core.doctor.replay.batch import audio_route, totals
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall, ProcessorCall


def look_flag(case: Case) -> Iterator[Evidence]:
    """The processor's audio-in-video flag matches its texts and media; that of generate and every
    forward matches their tokens."""
    for one in rendered_batches(case):
        for call in one.processed:
            if extra_sounds(call, case):
                count = totals(call, case)
                yield Evidence(
                    "batch",
                    "media-not-for-text",
                    f"the processor was passed {len(call.audios)} sounds for {count['audio']} "
                    "audio placeholders, with audio-in-video off in every call: placeholders get "
                    "the first ones, some from other rows",
                    values={
                        "modality": "audio",
                        "given": len(call.audios),
                        "want": count["audio"],
                    },
                )
            elif flag_wrong(call, case):
                flag = flag_of(call.keywords)
                count = totals(call, case)
                yield Evidence(
                    "batch",
                    "flag-differs",
                    f"the processor was called {_as_passed(flag)} on "
                    f"{count['video']} videos, {count['audio']} audio placeholders and "
                    f"{len(call.audios)} sounds: these need {not flag}",
                    values={"call": "processor", "told": flag, "want": not flag},
                )
    if case.reference is None:
        return
    policy = case.reference.policy
    for name, model_call, _ in _model_calls(case):
        ids = ids_in(model_call)
        if ids is None or not bool((ids == placeholder_ids(policy.processor)["video"]).any()):
            continue
        note_judged(case, "batch")
        want = any(is_interleaved(row, policy) for row in ids.tolist())
        flag = flag_of(model_call.keywords)
        # left out means False; in a forward that is reported by checks/positions
        if bool(flag) == want or (flag is None and name != "generate"):
            continue
        yield Evidence(
            "batch",
            "flag-differs",
            f"{name} was called {_as_passed(flag)}; the processor laid out its tokens with the "
            f"sound {'inside' if want else 'outside'} the videos",
            origin=_flag_origin(case, flag),
            values={"call": name, "told": flag, "want": want},
        )


def look_mute_beside_heard(case: Case) -> Iterator[Evidence]:
    """With audio-in-video on, every clip of a model call has its sound inside: the model counts
    clips by their sound, and skips one without."""
    if case.reference is None:
        return
    policy = case.reference.policy
    video = placeholder_ids(policy.processor)["video"]
    for name, call, _ in _model_calls(case):
        ids = ids_in(call)
        if ids is None or not flag_of(call.keywords):
            continue
        clips = [n for n, row in enumerate(ids.tolist()) if video in row]
        mute = [n for n in clips if not is_interleaved(ids[n].tolist(), policy)]
        # all of them: the flag is wrong, which another look reports
        if not mute or len(mute) == len(clips):
            continue
        yield Evidence(
            "batch",
            "mute-beside-heard",
            f"{name} was called {_as_passed(True)} for {len(clips)} rows with a clip, and row "
            f"{mute[0]} is the first of {len(mute)} whose clip has no sound inside: it is "
            "skipped, and later rows take its grid",
            row=mute[0],
            values={"call": name, "mute": len(mute), "clips": len(clips)},
        )


def look_track_owners(case: Case) -> Iterator[Evidence]:
    """A processor that rejects unclaimed tracks is told which video each track is from."""
    for call in case.processed:
        if call.error is None or not _unowned(call.error):
            continue
        owners = call.keywords.get("audio_from_video_indices")
        if owners is None and flag_of(call.keywords) and call.audios and call.videos:
            yield Evidence(
                "batch",
                "tracks-unowned",
                f"the processor was passed {len(call.audios)} sounds and {len(call.videos)} "
                "videos with audio-in-video on and without audio_from_video_indices, and raised "
                f"{call.error.strip().rstrip(':')}",
                values={"audios": len(call.audios), "videos": len(call.videos)},
            )


def _unowned(error: str) -> bool:
    """The errors of transformers from 5.23 on: the first with audio items in the text, the second
    without."""
    return "audio_from_video_indices" in error or bool(
        re.search(r"Found total 0 \S+ tokens and \d+ audio inputs", error)
    )


def flag_wrong(call: ProcessorCall, case: Case) -> bool:
    """Whether the processor's flag contradicts its texts and media."""
    how, flag = audio_route(call, case), bool(flag_of(call.keywords))
    count = totals(call, case)
    if how == "contradictory" or not count["video"] or how == ("interleaved" if flag else "items"):
        return False
    # no sound at all although it should come from the videos: it was lost earlier
    return bool(call.audios) or not flag


def extra_sounds(call: ProcessorCall, case: Case) -> bool:
    """Whether sound is listed separately, audio-in-video is off in every call, and yet there is one
    more sound for each video."""
    later = [*(c.keywords for c in case.generated), *(c.keywords for c in case.forwards)]
    off = not any(map(flag_of, (call.keywords, *later)))
    return off and audio_route(call, case) == "interleaved" and totals(call, case)["audio"] > 0


def _flag_origin(case: Case, flag: bool | None) -> Origin:
    """``inherited`` where the processor's flag is wrong, or is this one and its layout does not
    follow it: then so is the layout, not this flag. A rollout of an earlier step was laid out
    there."""
    made = case.processed
    while not made and case.before is not None:
        case = case.before
        made = case.processed
    if not made:
        return "unknown"
    wrong = any(flag_wrong(call, case) for call in made)
    same = all(bool(flag_of(call.keywords)) == bool(flag) for call in made)
    return "inherited" if wrong or same else "added"


def _model_calls(case: Case) -> list[tuple[str, GenerateCall | ForwardCall, str]]:
    return [call for one in rendered_batches(case) for call in calls_of(one)]


def calls_of(one: RenderedBatch) -> list[tuple[str, GenerateCall | ForwardCall, str]]:
    """The model's calls on a batch, each with its name in messages and its kind."""
    return [
        *(("generate", call, "generate") for call in one.generated),
        *(("the scoring forward", call, "forward") for call in one.forwards),
    ]


def _as_passed(flag: bool | None) -> str:
    return f"{'without' if flag is None else 'with'} use_audio_in_video" + (
        " (default False)" if flag is None else f"={flag}"
    )


LOOKS: tuple[Look, ...] = (look_flag, look_mute_beside_heard, look_track_owners)
