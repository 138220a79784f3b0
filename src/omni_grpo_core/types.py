"""Every noun of the project, small and frozen.

The pipeline is ``sample -> conversation -> text -> media -> batch -> embeddings -> positions ->
logits -> completion -> parsed -> reward -> advantage -> loss -> gradient``. Each stage is a plain
function from the values below to a new one; nothing is filled in afterwards.

Shape letters: ``B`` rows, ``L`` padded prompt length, ``N`` completions (``B * G``), ``G``
completions per group, ``C`` padded completion length, ``V`` vocabulary, ``H`` hidden size, ``T``
frames. Tensors are torch tensors; torch is only imported for type checking so that
``import omni_grpo_core`` stays fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

Modality = Literal["image", "video", "audio"]
AudioInVideo = Literal["interleaved", "separate", "off"]
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
AUDIO_IN_VIDEO: tuple[AudioInVideo, ...] = get_args(AudioInVideo)
PROBLEM_TYPES: tuple[ProblemType, ...] = get_args(ProblemType)
STAGES: tuple[Stage, ...] = get_args(Stage)

AUDIO_SAMPLING_RATE = 16_000
"""Hz. Every waveform of the project has this rate: the Whisper features of Qwen-Omni need it."""


# --------------------------------------------------------------------------- sample


@dataclass(frozen=True, slots=True)
class MediaRef:
    """A file that a sample shows to the model, or a stretch of it.

    ``start`` and ``end`` are seconds from the beginning of the file; ``None`` means its own
    beginning or end.
    """

    modality: Modality
    path: str
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a data set: a question, what may be looked at and heard, and the gold answer.

    ``sample_id`` is unique within a data set and is the group id of the sample's completions.
    ``options`` are kept as the data has them (``"A. red"``). ``solution`` is the gold completion;
    its answer stands inside ``<answer>`` tags. ``origin`` says file and row, for error messages.
    """

    sample_id: str
    question: str
    problem_type: ProblemType
    options: tuple[str, ...]
    solution: str
    media: tuple[MediaRef, ...]
    origin: str


# --------------------------------------------------------------------------- conversation, text


@dataclass(frozen=True, slots=True)
class TextPart:
    """A stretch of text inside a message."""

    text: str


