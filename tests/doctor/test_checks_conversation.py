"""Looks at conversations, on recordings of a few lines."""

from __future__ import annotations

from typing import Any

import pytest
from doctor_recordings import (
    SYSTEM,
    case,
    facts,
    medium,
    only,
    processed,
    rendered,
    samples,
    template,
    user,
)

from omni_grpo_core.doctor.checks import conversation as looks
from omni_grpo_core.doctor.diagnose import diagnose

ROW = {"problem": "Which way?", "path": "a.mp4", "data_type": "video", "options": ["A. left"]}
ASKED = "Which way?\nA. left"


def step(*parts: str, row: Any = ROW, question: str = ASKED, system: Any = SYSTEM, **call: Any):  # type: ignore[no-untyped-def]
    messages = [*([system] if system else []), user(*parts, question=question)]
    text = rendered(messages)
    return case(samples(row), template(*messages), processed(text, text, **call))


def test_a_right_conversation_is_no_evidence() -> None:
    right = step("video a.mp4", flag=True)
    assert [e for look in looks.LOOKS for e in look(right)] == []


def test_a_clip_listed_twice_while_interleaved() -> None:
    """Rows 4 and 13 of the incident: 1 video, 2 audios."""
    given: Any = {"videos": (medium("video"),) * 2, "audios": (medium("audio"),) * 4}
    twice = step("video a.mp4", "audio a.mp4", flag=True, **given)
    found = only(looks.look_media_twice, twice)
    assert "2 sounds for 1 track" in found.sentence
    assert found.values["file"] == "a.mp4"
    [finding] = diagnose(twice).findings
    assert finding.stage == "conversation"
    assert finding.causes[0].cause == "conv.media-twice"
    assert "drop one" in finding.causes[0].fix


def test_a_clip_listed_twice_is_right_where_its_sound_is_an_item() -> None:
    row = {**ROW, "path": {"video": "a.mp4", "audio": "a.mp4"}}
    separate = step("video a.mp4", "audio a.mp4", row=row, flag=False)
    assert [e for look in looks.LOOKS for e in look(separate)] == []


@pytest.mark.parametrize("words", ["a video without sound", "a silent clip", "There is no audio."])
def test_sound_that_the_text_denies(words: str) -> None:
    denied = step("video a.mp4", question=f"{words} {ASKED}", flag=True)
    assert facts(looks.look_sound_denied, denied) == ["sound-denied"]
    assert facts(looks.look_sound_denied, step("video a.mp4", question=f"{words} {ASKED}")) == []


def test_another_rows_question_and_media() -> None:
    other = step("video b.mp4", question="How many?")
    assert facts(looks.look_questions, other) == ["question-differs"]
    assert facts(looks.look_media_listed, other) == ["media-not-shown", "media-foreign"]


def test_one_conversation_too_many() -> None:
    mine, strange = (
        template(SYSTEM, user("video a.mp4", question=ASKED)),
        template(SYSTEM, user("video z.mp4", question="Who?")),
    )
    found = only(looks.look_number, case(samples(ROW, ROW), mine, mine, strange, processed("")))
    assert found.fact == "row-foreign"
    assert "z.mp4" in found.sentence


def test_an_audio_item_that_is_left_out() -> None:
    row = {**ROW, "path": {"video": "a.mp4", "audio": "a.wav"}}
    found = only(looks.look_media_listed, step("video a.mp4", row=row))
    assert found.fact == "audio-not-shown"


def test_arrays_in_rows_are_not_paths() -> None:
    row = {"problem": "Which way?", "videos": ("<tensor float32 (4, 3, 56, 56)>",)}
    assert facts(looks.look_media_listed, step("video a.mp4", row=row)) == []


def test_options_that_are_not_shown() -> None:
    found = only(looks.look_options, step("video a.mp4", question="Which way?"))
    assert found.values["options"] == ["left"]
    assert facts(looks.look_options, step("video a.mp4", question="Which way? (a) left")) == []


def test_a_gold_in_the_prompt() -> None:
    row = {**ROW, "solution": "<answer>A</answer>"}
    shown = step("video a.mp4", row=row, question=f"{ASKED}\n<answer>A</answer>")
    assert facts(looks.look_gold, shown) == ["gold-shown"]
    short = {**ROW, "solution": "A"}
    assert facts(looks.look_gold, step("video a.mp4", row=short)) == [], "'A' occurs in any text"


@pytest.mark.parametrize(
    ("system", "fact"),
    [
        (None, "system-missing"),
        ({"role": "system", "content": "Be brief."}, "instructions-changed"),
    ],
)
def test_a_prompt_that_does_not_ask_for_the_tags(system: Any, fact: str) -> None:
    row = {**ROW, "solution": "<answer>A</answer>"}
    assert facts(looks.look_instructions, step("video a.mp4", row=row, system=system)) == [fact]
    bare = {**ROW, "solution": "A"}
    assert facts(looks.look_instructions, step("video a.mp4", row=bare, system=system)) == []


def test_a_track_that_one_clip_of_the_batch_lost(tmp_path: Any) -> None:
    from omni_grpo_core import tiny

    folder = tiny.data_file().parent
    with_track, silent_film = folder / "clip-00.mp4", folder / "clip-10.mp4"
    heard = template(SYSTEM, user(f"video {folder / 'clip-01.mp4'}", f"audio {folder / 'x.wav'}"))
    for path, found in ((with_track, ["track-not-given"]), (silent_film, [])):
        mute = template(SYSTEM, user(f"video {path}"))
        both = case(samples(ROW, ROW), heard, mute, processed("", "", audios=(medium("audio"),)))
        assert facts(looks.look_sound_lost, both) == found
