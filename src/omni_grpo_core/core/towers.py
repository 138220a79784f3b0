"""The vision and audio towers' features for the media of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.types import Batch, Modality

_FEATURES: Mapping[Modality, tuple[str, tuple[str, ...]]] = {
    "image": ("get_image_features", ("pixel_values", "image_grid_thw")),
    "video": ("get_video_features", ("pixel_values_videos", "video_grid_thw")),
    "audio": ("get_audio_features", ("input_features", "feature_attention_mask")),
}


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """One modality's features, in token order. ``tokens``: (placeholders, H), in place of the
    placeholders. ``deep``: (placeholders, H) for each of the first text layers, added after it
    (DeepStack, arXiv 2406.04334); none for audio or in a family without it."""

    tokens: Tensor
    deep: tuple[Tensor, ...] = ()


def features(policy: Policy, batch: Batch) -> dict[Modality, Features]:
    """Each modality's features for the whole batch."""
    result: dict[Modality, Features] = {}
    for modality, (method, keys) in _FEATURES.items():
        if keys[0] in batch.tensors:
            inputs = {key: batch.tensors[key].to(policy.device) for key in keys}
            inputs[keys[0]] = inputs[keys[0]].to(policy.model.dtype)
            tower = getattr(policy.model, method)
            alone = modality == "audio" and policy.family.audio_one_by_one
            result[modality] = _one_by_one(tower, inputs) if alone else _unpacked(tower(**inputs))
    return result


def _one_by_one(tower: Any, inputs: Mapping[str, Tensor]) -> Features:
    """Each audio in its own call: in one call they would affect each other."""
    count = len(inputs["input_features"])
    alone = [{key: value[i : i + 1] for key, value in inputs.items()} for i in range(count)]
    return Features(torch.cat([_unpacked(tower(**keywords)).tokens for keywords in alone]))


@contextmanager
def audios_alone(policy: Policy) -> Iterator[None]:
    """Makes transformers' own forward compute each audio as if it were alone, in a family where the
    audios of a call affect each other."""
    if not policy.family.audio_one_by_one:
        yield
        return
    modules = policy.model.named_modules()
    tower = next(module for name, module in modules if name.endswith("audio_tower"))
    whole = tower.forward

    def alone(input_features: Tensor, feature_lens: Tensor, **more: Any) -> Any:
        parts = torch.split(input_features, feature_lens.tolist(), dim=1)  # packed: (mels, frames)
        lengths = torch.split(feature_lens, 1)
        outputs = [
            whole(part, feature_lens=n, **more) for part, n in zip(parts, lengths, strict=True)
        ]
        outputs[0].last_hidden_state = torch.cat([one.last_hidden_state for one in outputs])
        return outputs[0]

    tower.forward = alone
    try:
        yield
    finally:
        del tower.forward


def _unpacked(output: Any) -> Features:
    """4.x returns a tensor, or for deepstack a tensor and a list by layer; 5.x an output whose
    ``pooler_output`` lists vision items, whose ``last_hidden_state`` holds audio, and whose
    ``deepstack_features`` hold a tensor per layer, from 5.23 on its items."""
    if isinstance(output, Tensor):
        return Features(output)
    if isinstance(output, tuple):
        tokens, deep = output
        return Features(tokens, tuple(deep))
    pooled = getattr(output, "pooler_output", None)
    tokens = output.last_hidden_state if pooled is None else pooled
    layers = getattr(output, "deepstack_features", None) or ()
    return Features(_joined(tokens), tuple(_joined(layer) for layer in layers))


def _joined(items: Any) -> Tensor:
    return items if isinstance(items, Tensor) else torch.cat(list(items))
