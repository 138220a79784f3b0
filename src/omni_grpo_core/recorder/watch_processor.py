"""Watches ``apply_chat_template`` and the processor's own call.

Python looks ``__call__`` up on the class, and ``save_pretrained`` would write an instance attribute
into the checkpoint: so the class is patched, and calls on other instances pass through.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from omni_grpo_core.recorder.hooks import Patches, arguments
from omni_grpo_core.recorder.media import media_seen
from omni_grpo_core.recorder.media_files import MediaFileWatch
from omni_grpo_core.recorder.step_buffer import Outcome, Seen, StepBuffer, clock, died_in
from omni_grpo_core.trace.calls import MediumSeen, ProcessorCall, TemplateCall
from omni_grpo_core.types import MODALITIES, Modality

_ARGUMENTS: Mapping[Modality, str] = {"image": "images", "video": "videos", "audio": "audio"}
_MEDIA_KEYS = frozenset(
    {"image", "images", "video", "audio", "image_url", "video_url", "audio_url"}
)
_PARTS = {
    "text_kwargs": "tokenizer",
    "images_kwargs": "image_processor",
    "audio_kwargs": "feature_extractor",
    "videos_kwargs": "video_processor",
}
"""The processor part that each group of keywords goes to."""


class ProcessorWatch:
    """Watches one processor, or a tokenizer used as one, and its tokenizer's template."""

    def __init__(self, processor: Any, buffer: StepBuffer) -> None:
        self._processor, self._buffer = processor, buffer
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._process_id = os.getpid()
        self._rendering = False
        self._texts: tuple[str, ...] = ()
        self._files = MediaFileWatch(buffer)

    def start(self, patches: Patches) -> None:
        with self._buffer.guarded("media files"):
            self._files.start(patches)
        self._patch(patches, type(self._processor), "__call__", self._process)
        for kind in dict.fromkeys((type(self._processor), type(self._tokenizer))):
            if hasattr(kind, "apply_chat_template"):
                self._patch(patches, kind, "apply_chat_template", self._render)

    def stop(self) -> None:
        self._files.stop()

    def _patch(self, patches: Patches, kind: type, name: str, call: Callable[..., Any]) -> None:
        original = getattr(kind, name)
        watched = (self._processor, self._tokenizer) if name != "__call__" else (self._processor,)

        @functools.wraps(original)
        def instead(this: Any, *args: Any, **keywords: Any) -> Any:
            # a forked data loader has a copy of all this, but nothing that would write it
            here = os.getpid() == self._process_id
            if not here or not any(this is one for one in watched):
                return original(this, *args, **keywords)
            return call(functools.partial(original, this), args, keywords)

        patches.set(kind, name, instead)

    # ------------------------------------------------------------------ text

    def _render(
        self, call: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        if self._rendering:  # the processor calls its tokenizer
            return call(*args, **keywords)
        self._rendering, self._texts, started = True, (), clock()
        given: tuple[Any, dict[str, Any]] | None = None
        with self._buffer.guarded("chat template"):
            # before the call: some versions write into the messages
            given = self._conversations(call, args, keywords)
        result = None
        try:
            result = call(*args, **keywords)
            return result
        except BaseException as raised:
            died_in(raised, "text")
            raise
        finally:  # what the processor inside it could not take was rendered all the same
            self._rendering = False
            with self._buffer.guarded("chat template"):
                if given is not None:
                    self._rendered(*given, result, clock() - started)

    def _conversations(
        self, call: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = arguments(call, args, keywords)
        first = next(name for name in bound if name.startswith("conversation"))
        given = bound.pop(first)
        given = getattr(given, "messages", given)
        many = given if len(given) and not isinstance(given[0], Mapping) else [given]
        plain = tuple(
            tuple(self._message(m) for m in getattr(one, "messages", one)) for one in many
        )
        return plain, self._buffer.plain.mapping(bound)

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, list | tuple):
            content = tuple(_part(part) for part in content)
        return self._buffer.plain.mapping({**message, "content": content})

    def _rendered(
        self,
        conversations: tuple[Any, ...],
        keywords: dict[str, Any],
        result: Any,
        seconds: float,
    ) -> None:
        nested = isinstance(result, list)
        # tokenized on the way: the text is what the inner processor call received
        texts = (result,) if isinstance(result, str) else self._texts
        if nested and all(isinstance(text, str) for text in result):
            texts = tuple(result)
        texts = tuple(map(self._buffer.plain.text, texts))
        if len(texts) == len(conversations):
            for messages, text in zip(conversations, texts, strict=True):
                self._buffer.add(TemplateCall(messages, keywords, (text,), nested), seconds)
        else:
            for messages in conversations:
                self._buffer.add(TemplateCall(messages, keywords, texts, nested), seconds)

    # ------------------------------------------------------------------ batch

    def _process(
        self, call: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        buffer = self._buffer
        # read before the call: a processor may change a list that it is given
        given: dict[str, Any] = {}
        media: dict[Modality, tuple[MediumSeen, ...]] = {}
        opened: tuple[str, ...] = ()
        side = str(getattr(self._tokenizer, "padding_side", ""))
        with buffer.guarded("processor"):
            given = arguments(call, args, keywords)
            for modality in MODALITIES:
                found = given.pop(_ARGUMENTS[modality], None)
                media[modality] = media_seen(modality, found, buffer.fits)
            opened = self._files.take()

        def note(outcome: Outcome) -> None:
            texts, nested = _flat(given.pop("text", None))
            self._texts = texts
            # now: the caller may change what it passed
            keywords = buffer.plain.mapping(given)
            ignored = _ignored(self._processor, call, given)
            seen = Seen()
            pad = getattr(self._tokenizer, "pad_token_id", None) or 0
            buffer.see(_tensors(outcome.result, pad), seen, casts=True)
            buffer.add(
                lambda: ProcessorCall(
                    texts=tuple(map(buffer.plain.text, texts)),
                    nested=nested,
                    images=media.get("image", ()),
                    videos=media.get("video", ()),
                    audios=media.get("audio", ()),
                    keywords=keywords,
                    ignored=ignored,
                    warnings=outcome.warnings,
                    outputs=seen.tensors,
                    padding_side=side,
                    error=outcome.error,
                    large=seen.described(),
                    digests=seen.digests,
                    opened=opened,
                ),
                outcome.seconds,
            )

        with buffer.watching("processor", note) as outcome:
            outcome.result = call(*args, **keywords)
            return outcome.result


def _part(part: Any) -> Any:
    if not isinstance(part, Mapping):
        return part
    return {
        key: "<array>" if key in _MEDIA_KEYS and _is_data(held) else held
        for key, held in part.items()
    }


def _is_data(held: Any) -> bool:
    """A list of frames may be a list of paths."""
    if isinstance(held, list | tuple):
        return any(map(_is_data, held))
    return held is not None and not isinstance(held, str | bool | int | float | Mapping)


def _flat(text: Any) -> tuple[tuple[str, ...], bool]:
    if isinstance(text, str):
        return (text,), False
    if not isinstance(text, list | tuple):
        return (), False
    nested = any(isinstance(one, list | tuple) for one in text)
    return tuple(t for one in text for t in (_flat(one)[0])), nested


def _tensors(result: Any, pad: int) -> dict[str, Tensor]:
    """Arrays and lists of numbers count as tensors: not everybody requests ``"pt"``. Rows of ids of
    different length, which nobody padded, are kept with ``pad`` before them, and a mask of it."""
    found = {}
    for name, value in dict(result).items() if isinstance(result, Mapping) else ():
        try:
            found[str(name)] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):  # rows of different length
            if name == "input_ids" and isinstance(value, list):
                found["input_ids"] = _padded(value, pad)
                found["attention_mask"] = _padded([[1] * len(row) for row in value], 0)
    return found


def _padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """
    >>> _padded([[5, 6, 7], [8]], 0).tolist()
    [[5, 6, 7], [0, 0, 8]]
    """
    longest = max(map(len, rows))
    return torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])


