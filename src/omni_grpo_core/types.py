"""The value types of the project, small and frozen.

The pipeline is ``sample -> conversation -> text -> media -> batch -> embeddings -> positions ->
logits -> completion -> parsed -> reward -> advantage -> loss -> gradient``. Each stage is a plain
function from the values below to a new one; no value is filled in later.

Shape letters: ``B`` rows, ``L`` padded prompt length, ``N`` completions (``B * G``), ``G``
completions per group, ``C`` padded completion length, ``V`` vocabulary, ``H`` hidden size, ``T``
frames. Tensors are torch tensors; torch is imported only for type checking, so that
``import omni_grpo_core`` stays fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args

if TYPE_CHECKING:
    from torch import Tensor

Modality = Literal["image", "video", "audio"]
AudioInVideo = Literal["interleaved", "separate", "off"]
AudioInVideos = AudioInVideo | tuple[AudioInVideo, ...]
"""One decision for all videos of a sample or, where they differ, one for each, in reading order."""
ProblemType = Literal[
    "multiple choice",
    "numerical",
    "OCR",
    "free-form",
    "regression",
    "emer_ov",
    "emer_ov_mc",
    "judge",
]
FinishReason = Literal["stop", "length"]
Stage = Literal[
    "config",
    "sample",
    "conversation",
    "text",
    "media",
    "batch",
    "policy",
    "embeddings",
    "positions",
    "logits",
    "completion",
    "parsed",
    "reward",
    "advantage",
    "loss",
    "gradient",
    "trace",
]

MODALITIES: tuple[Modality, ...] = get_args(Modality)
PROBLEM_TYPES: tuple[ProblemType, ...] = get_args(ProblemType)
STAGES: tuple[Stage, ...] = get_args(Stage)
MADE_STAGES: tuple[Stage, ...] = tuple(s for s in STAGES if s not in ("config", "policy", "trace"))
"""Those at which a pass or a training step makes a value; at the others only errors occur."""

AUDIO_SAMPLING_RATE = 16_000
"""Hz. Every waveform in the project has this rate: the Whisper features of Qwen-Omni need it."""


def audio_words(decided: AudioInVideos) -> str:
    """The decision as shown to people.

    >>> audio_words("off"), audio_words(("interleaved", "off"))
    ('off', 'interleaved, off')
    """
    return decided if isinstance(decided, str) else ", ".join(decided)


# --------------------------------------------------------------------------- sample


@dataclass(frozen=True, slots=True)
class MediaRef:
    """A file that a sample gives to the model, or a stretch of it."""

    modality: Modality
    """What the file is read as."""
    path: str
    """Path or URL, as the data has it."""
    start: float | None = None
    """Seconds from the beginning of the file; ``None`` is its beginning."""
    end: float | None = None
    """Seconds from the beginning of the file; ``None`` is its end."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a data set: a question, its media, and the gold answer."""

    sample_id: str
    """Unique within a data set; the group id of the sample's completions."""
    question: str
    """The question alone, without options or instructions."""
    problem_type: ProblemType
    """The kind of answer, which decides how it is scored."""
    options: tuple[str, ...]
    """As the data has them (``"A. red"``); empty for an open question."""
    solution: str
    """The gold completion; its answer is inside ``<answer>`` tags."""
    media: tuple[MediaRef, ...]
    """The media, in the order in which the model gets them."""
    origin: str
    """File and row, for error messages."""


# --------------------------------------------------------------------------- conversation, text


@dataclass(frozen=True, slots=True)
class TextPart:
    """A stretch of text inside a message."""

    text: str
    """As rendered, without the template's own tokens."""


