"""Faults of the processor call and of collation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.faults.fault import (
    ONE_PROMPT,
    FaultRegistry,
    Manager,
    instead_of,
    result_of,
    without,
)
from omni_grpo_core.faults.fixtures import rows_of
from omni_grpo_core.faults.seams import Loop, Messages
from omni_grpo_core.recorder.hooks import patched
from omni_grpo_core.types import Media

faults = FaultRegistry()
Inputs = dict[str, Tensor]
Keywords = dict[str, Any]

FLAGS = ("use_audio_in_video", "load_audio_from_video", "audio_from_video_indices")
PADDED = {"rows": (12, 5)}
"""Rows of different lengths: without padding these faults change nothing."""
HEARD = {"audio": "separate", "rows": (18, 19)}
"""Audio-only rows: transformers checks features against placeholders for video, not for audio."""


@faults.add("batch.flag-processor", "the incident")
@result_of("processor_keywords")
def flag_processor(loop: Loop, keywords: Keywords) -> Keywords:
    """use_audio_in_video is missing only from the processor call: the track's features are
    computed, but have no placeholders."""
    return without(keywords, *FLAGS)


@faults.add("batch.flag-generate", "the incident")
@result_of("generation_keywords")
def flag_generate(loop: Loop, keywords: Keywords) -> Keywords:
    """use_audio_in_video=False is hard-coded only in generate: answers stay right, but their logits
    are off."""
    return {**keywords, "use_audio_in_video": False}


@faults.add("batch.flag-forward", "the incident")
@result_of("scoring_inputs")
def flag_forward(loop: Loop, inputs: Keywords) -> Keywords:
    """use_audio_in_video=False is hard-coded in the scoring forward."""
    return {**inputs, "use_audio_in_video": False}


@faults.add(
    "batch.audios-kwarg", "transformers changed the name; the incident's hypothesis", stops=True
)
@instead_of("call_processor")
def audios_kwarg(
    loop: Loop, before: Callable[..., Mapping[str, Any]], audio: Any, **keywords: Any
) -> Mapping[str, Any]:
    """audios= is passed instead of audio=: the processor warns that it is ignored and finds no
    audio for its placeholders."""
    return before(**keywords, audios=audio)


@faults.add(
    "batch.feature-count",
    "the incident: 1 video, 2 audios",
    needs={"audio": "separate", "rows": (4, 10)},
)
@instead_of("load")
def feature_count(loop: Loop, before: object, messages: Messages) -> Media:
    """The media reader also extracts the track of every video, so each slot has two audios: the
    first ones are used and everything after them is shifted."""
    return loop.clips.load(messages, True)


@faults.add(
    "batch.silent-clip",
    "transformers 5.23 and 5.24: load_audio_from_video; earlier processors raise StopIteration",
    needs={"rows": (5, 12)},
    lacking=ONE_PROMPT,
)
@contextmanager
def silent_clip(loop: Loop) -> Iterator[None]:
    """A clip without a track is in a batch that takes its audio from the videos: the processor
    silently skips it. The model counts clips by their audio, so this one gets positions of plain
    text, and each later clip the grid and the rate of the one before it."""
    has_track, draw = loop.clips.has_track, loop.draw
    mute = next(row for row in rows_of() if row.videos and not any(map(has_track, row.videos)))

    def load(messages: Messages) -> Media:
        parts = [part for message in messages for part in message["content"]]
        heard = all(has_track(part["video"]) for part in parts if part["type"] == "video")
        return loop.clips.load(messages, loop.use_audio_in_video and heard)

    with (
        loop.replaced(draw=lambda micro: [mute, *draw(micro)[1:]], load=load),
        _skipping_mute(loop),
    ):
        yield


def _skipping_mute(loop: Loop) -> Manager:
    """Makes a processor before 5.23 treat the rows of the first prompt as later versions do."""
    if _takes_owners(loop):
        return nullcontext()
    lay = loop.processor.replace_multimodal_special_tokens

    def one_by_one(text: list[str], *args: Any, use_audio_in_video: bool, **more: Any) -> list[str]:
        laid: list[str] = []
        for row, one in enumerate(text):
            heard = use_audio_in_video and row >= loop.config.group_size
            laid += lay([one], *args, use_audio_in_video=heard, **more)
        return laid

    return patched(loop.processor, replace_multimodal_special_tokens=one_by_one)


def _takes_owners(loop: Loop) -> bool:
    """Whether the installed processor must be given the video that each track belongs to."""
    return hasattr(loop.processor, "load_audio_from_video")


@faults.add(
    "batch.track-owners",
    "use_audio_in_video renamed to load_audio_from_video in a script, for transformers 5.23",
    stops=True,
)
def track_owners(loop: Loop) -> Manager:
    """Decoded tracks are passed with load_audio_from_video=True but without the video that each
    belongs to: the processor takes them for separate recordings and raises."""
    if _takes_owners(loop):
        before = loop.processor_keywords
        return loop.replaced(
            processor_keywords=lambda media: without(before(media), "audio_from_video_indices")
        )

    def refuse(text: list[str], *args: Any, **keywords: Any) -> list[str]:
        # the message of 5.23; earlier versions need no owners
        token = loop.processor.audio_token
        raise ValueError(f"Found total 0 {token} tokens and {len(text)} audio inputs.")

    return patched(loop.processor, replace_multimodal_special_tokens=refuse)


@faults.add("batch.truncated-left", "TRL and open-r1-multimodal: max_prompt_length", needs=HEARD)
@result_of("process")
def truncated_left(loop: Loop, inputs: Inputs) -> Inputs:
    """prompt_ids[:, -max_prompt_length:] cuts into the media tokens, which leaves fewer
    placeholders than features."""
    processor = loop.processor
    audio = processor.tokenizer.convert_tokens_to_ids(processor.audio_token)
    start = int((inputs["input_ids"] == audio).nonzero()[:, 1].min()) + 4
    return {**inputs, **{key: inputs[key][:, start:] for key in ("input_ids", "attention_mask")}}


@faults.add("batch.truncated-right", "processor calls with max_length and truncation", needs=HEARD)
@result_of("processor_keywords")
def truncated_right(loop: Loop, keywords: Keywords) -> Keywords:
    """truncation=True with a cap below the prompt's length cuts off its end: media tokens, question
    and generation prompt."""
    text = {"truncation": True, "max_length": 96, "padding": True, "truncation_side": "right"}
    return {**without(keywords, "padding"), "text_kwargs": text}


@faults.add(
    "batch.right-padding",
    "padding_side='right' left over from supervised training",
    needs=PADDED,
    lacking=ONE_PROMPT,
)
@result_of("processor_keywords")
def right_padding(loop: Loop, keywords: Keywords) -> Keywords:
    """Prompts are padded on the right, so completions start after padding."""
    return {**keywords, "padding_side": "right"}


@faults.add(
    "batch.mask-ignored",
    "trainers that build masks from shapes",
    needs=PADDED,
    lacking=ONE_PROMPT,
)
@result_of("process")
def mask_ignored(loop: Loop, inputs: Inputs) -> Inputs:
    """The attention mask is rebuilt as all ones, so padding is attended to."""
    return {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}


@faults.add("batch.double-expansion", "TRL with vLLM: expanded prompts sent as text", stops=True)
@instead_of("process")
def double_expansion(
    loop: Loop, before: Callable[..., Inputs], texts: list[str], media: list[Media]
) -> Inputs:
    """Ids with expanded placeholders are decoded and passed through the processor again: every
    placeholder then needs its own medium."""
    first = before(texts, media)
    kept = zip(first["input_ids"], first["attention_mask"].bool(), strict=True)
    return before([loop.policy.decode(ids[mask].tolist()) for ids, mask in kept], media)


@faults.add(
    "batch.max-length-leak", "transformers merges flat keywords into every part of a processor"
)
@result_of("processor_keywords")
def max_length_leak(loop: Loop, keywords: Keywords) -> Keywords:
    """A flat max_length= meant for the text reaches the audio feature extractor, which cuts the
    audio to that many samples."""
    return {**keywords, "max_length": 4096}


@faults.add(
    "batch.padding-side-config",
    "checkpoints saved by supervised trainers",
    needs=PADDED,
    lacking=ONE_PROMPT,
)
def padding_side_config(loop: Loop) -> Manager:
    """padding_side right in tokenizer_config.json overrides the processor's left."""
    tokenizer = copy.copy(loop.processor.tokenizer)
    tokenizer.init_kwargs = {**tokenizer.init_kwargs, "padding_side": "right"}
    tokenizer.padding_side = "right"
    return patched(loop.processor, tokenizer=tokenizer)


@faults.add(
    "batch.resized-again",
    "the processor's default video size overrides the saved one",
    needs={"group_size": 2},
    accepted={"completion": "of so many tokens a small policy makes nothing"},
    severity="differs",
)
@result_of("processor_keywords")
def resized_again(loop: Loop, keywords: Keywords) -> Keywords:
    """The processor resizes frames that are already resized, to its own minimum size: 36 times the
    tokens."""
    return without(keywords, "do_resize")


@faults.add("batch.unknown-kwarg", "processor calls with max_prompt_length")
@result_of("processor_keywords")
def unknown_kwarg(loop: Loop, keywords: Keywords) -> Keywords:
    """A keyword is passed that no part of the processor knows: the requested limit has no effect,
    and only a log line says so."""
    return {**keywords, "max_prompt_length": 32}


@faults.add("batch.dtype", "collators on numpy arrays")
@result_of("process")
def dtype(loop: Loop, inputs: Inputs) -> Inputs:
    """The attention mask is floating point after a detour through numpy."""
    return {**inputs, "attention_mask": inputs["attention_mask"].float()}
