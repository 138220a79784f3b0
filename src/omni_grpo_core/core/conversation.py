"""Sample -> Conversation: the messages, and how a video's audio reaches the model.

The audio-in-video decision is made here, once per sample, and carried in the data. Every later
stage reads it from there; none takes a flag of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from omni_grpo_core.errors import ConversationError
from omni_grpo_core.types import (
    MODALITIES,
    AudioInVideo,
    AudioInVideos,
    Check,
    Conversation,
    Dialogue,
    MediaPart,
    MediaRef,
    Message,
    Modality,
    ProblemType,
    Sample,
    TextPart,
)

AudioPreference = Literal["auto", "interleaved", "separate", "off"]

_MARK = re.compile(r"<(image|video|audio)>")

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


def interleaves(decided: AudioInVideos, video: int) -> bool:
    """Whether the sound of one video, by its index in reading order, is interleaved with it.

    >>> interleaves("interleaved", 1), interleaves(("off", "interleaved"), 0)
    (True, False)
    """
    return (decided if isinstance(decided, str) else decided[video]) == "interleaved"


def decide_audio_in_video(
    sample: Sample, preference: AudioPreference, tracks: Mapping[str, bool]
) -> AudioInVideos:
    """How the audio of a sample's videos reaches the model.

    ``tracks``: for each video path, whether the file has an audio track. ``auto`` follows the row:
    an audio item listed beside the video means ``separate`` (as in HumanOmniV2), an unlisted track
    is ``interleaved``, no track is ``off``. A clip without a track is ``off`` whatever the
    preference: beside clips with one, each has a decision of its own.

    Raises:
        ConversationError: ``interleaved`` where a clip is also listed as an audio item: its track
            would be counted twice.
    """
    videos = [ref.path for ref in sample.media if ref.modality == "video"]
    if not videos:
        return "off"
    audios = [ref.path for ref in sample.media if ref.modality == "audio"]
    listed = {_same_file(path) for path in audios} & {_same_file(path) for path in videos}
    if preference == "interleaved" and listed:
        raise ConversationError(
            f"sample {sample.sample_id} ({sample.origin})",
            got=f"{min(listed)} listed as video and as audio while audio-in-video is "
            "interleaved: the track would be counted twice",
            want="the clip listed once",
            fix="drop the audio item, or set audio-in-video to 'separate'",
        )
    if preference == "off":
        return "separate" if listed else "off"
    if audios and preference != "interleaved":
        return "separate"
    if preference == "separate":
        return "separate" if any(tracks[path] for path in videos) else "off"
    each = tuple[AudioInVideo, ...]("interleaved" if tracks[path] else "off" for path in videos)
    return each[0] if len(set(each)) == 1 else each


def build_conversation(
    sample: Sample, *, audio_in_video: AudioPreference = "auto", tracks: Mapping[str, bool]
) -> Conversation:
    """The system and user messages that ask a sample's question.

    Media come first, in the row's order, unless the question marks their places with ``<image>``,
    ``<video>`` or ``<audio>``, one mark for each of that modality; under ``separate`` a track that
    the row did not list is added as an audio item right after its video. The text states
    truthfully which media are there. A row's earlier turns come before; its own system message
    before ours.

    Raises:
        ConversationError: see :func:`decide_audio_in_video`.
    """
    mode = decide_audio_in_video(sample, audio_in_video, tracks)
    history = sample.history if isinstance(sample, Dialogue) else ()
    own = history[0].parts if history and history[0].role == "system" else ()
    earlier = history[bool(own) :]
    add = _Tracks(sample, mode, tracks)
    earlier = tuple(replace(m, parts=tuple(add.beside(m.parts))) for m in earlier)
    asked = tuple(add.beside(_question(sample)))
    given = [p for m in earlier for p in m.parts if isinstance(p, MediaPart)]
    given += [part for part in asked if isinstance(part, MediaPart)]
    first = next((i for i, p in enumerate(asked) if isinstance(p, TextPart)), len(asked))
    last = "\n".join(("", *sample.options, INSTRUCTIONS[sample.problem_type]))
    return Conversation(
        sample_id=sample.sample_id,
        messages=(
            Message("system", _joined(*_ended(own), TextPart(SYSTEM_PROMPT))),
            *earlier,
            Message(
                "user",
                _joined(
                    *asked[:first],
                    TextPart(f"{_present(given, mode)}\n"),
                    *asked[first:],
                    TextPart(last),
                ),
            ),
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
    pieces = [part.text for part in _question(sample) if isinstance(part, TextPart)]
    shown = {part.ref for part in conversation.media}
    missing = [ref.path for ref in sample.media if ref not in shown]
    roles = [message.role for message in conversation.messages]
    turns = len(roles) % 2 == 0 and roles[1:] == ["user", "assistant"] * (len(roles) // 2 - 1) + [
        "user"
    ]
    return (
        Check(
            "question asked",
            all(any(piece in text for text in asked) for piece in pieces),
            sample.question,
        ),
        Check("media all shown", not missing, ", ".join(missing) or f"{len(shown)} items"),
        Check("roles", roles[:1] == ["system"] and turns, " ".join(roles)),
    )


def marks(text: str) -> tuple[Modality, ...]:
    """The media marks in a text, in order.

    >>> marks("Is <image> a frame of <video>?")
    ('image', 'video')
    """
    return tuple(cast(Modality, found) for found in _MARK.findall(text))


def _question(sample: Sample) -> list[TextPart | MediaPart]:
    """The question with its own media, not those of earlier turns."""
    history = sample.history if isinstance(sample, Dialogue) else ()
    shown = sum(isinstance(part, MediaPart) for message in history for part in message.parts)
    return _placed(sample.question, sample.media[shown:])


def _placed(question: str, media: Sequence[MediaRef]) -> list[TextPart | MediaPart]:
    """A question and its media: in the places of their marks, or else first."""
    marked = marks(question)
    counted = {m: marked.count(m) for m in MODALITIES}
    there = {m: [ref for ref in media if ref.modality == m] for m in MODALITIES}
    placed = {m for m in MODALITIES if counted[m] and counted[m] == len(there[m])}
    parts: list[TextPart | MediaPart] = [MediaPart(r) for r in media if r.modality not in placed]
    text = ""
    for index, piece in enumerate(_MARK.split(question)):  # text and mark in turn
        if index % 2 and piece in placed:
            parts += [TextPart(text)] if text else []
            parts.append(MediaPart(there[cast(Modality, piece)].pop(0)))
            text = ""
        else:
            text += f"<{piece}>" if index % 2 else piece
    return [*parts, TextPart(text)] if text else parts


@dataclass(frozen=True, slots=True)
class _Tracks:
    """Which of a sample's media are tracks of its videos."""

    sample: Sample
    mode: AudioInVideos
    tracks: Mapping[str, bool]

    def beside(self, parts: Iterable[TextPart | MediaPart]) -> Iterator[TextPart | MediaPart]:
        """``parts`` with the tracks that the row did not list, each right after its video."""
        media = self.sample.media
        videos = {_same_file(ref.path) for ref in media if ref.modality == "video"}
        listed = any(ref.modality == "audio" for ref in media)
        for part in parts:
            if isinstance(part, TextPart):
                yield part
                continue
            ref = part.ref
            yield replace(
                part, from_video=ref.modality == "audio" and _same_file(ref.path) in videos
            )
            unlisted = ref.modality == "video" and not listed and self.tracks[ref.path]
            if self.mode == "separate" and unlisted:
                yield MediaPart(MediaRef("audio", ref.path, ref.start, ref.end), True)


