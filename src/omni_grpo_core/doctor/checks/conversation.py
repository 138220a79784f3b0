"""Looks at samples and conversations: each row's question is asked, with its own media."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Origin, note_judged
from omni_grpo_core.doctor.rendered import (
    RenderedBatch,
    RenderedPrompt,
    flag_of,
    order_of,
    paths_of,
    question_of,
    rendered_batches,
)
from omni_grpo_core.doctor.replay import media as replay_media

_NO_SOUND = re.compile(
    r"\b(?:without (?:any )?(?:sound|audio)|no (?:sound|audio)|silent (?:video|clip)|muted)\b",
    re.IGNORECASE,
)
_OPTION = re.compile(r"^\s*[(\[]?[A-Za-z][)\].:]\s*")
_LONG_ENOUGH = 12
"""Characters from which a gold in the prompt is no coincidence: "A" occurs in any text."""
_TAG = re.compile(r"<\s*(context|think|answer)\s*>")


def look_questions(case: Case) -> Iterator[Evidence]:
    """Each conversation asks its own row's question."""
    for one in rendered_batches(case):
        questions = [question_of(row) for row in one.rows]
        for row, prompt in _pairs(one):
            wanted = question_of(row)
            if wanted is None:
                continue
            note_judged(case, "conversation")
            if wanted in prompt.text_of("user"):
                continue
            asked = next((q for q in questions if q and q in prompt.text_of("user")), None)
            yield Evidence(
                "conversation",
                "question-differs",
                f"conversation {prompt.number} does not ask its row's question {wanted!r} but "
                f"{(asked or prompt.text_of('user')[-80:])!r}",
                row=prompt.number,
                values={"wanted": wanted, "asked": asked, "names": sorted(_names(prompt))},
            )


def look_media_listed(case: Case) -> Iterator[Evidence]:
    """A conversation has its row's media: no file lost, none from another row."""
    for one in rendered_batches(case):
        known = {_name(path) for row in one.rows for _, path in paths_of(row)}
        for row, prompt in _pairs(one):
            listed = paths_of(row)
            if any(ref.path.startswith("<") for ref in prompt.media):
                continue  # arrays in the messages: their row is unknown
            shown = [(ref.modality, _name(ref.path)) for ref in prompt.media]
            names = {name for _, name in shown}
            sounds = _carries_sound(one)
            for kind, path in listed:
                note_judged(case, "conversation")
                name = _name(path)
                inside = kind == "audio" and sounds and ("video", name) in shown
                if (kind, name) in shown or inside or (not kind and name in names):
                    continue
                fact = "audio-not-shown" if kind == "audio" else "media-not-shown"
                yield Evidence(
                    "conversation",
                    fact,
                    f"the row lists {kind} {name}; its conversation {prompt.number} has "
                    f"{_listed(shown)}",
                    row=prompt.number,
                    values={"file": name, "modality": kind, "shown": shown},
                )
            for kind, name in shown if listed or known else ():
                if name not in {_name(path) for _, path in listed}:
                    whose = "another row of the batch" if name in known else "no row of the batch"
                    yield Evidence(
                        "conversation",
                        "media-foreign",
                        f"conversation {prompt.number} has {kind} {name}, which belongs to {whose}",
                        row=prompt.number,
                        values={"file": name, "modality": kind},
                    )


def look_media_twice(case: Case) -> Iterator[Evidence]:
    """A clip whose sound is interleaved must not also be listed as audio."""
    for one in rendered_batches(case):
        calls = [call for call in one.processed if flag_of(call.keywords)]
        if not calls:
            continue
        for prompt in one.prompts:
            videos = {_name(r.path) for r in prompt.media if r.modality == "video"}
            twice = [_name(r.path) for r in prompt.media if r.modality == "audio"]
            for name in dict.fromkeys(n for n in twice if n in videos and not n.startswith("<")):
                yield Evidence(
                    "conversation",
                    "media-twice",
                    f"{name} is listed as video and as audio in conversation {prompt.number} while "
                    f"audio-in-video is on: {1 + twice.count(name)} sounds for 1 track",
                    origin=_origin(one, name),
                    row=prompt.number,
                    values={"file": name, "audios": 1 + twice.count(name)},
                )


