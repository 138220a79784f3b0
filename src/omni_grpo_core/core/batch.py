"""Conversation + Media -> Batch: the processor wrapper, row by row.

transformers' omni processor takes one audio-in-video flag for a whole call, truncates audio
silently and raises a bare ``StopIteration`` when media and placeholders disagree. So each row is
processed alone, with its own flag, checked, and collated here with left padding. A batch may mix
all audio modes, images and text-only rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.conversation import interleaves
from omni_grpo_core.core.family import Family
from omni_grpo_core.core.processing import (
    ID_DTYPE,
    MODEL_KEYS,
    concatenate,
    processed,
    tokens_of,
)
from omni_grpo_core.errors import BatchError, OmniGrpoError, one_line
from omni_grpo_core.types import (
    AUDIO_SAMPLING_RATE,
    MODALITIES,
    Batch,
    Check,
    Conversation,
    Media,
    Modality,
    Prompt,
    Row,
    Span,
    TextPart,
    audio_words,
)


def render(conversation: Conversation, processor: Any) -> Prompt:
    """The conversation rendered by the checkpoint's chat template, generation prompt included.

    Raises:
        BatchError: the template raises; the text does not have exactly one placeholder per medium,
            because the template drops media or the question contains a placeholder; or the
            question contains another special token.
    """
    messages = chat_messages(conversation)
    with _library_errors(f"prompt of sample {conversation.sample_id}", "a chat template"):
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if isinstance(text, list):  # 4.52's omni processor returns a list for one conversation
        (text,) = text
    counts = {modality: text.count(token) for modality, token in tokens_of(processor).items()}
    for modality, found in counts.items():
        wanted = sum(part.ref.modality == modality for part in conversation.media)
        if found != wanted:
            raise BatchError(
                f"prompt of sample {conversation.sample_id}",
                got=f"{found} {modality} placeholders in the rendered text",
                want=f"{wanted}, one per {modality} of the conversation",
                fix="use a chat template that renders media, and no special tokens in questions",
            )
    _refuse_special_tokens(conversation, processor.tokenizer)
    return Prompt(conversation.sample_id, text, counts)


def chat_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as chat templates take it, each medium as its path."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": part.ref.modality, part.ref.modality: part.ref.path}
                for part in message.parts
            ],
        }
        for message in conversation.messages
    ]


def _refuse_special_tokens(conversation: Conversation, tokenizer: Any) -> None:
    """A question that contains ``<|im_end|>`` ends the turn and can begin another."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    for message in conversation.messages:
        for part in message.parts:
            found = [s for s in special if isinstance(part, TextPart) and s in part.text]
            if found:
                raise BatchError(
                    f"prompt of sample {conversation.sample_id}",
                    got=f"the special token {found[0]} in the text of the {message.role}",
                    want="plain text: only the chat template writes special tokens",
                    fix="remove it from the row",
                )


def process_row(
    prompt: Prompt,
    conversation: Conversation,
    media: Media,
    processor: Any,
    family: Family,
    *,
    max_length: int | None = None,
) -> Row:
    """One sample through the processor, with placeholders checked against grids and audio lengths.

    Media arrive resized, so the processor's own resizing is off; the frame rate that was actually
    sampled determines the time positions. ``max_length`` limits the expanded prompt in tokens:
    nothing is ever truncated to fit.

    Raises:
        BatchError: media and placeholders disagree in number, an audio is longer than the feature
            extractor takes or too short for one token, or the prompt is longer than ``max_length``.
    """
    item = f"sample {prompt.sample_id}"
    interleaved = sum(audio.from_video is not None for audio in media.audios)
    given = {
        "image": len(media.images),
        "video": len(media.videos),
        "audio": len(media.audios) - interleaved,
    }
    for modality in MODALITIES:
        if given[modality] != prompt.placeholders[modality]:
            raise BatchError(
                item,
                got=f"{given[modality]} {modality} items decoded",
                want=f"{prompt.placeholders[modality]}, one per placeholder of the prompt",
                fix="decode the media of the conversation that was rendered",
            )
    wanted = [
        index
        for index in range(len(media.videos))
        if interleaves(conversation.audio_in_video, index)
    ]
    if [audio.from_video for audio in media.audios if audio.from_video is not None] != wanted:
        raise BatchError(
            item,
            got=f"{interleaved} interleaved tracks for {len(wanted)} videos",
            want="one track for each video that has its sound interleaved",
            fix="set audio-in-video to 'separate' or 'off'",
        )
    _refuse_odd_audio(item, media, processor, family)
    _refuse_odd_sizes(item, media, processor)

    with _library_errors(item, "a processor"):
        ids, tensors = processed(prompt.text, media, processor, family)
    _refuse_lost_audio(item, media, processor, tensors)
    if max_length is not None and len(ids) > max_length:
        raise BatchError(
            item,
            got=f"a prompt of {len(ids)} tokens",
            want=f"at most {max_length}",
            fix="raise the prompt limit or lower fps or pixels: truncation would lose media tokens",
        )
    expected = expected_lengths(tensors, processor, family)
    spans = find_spans(ids, placeholder_ids(processor), expected, item)
    return Row(prompt.sample_id, ids, conversation.audio_in_video, spans, tensors)


