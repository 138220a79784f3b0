"""Looks at samples and conversations: each row's question is asked, with its own media."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omni_grpo_core.doctor.asked import (
    Asked,
    asked,
    carries_sound,
    golds_of,
    name_of,
    noted,
    rewarded,
)
from omni_grpo_core.doctor.bundles import rows_in
from omni_grpo_core.doctor.continuity import misplaced
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged, quoted
from omni_grpo_core.doctor.rendered import (
    RenderedBatch,
    RenderedPrompt,
    flag_of,
    paths_of,
    question_of,
    rendered_batches,
)
from omni_grpo_core.doctor.replay import media as replay_media
from omni_grpo_core.doctor.rollouts import Completion

_NO_SOUND = re.compile(
    r"\b(?:without (?:any )?(?:sound|audio)|(?:there is|has|with|is) no (?:sound|audio)"
    r"|(?:silent|muted) (?:video|clip))\b(?![^.!?\n]*\?)",
    re.IGNORECASE,
)
"""A statement, not a question."""
_OPTION = re.compile(r"^\s*[(\[]?[A-Za-z][)\].:]\s*")
_LABEL = re.compile(r"(?:.*<answer>)?\s*[(\[]?[A-Za-z][)\].]?\s*(?:</answer>\s*)?", re.DOTALL)
_LONG_ENOUGH = 12
"""Characters from which a text in a prompt is no coincidence: "A" occurs in any text."""
_WORD = re.compile(r"\w+")
_FEW = 3
"""Words of a question that says anything by itself."""
_TAG = re.compile(r"<\s*(\w+)\s*>")


def look_questions(case: Case) -> Iterator[Evidence]:
    """No conversation asks another row's question."""
    known = {question_of(one.row) for one in noted(case)}
    for one in noted(case):
        wanted, said = question_of(one.row), one.prompt.text_of("user")
        if wanted is None:
            continue
        note_judged(case, "conversation")
        other = next((q for q in known if q and q in said), None)
        if wanted not in said and other is not None:
            yield Evidence(
                "conversation",
                "question-differs",
                f"conversation {one.prompt.number} does not ask its row's question {wanted!r} but "
                f"{other!r}",
                row=one.prompt.number,
                values={"wanted": wanted, "asked": other},
            )


def look_copies(case: Case) -> Iterator[Evidence]:
    """All completions of one row answer one prompt: not one of a group another.

    Rows whose columns are equal by chance have groups of equal size.
    """
    if misplaced(case):
        return  # they are another row's only where they are rewarded
    rows: dict[str, list[Completion]] = {}
    for one in rewarded(case):
        if one.row and one.completion is not None:
            columns = json.dumps(one.row, sort_keys=True, default=str)
            rows.setdefault(columns, []).append(one.completion)
    words = {one.completion: one.prompt.text_of("user") for one in rewarded(case)}
    for members in rows.values():
        prompts = Counter(completion.prompt.key for completion in members)
        usual, number = prompts.most_common(1)[0]
        if number > 1:
            note_judged(case, "conversation")
        for completion in members:
            key = completion.prompt.key
            if key == usual or number < 2 or prompts[key] > 1 or not _made_so(case, completion):
                continue
            first = next(other for other in members if other.prompt.key == usual)
            said = "the same words about other media"
            if key[0] != usual[0]:
                said = f"{words[completion][-80:]!r} instead of {words[first][-80:]!r}"
            yield Evidence(
                "conversation",
                "row-foreign",
                f"{number} of {len(members)} completions that are rewarded as answers to one row "
                f"answer one prompt; completion {completion.at} answers another: {said}",
                row=completion.at,
                values={"copies": len(members), "asked": words[completion]},
            )


def _made_so(case: Case, completion: Completion) -> bool:
    """Whether a processor made this prompt in its place: rows exchanged later are another fault."""
    fed = [row.key for row in rows_in(case, completion.call)]
    made = [[row.key for row in rows_in(case, call)] for call in case.processed]
    return fed in (*made, [key for keys in made for key in keys])


