"""What the installed transformers still accepts but deprecates, and under which name it accepts a
cache: calls that users write, and the warnings they get."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from transformers import DynamicCache

from omni_grpo_core.core.forward import library_keywords
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.types import Media, Prompt, Row
from omni_grpo_core.versions.library import captured_warnings

_REMOVED = re.compile(r"(?:removed in|[Ff]rom)\s+(?:version\s+|Transformers\s+)?v?(\d+(?:\.\d+)*)")

CACHE_NAMES = ("past_key_values", "cache")


def removal(lines: Iterable[str]) -> tuple[str, str] | None:
    """The version in which something will be removed and the first line that says so.

    >>> removal(["`a` is deprecated and will be removed in version 5.40.0 for `f`."])
    ('5.40.0', '`a` is deprecated and will be removed in version 5.40.0 for `f`.')
    """
    for line in lines:
        if found := _REMOVED.search(line):
            return found[1], line
    return None


def deprecations(
    policy: Policy, prompt: Prompt, media: Media, row: Row
) -> dict[str, dict[str, str]]:
    """By call, what will be removed: the version (``gone in``) and the text (``said``), from a
    warning during the call or from its documentation. ``row`` is a clip with its track."""
    found = {}
    for name, call in {
        **_processor_calls(policy, prompt, media),
        **_model_calls(policy, row),
    }.items():
        documented: object = None
        with captured_warnings() as lines, suppress(Exception):  # errors are other facts
            documented = call()
        if notice := removal([*lines, *(documented if isinstance(documented, list) else [])]):
            found[name] = {"gone in": notice[0], "said": notice[1]}
    return found


def cache_names(policy: Policy, row: Row) -> dict[str, str]:
    """Whether a forward fills a cache passed under each of :data:`CACHE_NAMES`: ``filled``,
    ``ignored`` (nothing raised), ``refused``."""
    found = {}
    for name in CACHE_NAMES:
        cache = DynamicCache()
        with captured_warnings():
            try:
                _forward(policy, row, **{name: cache})
            except Exception:  # whatever this version raises
                found[name] = "refused"
                continue
        found[name] = "filled" if cache.get_seq_length() else "ignored"
    return found


@torch.no_grad()
def _forward(policy: Policy, row: Row, **keywords: Any) -> Any:
    return policy.model(**library_keywords(policy, row), **keywords, use_cache=True)


def _processor_calls(
    policy: Policy, prompt: Prompt, media: Media
) -> dict[str, Callable[[], object]]:
    takes_indices = hasattr(policy.processor, "load_audio_from_video")
    flag = "load_audio_from_video" if takes_indices else "use_audio_in_video"
    owned: dict[str, Any] = {"audio_from_video_indices": [0]} if takes_indices else {}

    def process(**keywords: Any) -> Callable[[], object]:
        return lambda: policy.processor(
            text=[prompt.text],
            videos=[video.frames for video in media.videos],
            audio=[audio.samples.numpy() for audio in media.audios],
            return_tensors="pt",
            fps=media.videos[0].sample_fps,
            **{"do_resize": False, **owned, **keywords},
        )

    right = {flag: True}
    in_videos = {"seconds_per_chunk": 2.0, "position_id_per_seconds": 25}
    return {
        "processor(use_audio_in_video=…)": process(use_audio_in_video=True),
        "processor(videos_kwargs={'load_audio_from_video': …})": process(
            videos_kwargs={"load_audio_from_video": True}
        ),
        **{
            f"processor(videos_kwargs={{'{name}': …}})": process(
                videos_kwargs={name: value}, **right
            )
            for name, value in in_videos.items()
        },
        "processor(text_kwargs={'return_mm_token_type_ids': …})": process(
            text_kwargs={"return_mm_token_type_ids": True}, **right
        ),
        "processor(min_pixels=…, max_pixels=…)": process(
            min_pixels=56 * 56, max_pixels=56 * 56, do_resize=True, **right
        ),
    }


def _model_calls(policy: Policy, row: Row) -> dict[str, Callable[[], object]]:
    def generate() -> None:
        policy.model.generate(
            **library_keywords(policy, row),
            past_key_values=DynamicCache(),
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=policy.pad_token_id,
        )

    def checkpointing() -> None:
        policy.model.gradient_checkpointing_enable()
        policy.model.gradient_checkpointing_disable()

    def deltas() -> list[str]:
        lines = (type(_forward(policy, row)).__doc__ or "").splitlines()
        return [
            line.strip()
            for before, line in pairwise(lines)
            if before.strip().startswith("rope_deltas") or "attribute is deprecated" in line
        ]

    return {
        "model(past_key_values=…)": lambda: _forward(policy, row, past_key_values=DynamicCache()),
        "generate(past_key_values=…)": generate,
        "gradient_checkpointing_enable()": checkpointing,
        "model(…).rope_deltas": deltas,
    }