@dataclass(frozen=True, slots=True)
class MediaPart:
    """A medium inside a message. ``from_video`` marks an audio item that is a video's own track."""

    ref: MediaRef
    from_video: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: ``role`` is ``"system"``, ``"user"`` or ``"assistant"``."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[TextPart | MediaPart, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of one sample and the one decision on how a video's audio travels.

    ``audio_in_video`` is made once here and carried in the data. ``interleaved``: the track rides
    inside its video (processor and positions get ``use_audio_in_video=True``). ``separate``: the
    track is an audio item of its own (HumanOmniV2's way). ``off``: there is no track or it is not
    wanted.
    """

    sample_id: str
    messages: tuple[Message, ...]
    audio_in_video: AudioInVideo

    @property
    def media(self) -> tuple[MediaPart, ...]:
        """Every medium of the conversation in reading order."""
        return tuple(p for m in self.messages for p in m.parts if isinstance(p, MediaPart))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation rendered by the chat template, generation prompt included.

    ``placeholders`` counts the un-expanded placeholder of each modality in ``text``.
    """

    sample_id: str
    text: str
    placeholders: Mapping[Modality, int]


# --------------------------------------------------------------------------- media


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """``pixels``: uint8, (3, height, width), RGB, already resized for the model."""

    pixels: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """Sampled frames of one clip.

    ``frames``: float32, (T, 3, height, width), RGB in 0..255, already resized for the model.
    ``sample_fps``: frames of ``frames`` per second of clip; this, not the fps that was asked for,
    decides the time positions. ``source_fps``: average rate of the file. ``duration``: seconds.
    """

    frames: Tensor
    sample_fps: float
    source_fps: float
    duration: float


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """``samples``: float32, (n,), mono, 16 kHz, in -1..1. ``from_video``: index of the video whose
    track this is *and inside which it is interleaved*, else ``None``."""

    samples: Tensor
    from_video: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """The decoded media of one sample, each modality in reading order.

    ``decoder`` names decoder and version (``"pyav 18.1.0"``): it is part of a trace because
    another decoder gives other frames.
    """

    sample_id: str
    images: tuple[Image, ...]
    videos: tuple[Video, ...]
    audios: tuple[Audio, ...]
    decoder: str


# --------------------------------------------------------------------------- batch


@dataclass(frozen=True, slots=True)
class Span:
    """A run of placeholder tokens that one media item fills.

    ``item`` counts within the row and modality; an interleaved video and its audio have several
    spans each. ``start`` counts tokens from the first non-padding token of the row.
    """

    modality: Modality
    item: int
    start: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One processed sample, without padding.

    ``input_ids``: int64, (length,). ``tensors`` holds what the model takes beside the ids, by its
    keyword: ``pixel_values`` (patches, patch_dim) with ``image_grid_thw`` (images, 3),
    ``pixel_values_videos`` with ``video_grid_thw`` (videos, 3) and ``video_second_per_grid``
    (videos,), ``input_features`` (audios, mels, frames) with ``feature_attention_mask`` (audios,
    frames). A modality that is absent has no key.
    """

    sample_id: str
    input_ids: Tensor
    audio_in_video: AudioInVideo
    spans: tuple[Span, ...]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows collated for the model, left-padded.

    ``input_ids``, ``attention_mask``: int64, (B, L). ``tensors``: the rows' tensors, each
    modality's items concatenated in row order (audio padded in time to the longest).
    """

    rows: tuple[Row, ...]
    input_ids: Tensor
    attention_mask: Tensor
    tensors: Mapping[str, Tensor]

    @property
    def pads(self) -> tuple[int, ...]:
        """Padding tokens to the left of each row; ``span.start + pad`` indexes ``input_ids``."""
        width = self.input_ids.shape[1]
        return tuple(width - len(row.input_ids) for row in self.rows)


# --------------------------------------------------------------------------- model stages


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """``position_ids``: (3, B, L): time, height, width. ``deltas``: (B,): what a row's next
    position exceeds its number of non-padding tokens by. Both int64, or float32 in a family whose
    time positions are fractions."""

    position_ids: Tensor
    deltas: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """What enters the first text layer.

    ``inputs_embeds``: (B, L, H). ``features``: per row and span, what the modality's tower gave
    for exactly that span, (span.length, H), in the order of ``Row.spans``.
    """

    inputs_embeds: Tensor
    features: tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class DeepstackEmbeddings(Embeddings):
    """What enters a text model that takes vision in at several depths.

    ``deepstack``: for each of the first text layers what is added behind it at the placeholders of
    images and videos, (those placeholders, H), rows one after another, in token order.
    """

    deepstack: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """``values``: float32, (B, V): scores for the token after the prompt."""

    values: Tensor


# --------------------------------------------------------------------------- rollout


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer, as raw ids.

    ``group_id`` is the sample's id. ``token_ids`` keep the final eos and every special token:
    ``skip_special_tokens`` would hide a stray ``<|im_start|>``. ``text`` is decoded with special
    tokens kept, without the final eos. ``logprobs``: log-probability of each token at the sampling
    temperature. ``length`` as finish reason means the cap was hit before an eos.
    """

    group_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Rollout:
    """The completions of a batch: G for every row, rows in batch order (1 1 2 2, not 1 2 1 2)."""

    completions: tuple[Completion, ...]
    group_size: int
    temperature: float
    seed: int


# --------------------------------------------------------------------------- parsed, reward


@dataclass(frozen=True, slots=True)
class Section:
    """Text of one tag pair; ``start`` and ``end`` are character offsets into the completion of
    the content, tags excluded: ``completion[start:end] == text``."""

    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Parsed:
    """A completion of the shape ``<context>…</context><think>…</think><answer>…</answer>``."""

    context: Section
    think: Section
    answer: Section


@dataclass(frozen=True, slots=True)
class Malformed:
    """A completion that is not of that shape: ``what`` is wrong, and ``where`` (character)."""

    what: str
    where: int


@dataclass(frozen=True, slots=True)
class Score:
    """A reward of one completion. ``value`` is in [0, 1], or ``None`` when it could not be scored;
    a failure is never 0.0. ``reason`` says why, for a person."""

    value: float | None
    reason: str


# --------------------------------------------------------------------------- check, trace


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at in a stage, and what was seen."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True, eq=False)
class StageRecord:
    """What a pass left behind at one stage. ``value`` is a value of this module, or a tuple of
    them; ``seconds`` is wall-clock time."""

    stage: Stage
    value: Any
    checks: tuple[Check, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What one pass of the pipeline left behind, stage by stage, for a few samples.

    ``header`` says under what the pass ran: versions, model, device, dtype, decoder.
    """

    header: Mapping[str, str]
    stages: tuple[StageRecord, ...]

    def __getitem__(self, stage: Stage) -> StageRecord:
        for record in self.stages:
            if record.stage == stage:
                return record
        raise KeyError(stage)
