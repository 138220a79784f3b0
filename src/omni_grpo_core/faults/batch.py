"""Faults of the processor call and of what is collated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.faults.fault import FaultRegistry
from omni_grpo_core.faults.feeding import Messages
from omni_grpo_core.faults.fixtures import rows_of
from omni_grpo_core.faults.reference_loop import ReferenceLoop, Rolled
from omni_grpo_core.recorder.hooks import patched
from omni_grpo_core.types import Media

shelf = FaultRegistry()
Manager = AbstractContextManager[None]
Inputs = dict[str, Tensor]

FLAGS = ("use_audio_in_video", "load_audio_from_video", "audio_from_video_indices")
PADDED = {"rows": (12, 5)}
"""Rows of different length: without padding these faults change nothing."""
HEARD = {"audio": "separate", "rows": (18, 19)}
"""Recordings alone: transformers counts features against placeholders for video, not for audio."""


def _keywords(loop: ReferenceLoop, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Manager:
    before = loop.processor_keywords

    def keywords(media: Sequence[Media]) -> dict[str, Any]:
        return change(before(media))

    return loop.replaced(processor_keywords=keywords)


def _inputs(loop: ReferenceLoop, change: Callable[[Inputs], Inputs]) -> Manager:
    before = loop.process

    def process(texts: list[str], media: list[Media]) -> Inputs:
        return change(before(texts, media))

    return loop.replaced(process=process)


@shelf.add(
    "batch.flag-processor",
    "use_audio_in_video is missing in the processor call alone: the track is computed, but no "
    "placeholder waits for it.",
    "the incident",
)
def flag_processor(loop: ReferenceLoop) -> Manager:
    return _keywords(loop, lambda told: {k: v for k, v in told.items() if k not in FLAGS})


@shelf.add(
    "batch.flag-generate",
    "use_audio_in_video=False is hard-coded in generate alone: answers stay right, their logits "
    "are off.",
    "the incident",
)
def flag_generate(loop: ReferenceLoop) -> Manager:
    before = loop.generation_keywords
    return loop.replaced(generation_keywords=lambda: {**before(), "use_audio_in_video": False})


@shelf.add(
    "batch.flag-forward",
    "use_audio_in_video=False is hard-coded in the scoring forward.",
    "the incident",
)
def flag_forward(loop: ReferenceLoop) -> Manager:
    before = loop.scoring_inputs

    def scoring(rolled: Rolled) -> dict[str, Any]:
        return {**before(rolled), "use_audio_in_video": False}

    return loop.replaced(scoring_inputs=scoring)


@shelf.add(
    "batch.audios-kwarg",
    "audios= for audio=: the processor warns that it will be ignored, and finds no audio for its "
    "placeholders.",
    "transformers changed the name; the incident's hypothesis",
    stops=True,
)
def audios_kwarg(loop: ReferenceLoop) -> Manager:
    before = loop.call_processor

    def call(**keywords: Any) -> Mapping[str, Any]:
        keywords["audios"] = keywords.pop("audio")
        return before(**keywords)

    return loop.replaced(call_processor=call)


@shelf.add(
    "batch.feature-count",
    "The media reader takes the track out of every video as well, so there are two audios for one "
    "slot: the first ones are taken, everything after is shifted.",
    "the incident: 1 video, 2 audios",
    needs={"audio": "separate", "rows": (4, 10)},
)
def feature_count(loop: ReferenceLoop) -> Manager:
    def load(messages: Messages) -> Media:
        return loop.clips.load(messages, True)

    return loop.replaced(load=load)


@shelf.add(
    "batch.silent-clip",
    "A clip without a track is drawn into a batch whose sound rides in its videos: the processor "
    "skips it without a word. The model counts clips by their sound, so that this one gets "
    "positions of plain text, and each later clip the grid and the rate of the one before it.",
    "transformers 5.23 and 5.24: load_audio_from_video; earlier processors raise StopIteration",
    needs={"rows": (5, 12)},
)
@contextmanager
def silent_clip(loop: ReferenceLoop) -> Iterator[None]:
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


def _skipping_mute(loop: ReferenceLoop) -> Manager:
    """Lets a processor before 5.23 do with the rows of the first prompt as later ones do."""
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


def _takes_owners(loop: ReferenceLoop) -> bool:
    """Whether the installed processor wants to be told which video a track is of."""
    return hasattr(loop.processor, "load_audio_from_video")


@shelf.add(
    "batch.track-owners",
    "Decoded tracks are handed along with load_audio_from_video=True, and nothing says which video "
    "each is of: the processor takes them for recordings of their own and raises.",
    "use_audio_in_video renamed to load_audio_from_video in a script, for transformers 5.23",
    stops=True,
)
def track_owners(loop: ReferenceLoop) -> Manager:
    if _takes_owners(loop):
        return _keywords(
            loop, lambda told: {k: v for k, v in told.items() if k != "audio_from_video_indices"}
        )

    def refuse(text: list[str], *args: Any, **keywords: Any) -> list[str]:
        # as 5.23 says it; earlier ones need no owners
        token = loop.processor.audio_token
        raise ValueError(f"Found total 0 {token} tokens and {len(text)} audio inputs.")

    return patched(loop.processor, replace_multimodal_special_tokens=refuse)


@shelf.add(
    "batch.truncated-left",
    "prompt_ids[:, -max_prompt_length:] cuts into the media tokens: fewer placeholders than "
    "features.",
    "TRL and open-r1-multimodal: max_prompt_length",
    needs=HEARD,
)
def truncated_left(loop: ReferenceLoop) -> Manager:
    def cut(inputs: Inputs) -> Inputs:
        start = int((inputs["input_ids"] == _audio_id(loop)).nonzero()[:, 1].min()) + 4
        ids, mask = inputs["input_ids"][:, start:], inputs["attention_mask"][:, start:]
        return {**inputs, "input_ids": ids, "attention_mask": mask}

    return _inputs(loop, cut)


def _audio_id(loop: ReferenceLoop) -> int:
    return int(loop.processor.tokenizer.convert_tokens_to_ids(loop.processor.audio_token))


@shelf.add(
    "batch.truncated-right",
    "truncation=True with a cap below the prompt cuts its end off: media tokens, question and the "
    "turn of the assistant.",
    "processor calls with max_length and truncation",
    needs=HEARD,
)
def truncated_right(loop: ReferenceLoop) -> Manager:
    def told(keywords: dict[str, Any]) -> dict[str, Any]:
        keywords.pop("padding")
        text = {"truncation": True, "max_length": 96, "padding": True, "truncation_side": "right"}
        return {**keywords, "text_kwargs": text}

    return _keywords(loop, told)


@shelf.add(
    "batch.right-padding",
    "Prompts are padded on the right: completions start after padding.",
    "padding_side='right' left over from supervised training",
    needs=PADDED,
)
def right_padding(loop: ReferenceLoop) -> Manager:
    return _keywords(loop, lambda told: {**told, "padding_side": "right"})


@shelf.add(
    "batch.mask-ignored",
    "The attention mask is made anew as all ones: padding is attended to.",
    "trainers that build masks from shapes",
    needs=PADDED,
)
def mask_ignored(loop: ReferenceLoop) -> Manager:
    def ones(inputs: Inputs) -> Inputs:
        return {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}

    return _inputs(loop, ones)


@shelf.add(
    "batch.double-expansion",
    "Ids whose placeholders are expanded already are decoded and go through the processor again: "
    "every placeholder asks for a medium of its own.",
    "TRL with vLLM: expanded prompts sent on as text",
    stops=True,
)
def double_expansion(loop: ReferenceLoop) -> Manager:
    before = loop.process

    def process(texts: list[str], media: list[Media]) -> Inputs:
        first = before(texts, media)
        kept = zip(first["input_ids"], first["attention_mask"].bool(), strict=True)
        return before([loop.policy.decode(ids[mask].tolist()) for ids, mask in kept], media)

    return loop.replaced(process=process)


@shelf.add(
    "batch.max-length-leak",
    "A flat max_length= for the text reaches the audio extractor, which cuts the sound to that "
    "many samples.",
    "transformers merges flat keywords into every part of a processor",
)
def max_length_leak(loop: ReferenceLoop) -> Manager:
    return _keywords(loop, lambda told: {**told, "max_length": 4096})


@shelf.add(
    "batch.padding-side-config",
    "tokenizer_config.json says padding_side right, and overrides the processor's left.",
    "checkpoints saved by supervised trainers",
    needs=PADDED,
)
def padding_side_config(loop: ReferenceLoop) -> Manager:
    tokenizer = copy.copy(loop.processor.tokenizer)
    tokenizer.init_kwargs = {**tokenizer.init_kwargs, "padding_side": "right"}
    tokenizer.padding_side = "right"
    return patched(loop.processor, tokenizer=tokenizer)


@shelf.add(
    "batch.resized-again",
    "The processor resizes frames that are resized already, to its own least size: 36 times the "
    "tokens.",
    "the processor's default video size overrides the saved one",
    needs={"group_size": 2},
)
def resized_again(loop: ReferenceLoop) -> Manager:
    return _keywords(loop, lambda told: {k: v for k, v in told.items() if k != "do_resize"})


@shelf.add(
    "batch.unknown-kwarg",
    "A keyword that no part of the processor knows: the limit that was asked for is not in force, "
    "and only a log line says so.",
    "processor calls with max_prompt_length",
)
def unknown_kwarg(loop: ReferenceLoop) -> Manager:
    return _keywords(loop, lambda told: {**told, "max_prompt_length": 32})


@shelf.add(
    "batch.dtype",
    "The attention mask arrives as floating point, after a detour through numpy.",
    "collators on numpy arrays",
)
def dtype(loop: ReferenceLoop) -> Manager:
    def floating(inputs: Inputs) -> Inputs:
        return {**inputs, "attention_mask": inputs["attention_mask"].float()}

    return _inputs(loop, floating)
