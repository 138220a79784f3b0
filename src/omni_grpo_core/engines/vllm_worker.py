"""What runs inside a vLLM worker: ``worker_extension_cls`` mixes it into vLLM's own ``Worker``.

Nothing of this project besides the fingerprint is needed there, and no vLLM is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.family import FAMILIES
from omni_grpo_core.engines.weights import fingerprint


class WorkerExtension:
    """Methods for ``LLM.collective_rpc``, called by name."""

    model_runner: Any

    def omni_load(self, folder: str) -> str:
        """Take the weights of ``folder``; the fingerprint is of what this worker read. vLLM forgets
        encoder outputs with it; the prefix cache is the engine's to reset."""
        found = fingerprint(Path(folder))
        self.model_runner.reload_weights(weights_path=folder)
        return found

    def omni_true_positions(self) -> bool:
        """Compute the positions of interleaved rows by transformers' own ``get_rope_index``.

        vLLM (0.32) begins an interleaved video's positions at the audio's begin token instead of
        after it: every position of the clip is one token early, its logprobs are off by up to 0.3
        nats on the tiny checkpoint, and nothing is raised. Returns whether the model has any.
        """
        model = self.model_runner.get_model()
        own = getattr(model, "_compute_interleaved_positions", None)
        if own is None:
            return False
        reference = _reference_thinker(model.config)
        before = model.get_mrope_input_positions

        def positions(_: Any, input_tokens: list[int], mm_features: Sequence[Any]) -> Any:
            if not any(_flag(feature, "use_audio_in_video") for feature in mm_features):
                return before(input_tokens, mm_features)
            return _interleaved_positions(reference, input_tokens, mm_features)

        model.get_mrope_input_positions = MethodType(positions, model)
        return True


def _reference_thinker(config: Any) -> Any:
    """transformers' thinker of the config, without memory for weights."""
    import transformers

    classes = [getattr(transformers, family.thinker_class) for family in FAMILIES]
    thinker = next(one for one in classes if isinstance(config, one.config_class))
    with torch.device("meta"):
        return thinker(config)


def _interleaved_positions(
    reference: Any, input_tokens: list[int], mm_features: Sequence[Any]
) -> tuple[Tensor, int]:
    """(3, tokens), and by how much the next position exceeds the number of tokens."""
    ordered = sorted(mm_features, key=lambda feature: feature.mm_position.offset)

    def stacked(modality: str, key: str) -> Tensor | None:
        found = [f.data[key].data for f in ordered if f.modality == modality]
        return torch.stack([value.reshape(value.shape) for value in found]) if found else None

    ids = torch.tensor([input_tokens])
    where, deltas = reference.get_rope_index(
        ids,
        stacked("image", "image_grid_thw"),
        stacked("video", "video_grid_thw"),
        torch.ones_like(ids),
        True,
        stacked("audio", "audio_feature_lengths"),
        stacked("video", "second_per_grid_ts"),
    )
    return where[:, 0], int(deltas)


def _flag(feature: Any, key: str) -> bool:
    found = feature.data.get(key) if feature.data is not None else None
    return found is not None and bool(found.data.item())
