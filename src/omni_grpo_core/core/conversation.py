"""Sample -> Conversation: the messages, and how a video's audio reaches the model.

The audio-in-video decision is made here, once per sample, and carried in the data. Every later
stage reads it from there; none takes a flag of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from omni_grpo_core.errors import ConversationError
from omni_grpo_core.types import (
    AudioInVideo,
    Check,
    Conversation,
    MediaPart,
    MediaRef,
    Message,
    ProblemType,
    Sample,
    TextPart,
)

AudioPreference = Literal["auto", "interleaved", "separate", "off"]

SYSTEM_PROMPT = (
    "You answer questions about what you see, hear and read. "
    "First describe what matters for the question inside <context> </context>. "
    "Then reason inside <think> </think>. "
    "Last, give the final answer alone inside <answer> </answer>."
)

INSTRUCTIONS: Mapping[ProblemType, str] = {
    "multiple choice": "Answer with the letter of the one right option.",
    "numerical": "Answer with one number in digits.",
    "OCR": "Answer with exactly the text that is shown.",
    "free-form": "Answer in one or two short sentences.",
    "regression": "Answer with your best estimate as one number in digits.",
    "emer_ov": "Answer with the words that name the emotions, separated by commas.",
    "emer_ov_mc": "Answer with the letters of all right options, separated by commas.",
    "judge": "Answer with Yes or No.",
}


def decide_audio_in_video(
    sample: Sample, preference: AudioPreference, tracks: Mapping[str, bool]
) -> AudioInVideo:
    """How the audio of a sample's videos reaches the model.

    ``tracks``: for each video path, whether the file has an audio track. ``auto`` follows the row:
    an audio item listed beside the video means ``separate`` (as in HumanOmniV2), an unlisted track
    is ``interleaved``, no track is ``off``. A clip without a track is ``off`` whatever the
    preference.

    Raises:
        ConversationError: ``interleaved`` where a clip is also listed as an audio item (its track
            would be counted twice), or where only some of the sample's videos have a track (the
            processor takes one flag for all of them).
    """
    videos = [ref.path for ref in sample.media if ref.modality == "video"]
    if not videos:
        return "off"
    audios = [ref.path for ref in sample.media if ref.modality == "audio"]
    listed = {_same_file(path) for path in audios} & {_same_file(path) for path in videos}
    with_track = [path for path in videos if tracks[path]]
    if preference == "interleaved":
        if listed:
            raise ConversationError(
                f"sample {sample.sample_id} ({sample.origin})",
                got=f"{min(listed)} listed as video and as audio while audio-in-video is "
                "interleaved: the track would be counted twice",
                want="the clip listed once",
                fix="drop the audio item, or set audio-in-video to 'separate'",
            )
        if with_track and len(with_track) < len(videos):
            silent = next(path for path in videos if not tracks[path])
            raise ConversationError(
                f"sample {sample.sample_id} ({sample.origin})",
                got=f"{len(with_track)} of {len(videos)} videos with an audio track ({silent} has "
                "none) while audio-in-video is interleaved",
                want="a track in every video of the sample, or in none",
                fix="set audio-in-video to 'separate' for this data",
            )
        return "interleaved" if with_track else "off"
    if preference == "off":
        return "separate" if listed else "off"
    if audios:
        return "separate"
    if preference == "separate":
        return "separate" if with_track else "off"
    if len(with_track) == len(videos):
        return "interleaved"
    return "separate" if with_track else "off"


def build_conversation(
    sample: Sample, *, audio_in_video: AudioPreference = "auto", tracks: Mapping[str, bool]
) -> Conversation:
    """The system and user messages that ask a sample's question.

    Media come first, in the row's order; under ``separate`` a track that the row did not list is
    added as an audio item right after its video. The text states truthfully which media are there.

    Raises:
        ConversationError: see :func:`decide_audio_in_video`.
    """
    mode = decide_audio_in_video(sample, audio_in_video, tracks)
    media = _media_parts(sample, mode, tracks)
    lines = [_present(media, mode), sample.question, *sample.options]
    lines.append(INSTRUCTIONS[sample.problem_type])
    return Conversation(
        sample_id=sample.sample_id,
        messages=(
            Message("system", (TextPart(SYSTEM_PROMPT),)),
            Message("user", (*media, TextPart("\n".join(lines)))),
        ),
        audio_in_video=mode,
    )


def check_conversation(sample: Sample, conversation: Conversation) -> tuple[Check, ...]:
    """What must hold between a sample and its conversation."""
    asked = [
        part.text
        for message in conversation.messages
        if message.role == "user"
        for part in message.parts
        if isinstance(part, TextPart)
    ]
    shown = {part.ref for part in conversation.media}
    missing = [ref.path for ref in sample.media if ref not in shown]
    roles = [message.role for message in conversation.messages]
    return (
        Check("question asked", any(sample.question in text for text in asked), sample.question),
        Check("media all shown", not missing, ", ".join(missing) or f"{len(shown)} items"),
        Check("roles", roles == ["system", "user"], " ".join(roles)),
    )


def _media_parts(
    sample: Sample, mode: AudioInVideo, tracks: Mapping[str, bool]
) -> tuple[MediaPart, ...]:
    videos = {_same_file(ref.path) for ref in sample.media if ref.modality == "video"}
    has_audio_items = any(ref.modality == "audio" for ref in sample.media)
    parts: list[MediaPart] = []
    for ref in sample.media:
        parts.append(MediaPart(ref, ref.modality == "audio" and _same_file(ref.path) in videos))
        unlisted = ref.modality == "video" and not has_audio_items and tracks[ref.path]
        if mode == "separate" and unlisted:
            parts.append(MediaPart(MediaRef("audio", ref.path, ref.start, ref.end), True))
    return tuple(parts)


def _present(media: tuple[MediaPart, ...], mode: AudioInVideo) -> str:
    """One sentence on what the model is given: a model ignores audio if the prompt denies it."""
    kinds = [part.ref.modality for part in media]
    names: list[str] = []
    if "image" in kinds:
        names.append(_count(kinds.count("image"), "image", "an"))
    if "video" in kinds:
        video = _count(kinds.count("video"), "video", "a")
        names.append(f"{video} with sound" if mode == "interleaved" else video)
    if "audio" in kinds:
        names.append(_count(kinds.count("audio"), "audio recording", "an"))
    if not names:
        return "You are given text only."
    if "video" in kinds and mode != "interleaved" and "audio" not in kinds:
        names[-1] += " without sound"
    return f"You are given {' and '.join(names)}."


def _count(number: int, noun: str, article: str) -> str:
    return f"{article} {noun}" if number == 1 else f"{number} {noun}s"


def _same_file(path: str) -> str:
    return str(Path(path).resolve())