def _strings(value: Any) -> Iterator[str]:
    """All texts in a row, those in its lists too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for held in value.values():
            yield from _strings(held)
    elif isinstance(value, list | tuple):
        for held in value:
            yield from _strings(held)


def look_media_listed(case: Case) -> Iterator[Evidence]:
    """No conversation has another row's media, or lacks what others of its kind have."""
    everyone = noted(case)  # columns of rewards may themselves be another row's
    known = {name_of(path) for one in everyone for _, path in paths_of(one.row)}
    heard = any(r.modality == "audio" for one in everyone for r in one.prompt.media)
    for one in everyone:
        listed = paths_of(one.row)
        own = {name_of(path) for _, path in listed}
        shown = [(ref.modality, name_of(ref.path)) for ref in one.prompt.media]
        for kind, name in shown if listed else ():
            note_judged(case, "conversation")
            if name in known and name not in own:
                yield Evidence(
                    "conversation",
                    "media-foreign",
                    f"conversation {one.prompt.number} has {kind} {name}, which belongs to another "
                    "row of the batch",
                    row=one.prompt.number,
                    values={"file": name, "modality": kind},
                )
        if one.sounds or any(kind == "audio" for kind, _ in shown) or not shown:
            continue
        for modality, path in listed:
            if modality == "audio":
                yield Evidence(
                    "conversation",
                    "audio-not-shown",
                    f"the row lists audio {name_of(path)}; its conversation {one.prompt.number} "
                    f"has {_listed(shown)}",
                    row=one.prompt.number,
                    values={"file": name_of(path), "modality": modality, "shown": shown},
                    # a run without any sound was meant so
                    severity="breaks" if heard else "differs",
                )


def look_media_twice(case: Case) -> Iterator[Evidence]:
    """A clip whose sound is interleaved must not also be listed as audio."""
    for one in rendered_batches(case):
        if not any(flag_of(call.keywords) for call in one.processed):
            continue
        for prompt in one.prompts:
            videos = {name_of(r.path) for r in prompt.media if r.modality == "video"}
            twice = [name_of(r.path) for r in prompt.media if r.modality == "audio"]
            for name in dict.fromkeys(n for n in twice if n in videos and not n.startswith("<")):
                yield Evidence(
                    "conversation",
                    "media-twice",
                    f"{name} is listed as video and as audio in conversation {prompt.number} while "
                    f"audio-in-video is on: {1 + twice.count(name)} sounds for 1 track",
                    row=prompt.number,
                    values={"file": name, "audios": 1 + twice.count(name)},
                )


def look_sound_denied(case: Case) -> Iterator[Evidence]:
    """A conversation whose text denies sound has none."""
    for one in rendered_batches(case):
        for prompt in one.prompts:
            denial = _NO_SOUND.search(prompt.text_of("user"))
            kinds = [ref.modality for ref in prompt.media]
            inside = carries_sound(one) and any(
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
                        f"{name_of(ref.path)} has an audio track, but conversation "
                        f"{prompt.number} passes it without sound, and {len(heard)} other clips of "
                        "the batch with",
                        row=prompt.number,
                        values={"file": name_of(ref.path)},
                    )


def look_instructions(case: Case) -> Iterator[Evidence]:
    """A prompt asks for the tags that its row's gold has."""
    for one in asked(case):
        golds = [text for text in _strings(one.row) if _TAG.search(text)]
        tags = {tag for text in golds for tag in _TAG.findall(text) if f"</{tag}>" in text}
        if not tags:
            continue
        if case.templates and one.batch is None:
            continue  # a prompt that lost its turns, or its begin, after it was rendered
        note_judged(case, "conversation")
        system = one.prompt.text_of("system")
        if any(tag in system + one.prompt.text_of("user") for tag in tags):
            continue
        has_one = any(message.get("role") == "system" for message in one.prompt.messages)
        yield Evidence(
            "conversation",
            "instructions-changed" if has_one else "system-missing",
            f"the system message of conversation {one.prompt.number} is {system[:60]!r}: nothing "
            "asks for the tags that its gold has"
            if has_one
            else f"conversation {one.prompt.number} has no system message, and nothing in it asks "
            "for the tags that its gold has",
            row=one.prompt.number,
            values={"system": system},
            severity="differs",
        )


def _answers(options: Sequence[object]) -> list[str]:
    """Options without the letters before them."""
    return [_OPTION.sub("", str(option)).strip() for option in options]


def _said(one: Asked) -> str:
    return one.prompt.text_of("user") + one.prompt.text_of("system")


def look_options(case: Case) -> Iterator[Evidence]:
    """Options of which the gold names one by its letter are in the conversation, in any form."""
    everything = "".join(str(one.prompt.text) for one in asked(case))
    for one in asked(case):
        options = one.row.get("options")
        if not isinstance(options, list | tuple) or len(options) < 2:
            continue
        letters = any(_LABEL.fullmatch(text) for text in golds_of(one.row))
        words, said = _answers(options), _said(one)
        question = question_of(one.row) or ""
        # a question may itself mention an option
        rest = said.replace(question, "", 1)
        note_judged(case, "conversation")
        # another prompt shows them where columns came in another order
        elsewhere = all(word in everything for word in words)
        if letters and not elsewhere and not any(word and word in rest for word in words):
            yield Evidence(
                "conversation",
                "options-missing",
                f"conversation {one.prompt.number} shows none of its row's {len(options)} options "
                f"{words!r}, and its gold is the letter of one",
                row=one.prompt.number,
                values={"options": words},
            )