@dataclass(frozen=True, slots=True)
class MediaPart:
    """A medium inside a message."""

    ref: MediaRef
    """The file."""
    from_video: bool = False
    """Whether it is an audio item that is a video's own track."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    """The speaker."""
    parts: tuple[TextPart | MediaPart, ...]
    """Text and media, in reading order."""


@dataclass(frozen=True, slots=True)
class Dialogue(Sample):
    """A row whose question follows earlier turns, or with a system message of its own."""

    history: tuple[Message, ...]
    """What comes before the question; its media are the first of ``media``."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of one sample and the one decision on how a video's audio reaches the model."""

    sample_id: str
    """The sample that it is made from."""
    messages: tuple[Message, ...]
    """In order; the last one is the user's."""
    audio_in_video: AudioInVideos
    """Decided once here and carried in the data. ``interleaved``: the track is inside its video
    (processor and positions get ``use_audio_in_video=True``). ``separate``: the track is an audio
    item of its own (as in HumanOmniV2). ``off``: there is no track or it is not wanted."""

    @property
    def media(self) -> tuple[MediaPart, ...]:
        """Every medium of the conversation, in reading order."""
        return tuple(p for m in self.messages for p in m.parts if isinstance(p, MediaPart))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation rendered by the chat template, generation prompt included."""

    sample_id: str
    """The sample that it asks about."""
    text: str
    """With unexpanded placeholders: one for each medium."""
    placeholders: Mapping[Modality, int]
    """How many unexpanded placeholders of each modality ``text`` has."""


# --------------------------------------------------------------------------- media


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """One decoded picture."""

    pixels: Tensor
    """uint8, (3, height, width), RGB, already resized for the model."""


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """Sampled frames of one clip."""

    frames: Tensor
    """float32, (T, 3, height, width), RGB in 0..255, already resized for the model."""
    sample_fps: float
    """Frames of ``frames`` per second of clip; this, not the requested fps, decides the time
    positions."""
    source_fps: float
    """Average rate of the file, frames per second."""
    duration: float
    """Seconds of the clip."""


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """One decoded waveform."""

    samples: Tensor
    """float32, (n,), mono, 16 kHz, in -1..1."""
    from_video: int | None = None
    """Index of the video in which this track is *interleaved*, else ``None``."""


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """The decoded media of one sample, each modality in reading order."""

    sample_id: str
    """The sample that they belong to."""
    images: tuple[Image, ...]
    """Pictures."""
    videos: tuple[Video, ...]
    """Clips."""
    audios: tuple[Audio, ...]
    """Waveforms, including videos' own tracks."""
    decoder: str
    """Decoder and version (``"pyav 18.1.0"``): part of a trace because another decoder gives
    different frames."""


# --------------------------------------------------------------------------- batch


@dataclass(frozen=True, slots=True)
class Span:
    """A run of placeholder tokens that one media item fills."""

    modality: Modality
    """The item's modality."""
    item: int
    """Counted within the row and modality; an interleaved video and its audio have several spans
    each."""
    start: int
    """In tokens, from the first non-padding token of the row."""
    length: int
    """In tokens."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Row:
    """One processed sample, without padding."""

    sample_id: str
    """The sample that it is made from."""
    input_ids: Tensor
    """int64, (length,), placeholders expanded."""
    audio_in_video: AudioInVideos
    """The conversation's decision, which the positions need too."""
    spans: tuple[Span, ...]
    """Runs of placeholders, in token order."""
    tensors: Mapping[str, Tensor]
    """What the model takes besides the ids, by its keyword: ``pixel_values`` (patches, patch_dim)
    with ``image_grid_thw`` (images, 3), ``pixel_values_videos`` with ``video_grid_thw`` (videos, 3)
    and ``video_second_per_grid`` (videos,), ``input_features`` (audios, mels, frames) with
    ``feature_attention_mask`` (audios, frames). An absent modality has no key."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows collated for the model, left-padded."""

    rows: tuple[Row, ...]
    """The B rows, in batch order."""
    input_ids: Tensor
    """int64, (B, L)."""
    attention_mask: Tensor
    """int64, (B, L): 0 on padding."""
    tensors: Mapping[str, Tensor]
    """The rows' tensors, each modality's items concatenated in row order (audio padded in time to
    the longest)."""

    @property
    def pads(self) -> tuple[int, ...]:
        """Padding tokens left of each row; ``span.start + pad`` indexes ``input_ids``."""
        width = self.input_ids.shape[1]
        return tuple(width - len(row.input_ids) for row in self.rows)


