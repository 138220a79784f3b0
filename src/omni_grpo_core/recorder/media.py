"""Images, clips and waveforms as a processor receives them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni_grpo_core.recorder.tensors import copied
from omni_grpo_core.trace.calls import MediumSeen
from omni_grpo_core.types import Modality


def media_seen(
    modality: Modality, given: Any, fits: Callable[[Tensor], bool]
) -> tuple[MediumSeen, ...]:
    """Every medium of one processor argument, in call order. An object passed several times (a
    prompt repeated for its group) is described once."""
    known: dict[int, MediumSeen] = {}
    items = _items(modality, given)
    return tuple(
        known.setdefault(id(item), known.get(id(item)) or _seen(modality, item, fits))
        for item in items
    )


def _items(modality: Modality, given: Any) -> list[Any]:
    """A single medium, a list of them, or a list per row."""
    if given is None:
        return []
    if not isinstance(given, list | tuple):
        array = getattr(given, "ndim", None)
        batched = array is not None and array > {"image": 3, "video": 4, "audio": 1}[modality]
        return list(given) if batched else [given]
    if _is_one(modality, given):
        return [given]
    return [item for element in given for item in _items(modality, element)]


def _is_one(modality: Modality, given: Sequence[Any]) -> bool:
    """Whether a list is itself one medium: the frames of a clip, the samples of a waveform."""
    first = given[0] if len(given) else None
    if modality == "audio":
        return isinstance(first, float | int)
    if modality == "video":
        return hasattr(first, "size") and getattr(first, "ndim", 3) == 3
    return False


def _seen(modality: Modality, item: Any, fits: Callable[[Tensor], bool]) -> MediumSeen:
    if isinstance(item, str | bytes):
        text = item.encode() if isinstance(item, str) else item
        return MediumSeen(
            modality, None, (), "path", hashlib.sha256(text).hexdigest(), *(math.nan,) * 4
        )
    tensor = _tensor(item)
    wide = tensor.float() if tensor.numel() else torch.full((1,), math.nan)
    low, high = torch.aminmax(wide)
    mean, std = wide.mean(), wide.var(correction=0).sqrt()
    return MediumSeen(
        modality=modality,
        values=copied(tensor) if fits(tensor) else None,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        sha256=_hash(tensor),
        low=float(low),
        high=float(high),
        mean=float(mean),
        std=float(std),
    )


def _tensor(item: Any) -> Tensor:
    if isinstance(item, Tensor):
        return item.detach().cpu()
    if isinstance(item, list | tuple):
        return torch.stack([_tensor(frame) for frame in item])
    array = np.asarray(item)
    if array.dtype == np.float16 or array.dtype.kind in "biuf":
        # a copy: arrays of images are read-only, which torch warns about
        return torch.from_numpy(np.array(array))
    return torch.empty(0)


def _hash(tensor: Tensor) -> str:
    flat = tensor.contiguous().flatten()
    # bfloat16 has no numpy dtype; only the bytes matter
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