def require_positions(row: Row, new_tokens: int, limit: int) -> None:
    """Raises ``BatchError`` for a row that, with ``new_tokens``, exceeds the model's ``limit``
    positions: nothing else would report it, and the completions would be noise."""
    length = len(row.input_ids)
    if length + new_tokens <= limit:
        return
    counts = {m: sum(s.length for s in row.spans if s.modality == m) for m in MODALITIES}
    parts = [f"{n} of {modality}" for modality, n in counts.items() if n]
    parts.append(f"{length - sum(counts.values())} of text")
    raise BatchError(
        f"sample {row.sample_id}",
        got=f"a prompt of {length} tokens ({', '.join(parts)}) and up to {new_tokens} new ones",
        want=f"at most {limit} together, the model's positions",
        fix="shorten the text, or lower settings: max_new_tokens, media: fps, max_frames or "
        "max_pixels",
    )


def collate(rows: Sequence[Row], pad_token_id: int) -> Batch:
    """Rows stacked, left-padded to the longest.

    Raises:
        BatchError: there are no rows.
    """
    if not rows:
        raise BatchError("batch", got="no rows", want="at least one", fix="pass samples")
    width = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=ID_DTYPE)
    attention_mask = torch.zeros((len(rows), width), dtype=ID_DTYPE)
    for index, row in enumerate(rows):
        input_ids[index, width - len(row.input_ids) :] = row.input_ids
        attention_mask[index, width - len(row.input_ids) :] = 1
    tensors = {}
    for keys in MODEL_KEYS.values():
        for key in keys:
            parts = [row.tensors[key] for row in rows if key in row.tensors]
            if parts:
                tensors[key] = concatenate(parts)
    return Batch(tuple(rows), input_ids, attention_mask, tensors)


def placeholder_ids(processor: Any) -> dict[Modality, int]:
    """Each modality's placeholder id, from the checkpoint's own tokenizer."""
    return {
        modality: int(processor.tokenizer.convert_tokens_to_ids(token))
        for modality, token in tokens_of(processor).items()
    }


