"""transformers' own way: one call of ``apply_chat_template(tokenize=True)``, files read by it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from transformers import processing_utils, video_utils

from omni_grpo_core.core.decode import inspect as inspect_file
from omni_grpo_core.core.decode import read_audio
from omni_grpo_core.parity.given import Given, Setup
from omni_grpo_core.parity.paths import InputPath


def open_path(setup: Setup) -> InputPath:
    """As transformers' page on Qwen2.5-Omni has it: ``load_audio_from_video`` reads the tracks,
    ``use_audio_in_video`` interleaves them."""

    def call(given: Given) -> Mapping[str, Any]:
        return tokenized(setup, given.messages(), interleaved=given.interleaved)

    return call


def tokenized(
    setup: Setup, messages: list[dict[str, Any]], *, interleaved: bool
) -> Mapping[str, Any]:
    """The processor's output for one conversation."""
    processor = setup.processor
    template = processor.apply_chat_template
    keywords = processor_keywords(setup, interleaved)
    if "processor_kwargs" in inspect.signature(template).parameters:
        keywords = {"processor_kwargs": keywords}
    with reading_files(processor):
        output: Mapping[str, Any] = template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            load_audio_from_video=interleaved,
            **keywords,
        )
    return output


def processor_keywords(setup: Setup, interleaved: bool) -> dict[str, Any]:
    """The settings that a processor takes; everything else about media is its own."""
    media = setup.settings.media
    video: dict[str, Any] = {
        "fps": media.fps,
        "min_frames": media.min_frames,
        "max_frames": media.max_frames,
        "do_sample_frames": True,
    }
    if media.min_pixels and media.max_pixels:
        video["size"] = {"shortest_edge": media.min_pixels, "longest_edge": media.max_pixels}
    # renamed in 5.23, where the template's own keyword reaches the processor too
    if interleaved and not hasattr(setup.processor, "load_audio_from_video"):
        video["use_audio_in_video"] = True
    return {"videos_kwargs": video, "return_tensors": "pt"}


@contextmanager
def reading_files(processor: Any) -> Iterator[None]:
    """transformers reads clips with torchcodec alone, which needs FFmpeg's libraries. Where it does
    not work, its own ``load_video`` reads the frames with PyAV, and our decoder the tracks."""
    if _torchcodec_works():
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(patch.object(type(processor.video_processor), "fetch_videos", _frames))
        stack.enter_context(patch.object(processing_utils, "load_audio", _sound))
        if hasattr(processing_utils, "is_torchcodec_usable"):  # 5.23 asks before it calls it
            for name in ("is_torchcodec_usable", "is_torchcodec_greater_or_equal"):
                stack.enter_context(patch.object(processing_utils, name, lambda *_, **__: True))
            stack.enter_context(patch.dict(sys.modules, {"torchcodec.decoders": _Decoders}))
        yield


@cache
def _torchcodec_works() -> bool:
    try:
        importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def _frames(self: Any, urls: Any, sample_indices_fn: Any = None) -> Any:
    if isinstance(urls, list):
        return list(zip(*(_frames(self, url, sample_indices_fn) for url in urls), strict=True))
    return video_utils.load_video(urls, backend="pyav", sample_indices_fn=sample_indices_fn)


def _sound(audio: Any, *args: Any, **keywords: Any) -> Any:
    return read_audio(inspect_file(audio)) if isinstance(audio, str) else audio


class _Decoders:
    """What 5.23 asks torchcodec: which streams a file has."""

    @staticmethod
    def get_container_metadata(path: str) -> Any:
        streams = [SimpleNamespace(media_type="audio")] * inspect_file(path).has_audio
        return SimpleNamespace(streams=streams)