def look_question_lost(case: Case) -> Iterator[Evidence]:
    """A prompt that shows its row's options asks its question too, in whatever words."""
    everything = "".join(str(one.prompt.text) for one in rewarded(case))
    for one in rewarded(case):
        question, options = question_of(one.row) or "", one.row.get("options")
        wanted = set(_WORD.findall(question.casefold()))
        if len(wanted) < _FEW or not isinstance(options, list | tuple) or not options:
            continue
        if question in everything:
            continue  # here, or in another prompt where columns came in another order
        words, said = _answers(options), _said(one)
        if not all(word and word in said for word in words):
            continue
        left = said
        for word in words:
            left = left.replace(word, "")
        note_judged(case, "conversation")
        if 2 * len(wanted & set(_WORD.findall(left.casefold()))) < len(wanted):
            yield Evidence(
                "conversation",
                "question-missing",
                f"conversation {one.prompt.number} shows its row's options and not its question, "
                f"{quoted(question)}",
                row=one.prompt.number,
                values={"wanted": question},
            )


def look_option_letters(case: Case) -> Iterator[Evidence]:
    """Options stand beside the letters that they have in the row: its gold is one of them."""
    shown = [
        {*map(str.strip, other.prompt.text_of("user").splitlines())} for other in rewarded(case)
    ]
    for one in () if misplaced(case) else rewarded(case):
        options = one.row.get("options")
        if not isinstance(options, list | tuple):
            continue
        told = {str(option).strip() for option in options}
        if any(told <= seen for seen in shown):
            continue  # by this prompt, or by another one where columns came in another order
        lines = {line.strip() for line in one.prompt.text_of("user").splitlines()}
        parts = [(_OPTION.match(text), text) for text in told]
        letters = {found.group(): text[found.end() :] for found, text in parts if found}
        words = set(letters.values())
        if len(letters) != len(options) or len(words) < len(letters):
            continue
        others = {
            line
            for line in lines
            if (found := _OPTION.match(line)) and found.group() in letters
            and line[found.end() :] in words - {letters[found.group()]}
        }  # fmt: skip
        if len(others) > 1 and len(others) == len(letters) - len(told & lines):
            first = min(others)
            label = first[: len(first) - len(_OPTION.sub("", first))]
            yield Evidence(
                "conversation",
                "options-permuted",
                f"conversation {one.prompt.number} shows {first!r} where its row has "
                f"{label + letters[label]!r}: its gold is a letter of the row's",
                row=one.prompt.number,
                values={"options": sorted(told)},
            )


def look_gold(case: Case) -> Iterator[Evidence]:
    """No conversation gives its row's gold: as the assistant's answer, or a whole completion."""
    for one in asked(case):
        for gold in golds_of(one.row):
            whole = len(gold) >= _LONG_ENOUGH and bool(_TAG.search(gold))
            answered = [m for m in one.prompt.messages if m.get("role") == "assistant"]
            note_judged(case, "conversation")
            role = next(
                (r for r in ("user", "system") if whole and gold in one.prompt.text_of(r)),
                "assistant" if answered and gold in _words(answered[-1]) else None,
            )
            # the answer of an example before the question is not this question's
            if role == "assistant" and one.prompt.messages[-1] is not answered[-1]:
                role = "assistant" if whole else None
            if role is not None:
                yield Evidence(
                    "conversation",
                    "gold-shown",
                    f"conversation {one.prompt.number} contains its row's gold in the {role} turn: "
                    f"{gold[:60]!r}",
                    row=one.prompt.number,
                    values={"role": role},
                )


def _words(message: Mapping[str, Any]) -> str:
    return RenderedPrompt(0, (message,), None).text_of(str(message.get("role")))


def _heard(prompt: RenderedPrompt, one: RenderedBatch) -> bool:
    """Whether a clip's sound is passed, as an item or inside the video."""
    kinds = [ref.modality for ref in prompt.media]
    return "audio" in kinds or (carries_sound(one) and not _NO_SOUND.search(prompt.text_of("user")))


def _listed(shown: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{kind} {name}" for kind, name in shown) or "no media"


LOOKS: tuple[Look, ...] = (
    look_questions,
    look_copies,
    look_options,
    look_question_lost,
    look_option_letters,
    look_gold,
    look_media_listed,
    look_media_twice,
    look_sound_denied,
    look_sound_lost,
    look_instructions,
)