def _ignored(processor: Any, call: Callable[..., Any], given: Mapping[str, Any]) -> tuple[str, ...]:
    """Keywords that no part of the processor accepts: transformers drops them with a warning once
    per process, and in some forms of call without one."""
    kinds = _keyword_kinds(type(processor), call)
    if not kinds:
        return ()
    known = {"text", *_ARGUMENTS.values(), *_PARTS, "common_kwargs"}
    # from 5.23 on some are parameters of a base class's ``__call__``
    for base in type(processor).__mro__:
        if "__call__" in vars(base):
            known |= set(inspect.signature(vars(base)["__call__"]).parameters)
    for kind in kinds:
        known |= set(kind.__annotations__)
        for group in kind.__annotations__.values():
            known |= set(getattr(group, "__annotations__", {}))
    for part in _PARTS.values():
        takes = getattr(getattr(processor, part, None), "valid_kwargs", None)
        known |= set(getattr(takes, "__annotations__", {}))
    return tuple(key for key in given if key not in known)


def _keyword_kinds(kind: type, call: Callable[..., Any]) -> list[Any]:
    """The classes that list a processor's keywords: an attribute in recent versions, which in some
    is only the general one, and the annotation of its call."""
    kinds = [getattr(kind, "valid_processor_kwargs", None)]
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            kinds += get_args(parameter.annotation)
    return [found for found in kinds if hasattr(found, "__annotations__")]
