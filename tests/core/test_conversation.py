from __future__ import annotations

import pytest

from omni_grpo_core.core.conversation import (
    INSTRUCTIONS,
    SYSTEM_PROMPT,
    AudioPreference,
    build_conversation,
    check_conversation,
    decide_audio_in_video,
)
from omni_grpo_core.errors import ConversationError
from omni_grpo_core.types import (
    PROBLEM_TYPES,
    AudioInVideos,
    MediaPart,
    MediaRef,
    Sample,
    TextPart,
)

VIDEO = MediaRef("video", "/clips/a.mp4")
SILENT = MediaRef("video", "/clips/silent.mp4")
TRACK = MediaRef("audio", "/clips/a.mp4")
WAV = MediaRef("audio", "/clips/a.wav")
IMAGE = MediaRef("image", "/clips/a.png")
TRACKS = {"/clips/a.mp4": True, "/clips/silent.mp4": False}


def sample(*media: MediaRef) -> Sample:
    return Sample(
        sample_id="s1",
        question="Which colour?",
        problem_type="multiple choice",
        options=("A. red", "B. blue"),
        solution="<answer>A</answer>",
        media=media,
        origin="rows.json row 0",
    )


@pytest.mark.parametrize(
    ("media", "preference", "decision"),
    [
        ((VIDEO,), "auto", "interleaved"),
        ((VIDEO,), "interleaved", "interleaved"),
        ((VIDEO,), "separate", "separate"),
        ((VIDEO,), "off", "off"),
        ((SILENT,), "auto", "off"),
        ((SILENT,), "interleaved", "off"),
        ((SILENT,), "separate", "off"),
        ((VIDEO, TRACK), "auto", "separate"),
        ((VIDEO, TRACK), "separate", "separate"),
        ((VIDEO, TRACK), "off", "separate"),
        ((VIDEO, WAV), "auto", "separate"),
        ((VIDEO, SILENT), "auto", ("interleaved", "off")),
        ((VIDEO, SILENT), "interleaved", ("interleaved", "off")),
        ((SILENT, SILENT), "auto", "off"),
        ((VIDEO, SILENT), "separate", "separate"),
        ((VIDEO, SILENT), "off", "off"),
        ((IMAGE,), "interleaved", "off"),
        ((WAV,), "interleaved", "off"),
        ((), "interleaved", "off"),
    ],
)
def test_the_decision_is_made_from_the_row_the_preference_and_the_tracks(
    media: tuple[MediaRef, ...], preference: AudioPreference, decision: AudioInVideos
) -> None:
    assert decide_audio_in_video(sample(*media), preference, TRACKS) == decision


def test_a_clip_listed_as_video_and_audio_is_refused_when_interleaved() -> None:
    """In the incident "1 video, 2 audios" was counted and nobody noticed: the file was listed as an
    audio item and its track was interleaved too. Accuracy fell to .53 with nothing raised."""
    with pytest.raises(ConversationError, match=r"s1.*counted twice.*drop the audio item"):
        build_conversation(sample(VIDEO, TRACK), audio_in_video="interleaved", tracks=TRACKS)


def test_another_spelling_of_the_same_path_is_the_same_file() -> None:
    other = MediaRef("audio", "/clips/../clips/a.mp4")
    with pytest.raises(ConversationError, match="counted twice"):
        build_conversation(sample(VIDEO, other), audio_in_video="interleaved", tracks=TRACKS)


def test_separate_adds_the_track_right_after_its_video() -> None:
    conversation = build_conversation(sample(VIDEO), audio_in_video="separate", tracks=TRACKS)
    assert conversation.media == (MediaPart(VIDEO), MediaPart(TRACK, from_video=True))


def test_separate_keeps_the_stretch_of_the_clip() -> None:
    clip = MediaRef("video", "/clips/a.mp4", 1.0, 3.5)
    conversation = build_conversation(sample(clip), audio_in_video="separate", tracks=TRACKS)
    assert conversation.media[1].ref == MediaRef("audio", "/clips/a.mp4", 1.0, 3.5)


def test_separate_does_not_add_a_track_that_the_row_lists() -> None:
    conversation = build_conversation(sample(VIDEO, TRACK), tracks=TRACKS)
    assert conversation.media == (MediaPart(VIDEO), MediaPart(TRACK, from_video=True))


@pytest.mark.parametrize(
    ("media", "preference", "sentence"),
    [
        ((VIDEO,), "auto", "You are given a video with sound."),
        ((VIDEO,), "separate", "You are given a video and an audio recording."),
        ((VIDEO,), "off", "You are given a video without sound."),
        ((SILENT,), "auto", "You are given a video without sound."),
        ((WAV,), "auto", "You are given an audio recording."),
        ((IMAGE, IMAGE), "auto", "You are given 2 images."),
        ((IMAGE, VIDEO), "auto", "You are given an image and a video with sound."),
        ((), "auto", "You are given text only."),
    ],
)
def test_the_text_is_true_about_what_is_present(
    media: tuple[MediaRef, ...], preference: AudioPreference, sentence: str
) -> None:
    conversation = build_conversation(sample(*media), audio_in_video=preference, tracks=TRACKS)
    text = conversation.messages[1].parts[-1]
    assert isinstance(text, TextPart)
    assert text.text == (
        f"{sentence}\nWhich colour?\nA. red\nB. blue\n"
        "Answer with the letter of the one right option."
    )


def test_every_problem_type_has_its_own_instruction() -> None:
    assert set(INSTRUCTIONS) == set(PROBLEM_TYPES)
    assert len(set(INSTRUCTIONS.values())) == len(PROBLEM_TYPES)


def test_the_system_prompt_names_the_three_tags_in_order() -> None:
    places = [SYSTEM_PROMPT.index(tag) for tag in ("<context>", "<think>", "<answer>")]
    assert places == sorted(places)


def test_check_finds_a_conversation_of_another_sample() -> None:
    asked = build_conversation(sample(VIDEO), tracks=TRACKS)
    assert all(check.ok for check in check_conversation(sample(VIDEO), asked))
    failed = [c.name for c in check_conversation(sample(IMAGE), asked) if not c.ok]
    assert failed == ["media all shown"]
