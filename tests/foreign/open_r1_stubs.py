"""Stands in for what the open-r1 scripts import and a machine without a GPU can't install.

Of ``decord`` what qwen-omni-utils reads clips with, on PyAV; of the rest the names alone.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import av
import numpy as np


class _Batch:
    def __init__(self, frames: np.ndarray[Any, Any]) -> None:
        self._frames = frames

    def asnumpy(self) -> np.ndarray[Any, Any]:
        return self._frames


class VideoReader:
    """All frames of a clip, (T, H, W, 3) in RGB."""

    def __init__(self, path: str) -> None:
        with av.open(path) as container:
            stream = container.streams.video[0]
            self._rate = float(stream.average_rate or 1)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        self._frames = np.stack(frames)

    def __len__(self) -> int:
        return len(self._frames)

    def get_avg_fps(self) -> float:
        return self._rate

    def get_batch(self, numbers: list[int]) -> _Batch:
        return _Batch(self._frames[numbers])


def install() -> None:
    """Before anything of a checkout is imported."""
    _module("whisper")
    _module("decord", VideoReader=VideoReader, AudioReader=None, cpu=None)
    # names of transformers 4.51, which the scripts patch for flash-attn
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

    names = (
        "Qwen2_5_VLVisionFlashAttention2",
        "apply_rotary_pos_emb_flashatt",
        "flash_attn_varlen_func",
    )
    for name in names:
        setattr(modeling, name, getattr(modeling, name, type(name, (), {})))


def _module(name: str, **held: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(held)
    sys.modules[name] = module