def _joined(*parts: TextPart | MediaPart) -> tuple[TextPart | MediaPart, ...]:
    """Adjacent texts as one."""
    joined: list[TextPart | MediaPart] = []
    for part in parts:
        before = joined[-1] if joined else None
        if isinstance(part, TextPart) and isinstance(before, TextPart):
            joined[-1] = TextPart(before.text + part.text)
        else:
            joined.append(part)
    return tuple(joined)


def _ended(parts: tuple[TextPart | MediaPart, ...]) -> tuple[TextPart | MediaPart, ...]:
    return (*parts, TextPart("\n")) if parts else ()


def _present(media: Sequence[MediaPart], mode: AudioInVideos) -> str:
    """One sentence on what the model is given: a model ignores audio if the prompt denies it."""
    kinds = [part.ref.modality for part in media]
    heard = sum(interleaves(mode, i) for i in range(kinds.count("video")))
    names: list[str] = []
    if "image" in kinds:
        names.append(_count(kinds.count("image"), "image", "an"))
    if "video" in kinds:
        video = _count(kinds.count("video"), "video", "a")
        if heard == kinds.count("video"):
            video += " with sound"
        elif heard:
            video += f", {heard} of them with sound"
        names.append(video)
    if "audio" in kinds:
        names.append(_count(kinds.count("audio"), "audio recording", "an"))
    if not names:
        return "You are given text only."
    if "video" in kinds and not heard and "audio" not in kinds:
        names[-1] += " without sound"
    return f"You are given {' and '.join(names)}."


def _count(number: int, noun: str, article: str) -> str:
    return f"{article} {noun}" if number == 1 else f"{number} {noun}s"


def _same_file(path: str) -> str:
    return str(Path(path).resolve())