def look_sound_denied(case: Case) -> Iterator[Evidence]:
    """A conversation whose text denies sound has none."""
    for one in rendered_batches(case):
        sounds = _carries_sound(one)
        for prompt in one.prompts:
            denial = _NO_SOUND.search(prompt.text_of("user"))
            kinds = [ref.modality for ref in prompt.media]
            inside = sounds and any(
                ref.modality == "video" and replay_media.has_track(ref.path) is not False
                for ref in prompt.media
            )
            if denial and (inside or "audio" in kinds):
                yield Evidence(
                    "conversation",
                    "sound-denied",
                    f"conversation {prompt.number} says {denial.group()!r} but passes the model "
                    f"{'the sound of its video' if inside else 'an audio item'}",
                    row=prompt.number,
                    values={"said": denial.group(), "how": "interleaved" if inside else "item"},
                )


def look_sound_lost(case: Case) -> Iterator[Evidence]:
    """No clip whose file has a track loses its sound while others of the batch keep theirs."""
    for one in rendered_batches(case):
        prompts = [
            prompt for prompt in one.prompts if any(r.modality == "video" for r in prompt.media)
        ]
        heard = {prompt.number for prompt in prompts if _heard(prompt, one)}
        for prompt in prompts if heard else ():
            if prompt.number in heard:
                continue
            for ref in prompt.media:
                if ref.modality == "video" and replay_media.has_track(ref.path):
                    yield Evidence(
                        "conversation",
                        "track-not-given",
                        f"{_name(ref.path)} has an audio track, but conversation {prompt.number} "
                        f"passes it without sound, and {len(heard)} other clips of the batch with",
                        row=prompt.number,
                        values={"file": _name(ref.path)},
                    )


def look_instructions(case: Case) -> Iterator[Evidence]:
    """The prompt asks for the tags that the rewards need, with one system message in all rows."""
    wanted = any(
        _TAG.search(str(row.get("solution", "")))
        for one in rendered_batches(case)
        for row in one.rows
    )
    prompts = [prompt for one in rendered_batches(case) for prompt in one.prompts]
    systems = {prompt.text_of("system") for prompt in prompts}
    for prompt in prompts if wanted else ():
        note_judged(case, "conversation")
        if _TAG.search(prompt.text_of("system")) or _TAG.search(prompt.text_of("user")):
            continue
        system = prompt.text_of("system")
        has_one = any(message.get("role") == "system" for message in prompt.messages)
        yield Evidence(
            "conversation",
            "instructions-changed" if has_one else "system-missing",
            f"the system message of conversation {prompt.number} is {system[:60]!r}: nothing asks "
            "for the tags that rewards need"
            if has_one
            else f"conversation {prompt.number} has no system message, and nothing in it asks for "
            "the tags that rewards need",
            row=prompt.number,
            values={"system": system},
        )
    if len(systems) > 1 and prompts:
        yield Evidence(
            "conversation",
            "systems-differ",
            f"{len(systems)} different system messages in one step: "
            + "; ".join(sorted(repr(s[:40]) for s in systems)),
            values={"systems": sorted(systems)},
        )


def look_options(case: Case) -> Iterator[Evidence]:
    """A row's options are in its conversation: at least one, in any form."""
    for one in rendered_batches(case):
        for row, prompt in _pairs(one):
            options = row.get("options")
            if not isinstance(options, list | tuple) or not options:
                continue
            words = [_OPTION.sub("", str(option)).strip() for option in options]
            asked, text = question_of(row) or "", prompt.text_of("user")
            # a question may itself mention an option
            rest = text.replace(asked, "", 1)
            if asked in text and not any(w and w in rest for w in words):
                yield Evidence(
                    "conversation",
                    "options-missing",
                    f"conversation {prompt.number} asks {question_of(row)!r} without any of its "
                    f"{len(options)} options {words!r}",
                    row=prompt.number,
                    values={"options": words},
                )


