"""What the installed transformers does with calls that users write: facts, as plain values.

Nothing here judges: a fact is what was returned, logged or raised. The calls are those of a trainer
or a script, not of this package, which adapts to each version.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as library_logging

from omni_grpo_core.core.forward import library_forward
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.types import Media, Prompt, Row

KEYWORDS: Mapping[str, Mapping[str, Any]] = {
    "use_audio_in_video": {"use_audio_in_video": True},
    "load_audio_from_video": {"load_audio_from_video": True},
    "load_audio_from_video, audio_from_video_indices": {
        "load_audio_from_video": True,
        "audio_from_video_indices": [0],
    },
}
"""Ways to state that the one audio passed is the one video's own track."""

_FEATURES = {
    "image": ("get_image_features", ("pixel_values", "image_grid_thw")),
    "video": ("get_video_features", ("pixel_values_videos", "video_grid_thw")),
    "audio": ("get_audio_features", ("input_features", "feature_attention_mask")),
}


def audio_in_video_calls(
    policy: Policy, prompt: Prompt, media: Media, row: Row
) -> dict[str, dict[str, Any]]:
    """One clip with its decoded track through the processor, with each of :data:`KEYWORDS`.

    ``row`` is the expected result. ``outcome``: ``right``, ``lost`` (nothing raised, but ids
    without the track's placeholders), ``other``, or ``refused``. ``detail``: number of tokens, or
    what was raised. ``told``: warnings about the keywords.
    """
    found = {}
    for name, keywords in KEYWORDS.items():
        with captured_warnings() as lines:
            outcome, detail = _call(policy, prompt, media, row, keywords)
        deprecated = [line for line in lines if any(word in line for word in keywords)]
        found[name] = {"outcome": outcome, "detail": detail, "told": deprecated}
    return found


def _call(
    policy: Policy, prompt: Prompt, media: Media, row: Row, keywords: Mapping[str, Any]
) -> tuple[str, str]:
    try:
        output = policy.processor(
            text=[prompt.text],
            videos=[video.frames for video in media.videos],
            audio=[audio.samples.numpy() for audio in media.audios],
            fps=media.videos[0].sample_fps,
            do_resize=False,
            return_tensors="pt",
            **keywords,
        )
    except Exception as error:  # whatever this version raises is the fact
        return "refused", f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    ids = output["input_ids"][0].tolist()
    detail = f"{len(ids)} tokens for {len(row.input_ids)}"
    if ids == row.input_ids.tolist():
        return "right", detail
    token = policy.processor.tokenizer.convert_tokens_to_ids(policy.processor.audio_token)
    return "other" if token in ids else "lost", detail


def template_type(policy: Policy) -> str:
    """What ``apply_chat_template`` returns for one conversation, not for a list of them."""
    content = [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "What?"}]
    text = policy.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return f"list of {len(text)}" if isinstance(text, list) else type(text).__name__


@torch.no_grad()
def feature_types(policy: Policy, rows: Sequence[Row]) -> dict[str, str]:
    """What the methods that call the towers return, by modality."""
    found = {}
    for modality, (method, keys) in _FEATURES.items():
        row = next(row for row in rows if keys[0] in row.tensors)
        inputs = {key: row.tensors[key].to(policy.device) for key in keys}
        output = getattr(policy.model, method)(**inputs)
        pooled = getattr(output, "pooler_output", None)
        field = f", pooler_output {type(pooled).__name__}" if pooled is not None else ""
        found[modality] = f"{type(output).__name__}{field}"
    return found


def rope_deltas(policy: Policy, row: Row) -> dict[str, Any]:
    """Where a forward on ``row`` stores ``rope_deltas``, and its value; the next step reads it."""
    library_forward(policy, row)
    places = {"thinker": policy.model, "thinker.model": policy.model.model}
    for place, module in places.items():
        value = getattr(module, "rope_deltas", None)
        if isinstance(value, Tensor):
            return {"place": place, "shape": list(value.shape), "value": value.flatten().tolist()}
    return {"place": "nowhere", "shape": [], "value": []}


@contextmanager
def captured_warnings() -> Iterator[list[str]]:
    """The lines that transformers logs or warns inside the block."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, listener = logging.getLogger("transformers"), Listener(logging.WARNING)
    before = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.WARNING)
    # a once-per-process warning may have been issued before
    library_logging.warning_once.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lines
        lines += [str(warning.message) for warning in caught]
    finally:
        logger.setLevel(before)
        logger.removeHandler(listener)