# --------------------------------------------------------------------------- model stages


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """The position of each token for the rotary embedding. int64, or float32 in a family with
    fractional time positions."""

    position_ids: Tensor
    """(3, B, L): time, height, width."""
    deltas: Tensor
    """(B,): by how much a row's next position exceeds its number of non-padding tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """What enters the first text layer."""

    inputs_embeds: Tensor
    """(B, L, H)."""
    features: tuple[tuple[Tensor, ...], ...]
    """Per row and span, the tower's features for exactly that span, (span.length, H), in the order
    of ``Row.spans``."""


@dataclass(frozen=True, slots=True, eq=False)
class DeepstackEmbeddings(Embeddings):
    """What enters a text model that takes in vision features at several layers."""

    deepstack: tuple[Tensor, ...]
    """For each of the first text layers, what is added after it at the placeholders of images and
    videos, (those placeholders, H), row after row, in token order."""


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """Logits of the prefill."""

    values: Tensor
    """float32, (B, V): logits of the token after the prompt."""


# --------------------------------------------------------------------------- rollout


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion, as raw ids."""

    group_id: str
    """The sample's id."""
    index: int
    """Within the group, from 0."""
    token_ids: tuple[int, ...]
    """With the final eos and every special token: ``skip_special_tokens`` would hide a stray
    ``<|im_start|>``."""
    text: str
    """Decoded with special tokens kept, without the final eos."""
    finish_reason: FinishReason
    """``length``: the cap was hit before an eos."""
    logprobs: tuple[float, ...]
    """Log-probability of each token at the sampling temperature; empty if they were not kept."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """The completions of a batch, and how they were sampled."""

    completions: tuple[Completion, ...]
    """G for every row, rows in batch order (1 1 2 2, not 1 2 1 2)."""
    group_size: int
    """G, completions per row."""
    temperature: float
    """0 is greedy."""
    seed: int
    """Seed of the random numbers, which are drawn per group."""


# --------------------------------------------------------------------------- parsed, reward


@dataclass(frozen=True, slots=True)
class Section:
    """Text of one tag pair: ``completion[start:end] == text``."""

    text: str
    """The content, tags excluded."""
    start: int
    """Offset of the content's first character in the completion."""
    end: int
    """Offset just after its last character."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A completion of the form ``<context>…</context><think>…</think><answer>…</answer>``."""

    context: Section
    """What is seen and heard."""
    think: Section
    """The reasoning."""
    answer: Section
    """The answer that rewards read."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """A completion that does not have the requested form."""

    what: str
    """What is wrong, for a human reader."""
    where: int
    """Offset of the character at which it is wrong."""


@dataclass(frozen=True, slots=True)
class Score:
    """One reward of one completion."""

    value: float | None
    """In [0, 1], or ``None`` where it could not be scored; a failure is never 0.0."""
    reason: str
    """Why, for a human reader."""


# --------------------------------------------------------------------------- check, trace


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked at a stage, and what was found."""

    name: str
    """What was checked, the same in every pass."""
    ok: bool
    """Whether it holds."""
    detail: str
    """What was found, with its values."""


@dataclass(frozen=True, slots=True)
class RowSeen:
    """What a failed check saw in one row of the batch."""

    row: int
    """Its number."""
    sentence: str
    """What was found and what was wanted, with the values."""
    values: Mapping[str, Any]
    """The same as plain data, for reports."""


@dataclass(frozen=True, slots=True)
class Disagreement:
    """What a rollout engine does otherwise than the trainer."""

    stage: Stage
    """The stage to blame."""
    name: str
    """What should hold: the name of the failed check."""
    detail: str
    """What was seen."""
    proved: bool = True
    """Whether this cause reproduces it; otherwise it is what is left, as no other one does."""
    rows: tuple[RowSeen, ...] = ()
    """Row by row, those that show it."""


@dataclass(frozen=True, slots=True)
class EngineSeen:
    """What the proof of agreement saw of a rollout engine."""

    name: str
    """Name, version and place of the engine."""
    prompt_ids: tuple[tuple[int, ...], ...]
    """What it read of each row, after its own expansion of placeholders."""
    disagreements: tuple[Disagreement, ...]
    """Empty where it reads, scores and samples as the trainer does."""


Value_co = TypeVar("Value_co", covariant=True)


@dataclass(frozen=True, slots=True, eq=False)
class StageRecord(Generic[Value_co]):
    """What a pass, or a recorded trainer, produced at one stage."""

    stage: Stage
    """The stage of the pipeline."""
    value: Value_co
    """A value of this module, a tuple or mapping of them, or a call of
    :mod:`omni_grpo_core.trace.calls`."""
    checks: tuple[Check, ...]
    """What was checked; empty in a recording."""
    seconds: float
    """Wall-clock time."""

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What one pass of the pipeline produced, stage by stage, for a few samples."""

    header: Mapping[str, str]
    """What the pass ran with: versions, model, device, dtype, decoder."""
    stages: tuple[StageRecord[object], ...]
    """In order; a recording may hold a stage several times."""

    def __getitem__(self, stage: Stage) -> StageRecord[object]:
        for record in self.stages:
            if record.stage == stage:
                return record
        raise KeyError(stage)