def look_gold(case: Case) -> Iterator[Evidence]:
    """No conversation contains its row's gold completion."""
    for one in rendered_batches(case):
        for row, prompt in _pairs(one):
            gold = row.get("solution")
            if not isinstance(gold, str) or len(gold) < _LONG_ENOUGH:
                continue
            role = next(
                (r for r in ("assistant", "user", "system") if gold.strip() in prompt.text_of(r)),
                None,
            )
            if role is not None:
                yield Evidence(
                    "conversation",
                    "gold-shown",
                    f"conversation {prompt.number} contains its row's gold completion in the "
                    f"{role} turn: {gold.strip()[:60]!r}",
                    row=prompt.number,
                    values={"role": role},
                )


def look_number(case: Case) -> Iterator[Evidence]:
    """One conversation per row, or the same number for each, and none without a row."""
    for one in rendered_batches(case):
        rows, prompts = len(one.rows), len(one.prompts)
        # a run that was killed while rendering has lost nothing yet
        if not rows or not prompts or not prompts % rows or not one.processed:
            continue
        strange = [
            prompt for prompt in one.prompts if not any(_fits(row, prompt) for row in one.rows)
        ]
        for prompt in strange:
            yield Evidence(
                "conversation",
                "row-foreign",
                f"conversation {prompt.number} has a question or media of no row of the batch: "
                f"{_listed([(r.modality, _name(r.path)) for r in prompt.media])}; {prompts} "
                f"conversations for {rows} rows",
                row=prompt.number,
                values={"names": sorted(_names(prompt)), "talks": prompts, "rows": rows},
            )
        if not strange:
            yield Evidence(
                "conversation",
                "rows-lost",
                f"{prompts} conversations for {rows} rows of the data set",
                values={"talks": prompts, "rows": rows},
            )


def _pairs(one: RenderedBatch) -> Sequence[tuple[Mapping[str, Any], RenderedPrompt]]:
    """Rows with their conversations, in the order that matches most of them."""
    orders = order_of(len(one.rows), len(one.prompts))
    best: list[tuple[Mapping[str, Any], RenderedPrompt]] = []
    most = -1
    for owners in orders.values():
        pairs = [(one.rows[o], prompt) for o, prompt in zip(owners, one.prompts, strict=True)]
        fit = sum(_fits(row, prompt) for row, prompt in pairs)
        if fit > most:
            best, most = pairs, fit
    return best


def _fits(row: Mapping[str, Any], prompt: RenderedPrompt) -> bool:
    """Whether a conversation asks a row's question about a row's media."""
    files = {_name(path) for _, path in paths_of(row)}
    same = bool(files & _names(prompt)) or not files
    return same and (question_of(row) or "") in prompt.text_of("user")


def _carries_sound(one: RenderedBatch) -> bool:
    """Whether a batch's processor was called with audio-in-video on."""
    return any(flag_of(call.keywords) for call in one.processed)


def _heard(prompt: RenderedPrompt, one: RenderedBatch) -> bool:
    """Whether a clip's sound is passed, as an item or inside the video."""
    kinds = [ref.modality for ref in prompt.media]
    return "audio" in kinds or (
        _carries_sound(one) and not _NO_SOUND.search(prompt.text_of("user"))
    )


def _origin(one: RenderedBatch, name: str) -> Origin:
    """``added`` even where the row lists the file twice: the conversation decides how sound is
    passed. ``unknown`` where no row was recorded."""
    return "added" if one.rows or name else "unknown"


def _names(prompt: RenderedPrompt) -> set[str]:
    return {_name(ref.path) for ref in prompt.media}


def _name(path: str) -> str:
    return PurePath(path).name or path


def _listed(shown: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{kind} {name}" for kind, name in shown) or "no media"


LOOKS: tuple[Look, ...] = (
    look_number,
    look_questions,
    look_options,
    look_gold,
    look_media_listed,
    look_media_twice,
    look_sound_denied,
    look_sound_lost,
    look_instructions,
)