def expected_lengths(
    tensors: Mapping[str, Tensor], processor: Any, family: Family
) -> dict[Modality, list[int]]:
    """How many placeholders each item needs: grid size over merge size squared; audio by length."""
    expected: dict[Modality, list[int]] = {"image": [], "video": [], "audio": []}
    if "image_grid_thw" in tensors:
        merge = processor.image_processor.merge_size**2
        expected["image"] = [int(grid.prod()) // merge for grid in tensors["image_grid_thw"]]
    if "video_grid_thw" in tensors:
        merge = processor.video_processor.merge_size**2
        expected["video"] = [int(grid.prod()) // merge for grid in tensors["video_grid_thw"]]
    if "feature_attention_mask" in tensors:
        frames = tensors["feature_attention_mask"].sum(-1).tolist()
        expected["audio"] = [family.audio_tokens(int(n)) for n in frames]
    return expected


def find_spans(
    ids: Tensor,
    token_ids: Mapping[Modality, int],
    expected: Mapping[Modality, Sequence[int]],
    item: str,
) -> tuple[Span, ...]:
    """Runs of placeholders and the item that fills each, in token order.

    ``expected`` gives the length of every item; items of a modality are filled in order, and an
    interleaved item may take several runs. Together the spans tile exactly the media tokens.

    Raises:
        BatchError: a run is longer than what is left of its item, or an item is left unfilled. For
            audio, transformers silently takes the first features then, and everything after is
            shifted.
    """
    modality_of = {token: modality for modality, token in token_ids.items()}
    left = {modality: list(lengths) for modality, lengths in expected.items()}
    current = dict.fromkeys(token_ids, 0)
    spans: list[Span] = []
    start = 0
    for token, run in itertools.groupby(ids.tolist()):
        length = len(list(run))
        modality = modality_of.get(token)
        if modality is not None:
            index = current[modality]
            remaining = left[modality][index] if index < len(left[modality]) else 0
            if length > remaining:
                raise BatchError(
                    item,
                    got=f"{length} {modality} placeholders at token {start}",
                    want=f"{remaining}, what is left of {modality} item {index}",
                    fix="check frame rate and audio length: processor and media disagree",
                )
            spans.append(Span(modality, index, start, length))
            left[modality][index] -= length
            if not left[modality][index]:
                current[modality] += 1
        start += length
    for modality, index in current.items():
        if index < len(left[modality]):
            raise BatchError(
                item,
                got=f"{modality} item {index} with {left[modality][index]} features too many",
                want="as many placeholders as features",
                fix="pass the whole prompt, and only the media that it has placeholders for",
            )
    return tuple(spans)


def check_batch(batch: Batch, conversations: Sequence[Conversation], media: Sequence[Media],
                processor: Any, family: Family) -> tuple[Check, ...]:  # fmt: skip
    """What must hold between a batch and its inputs."""
    wanted_ids = [conversation.sample_id for conversation in conversations]
    found_ids = [row.sample_id for row in batch.rows]
    ids = placeholder_ids(processor)
    counts: list[str] = []
    counted = rates = True
    for row, clip in zip(batch.rows, media, strict=True):
        lengths = expected_lengths(row.tensors, processor, family)
        for modality, token in ids.items():
            found = int((row.input_ids == token).sum())
            spanned = sum(span.length for span in row.spans if span.modality == modality)
            counted &= found == sum(lengths[modality]) == spanned
        counts.append(
            "+".join(f"{sum(lengths[m])} {m}" for m in MODALITIES if lengths[m]) or "text"
        )
        seconds = row.tensors.get("video_second_per_grid", torch.zeros(0)).tolist()
        patch = processor.video_processor.temporal_patch_size
        true = [patch / video.sample_fps for video in clip.videos]
        # the processor's quotient is float32: 1e-6 relative is its rounding
        rates &= len(seconds) == len(true) and all(
            abs(a - b) <= 1e-6 * b for a, b in zip(seconds, true, strict=True)
        )
    mask = batch.attention_mask
    left_padded = bool((mask.diff(dim=1) >= 0).all()) and bool((mask[:, -1] == 1).all())
    dtypes = {batch.input_ids.dtype, mask.dtype}
    modes = [row.audio_in_video for row in batch.rows]
    same_modes = modes == [conversation.audio_in_video for conversation in conversations]
    return (
        Check("prompts == samples", found_ids == wanted_ids, f"{len(found_ids)} rows"),
        Check("placeholders == features", counted, "; ".join(counts)),
        Check("sampled frame rate passed on", rates, "video_second_per_grid"),
        Check("left padding", left_padded, f"padding {list(batch.pads)}"),
        Check("ids and mask int64", dtypes == {ID_DTYPE}, ", ".join(map(str, dtypes))),
        Check("audio-in-video as decided", same_modes, ", ".join(map(audio_words, modes))),
    )


@contextmanager
def _library_errors(item: str, what: str) -> Iterator[None]:
    """A checkpoint's files can make transformers raise anything, for samples that exercise them."""
    try:
        yield
    except (MemoryError, OmniGrpoError):
        raise
    except Exception as error:
        raise BatchError(
            item,
            got=f"{type(error).__name__} in transformers: {one_line(error)}",
            want=f"{what} that accepts the sample",
            fix="use the processor files that came with the checkpoint and a supported version of "
            "transformers",
        ) from error


def _refuse_odd_audio(item: str, media: Media, processor: Any, family: Family) -> None:
    extractor = processor.feature_extractor
    limit = extractor.n_samples if family.audio_limited else math.inf
    # with fewer mel frames the tower gives no features
    frames = next(n for n in itertools.count(1) if family.audio_tokens(n) > 0)
    least = frames * extractor.hop_length
    for index, audio in enumerate(media.audios):
        length = len(audio.samples)
        if not least <= length <= limit:
            raise BatchError(
                f"{item}, audio {index}",
                got=f"{length / AUDIO_SAMPLING_RATE:.2f} s of audio ({length} samples)",
                want=f"{least / AUDIO_SAMPLING_RATE:.2f} to {limit / AUDIO_SAMPLING_RATE:g} s, "
                "what the checkpoint's feature extractor takes",
                fix="use a longer one, or leave it out: it is too short for one token"
                if length < least
                else "cut the clip: the extractor would truncate it silently",
            )


def _refuse_lost_audio(
    item: str, media: Media, processor: Any, tensors: Mapping[str, Tensor]
) -> None:
    """Whatever its limit, an extractor of any version truncates silently."""
    hop = processor.feature_extractor.hop_length
    frames = tensors["feature_attention_mask"].sum(-1).tolist() if media.audios else []
    for index, (audio, found) in enumerate(zip(media.audios, frames, strict=True)):
        if found < len(audio.samples) // hop:
            raise BatchError(
                f"{item}, audio {index}",
                got=f"{int(found)} frames of {len(audio.samples) // hop} from the extractor",
                want="the whole audio",
                fix="cut the clip, or use another version of transformers",
            )


def _refuse_odd_sizes(item: str, media: Media, processor: Any) -> None:
    """Media arrive resized; a size for another family's patches fails deep inside transformers."""
    images = processor.image_processor
    side = images.patch_size * images.merge_size
    for kind, shapes in (
        ("image", [image.pixels.shape[-2:] for image in media.images]),
        ("video", [video.frames.shape[-2:] for video in media.videos]),
    ):
        for index, (height, width) in enumerate(shapes):
            if height % side or width % side:
                raise BatchError(
                    f"{item}, {kind} {index}",
                    got=f"{width} x {height} pixels",
                    want=f"multiples of {side}, the {images.patch_size} px of a patch times the "
                    f"{images.merge_size} that a token merges",
                    fix="load media with this checkpoint's patch size",
                )
