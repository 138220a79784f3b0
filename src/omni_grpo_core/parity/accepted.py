"""What a path returned, refused where it is not what a processor returns for one row."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.errors import BatchError, one_line

_WANTED = "what the processor returns for one row: a mapping with input_ids"
_DIMENSIONS: Mapping[str, tuple[tuple[int, ...], str]] = {
    "pixel_values": ((2,), "(patches, values of a patch)"),
    "pixel_values_videos": ((2,), "(patches, values of a patch)"),
    "image_grid_thw": ((2,), "(pictures, 3)"),
    "video_grid_thw": ((2,), "(clips, 3)"),
    "video_second_per_grid": ((0, 1, 2), "(clips,)"),
    "second_per_grid_ts": ((0, 1, 2), "(clips,)"),
    "input_features": ((2, 3), "(sounds, mel bins, frames)"),
    "feature_attention_mask": ((1, 2), "(sounds, frames)"),
    "position_ids": ((1, 2, 3), "(3, 1, tokens)"),
}


def accepted(output: Any, item: str, vocabulary: int) -> Mapping[str, Any]:
    """``output`` with its ids as an int64 tensor (L,) and positions (3, L), both without padding,
    and all else as tensors.

    ``vocabulary``: how many ids the model has. Raises :class:`~omni_grpo_core.errors.BatchError`
    for what is not one row as the processor returns it.
    """

    def refused(got: str, want: str = _WANTED, fix: str = "") -> BatchError:
        fix = fix or "return what the processor returns, for this row alone"
        return BatchError(item, got=got, want=want, fix=fix)

    if inspect.isawaitable(output):
        if inspect.iscoroutine(output):
            output.close()
        raise refused("a coroutine", fix="await it in a function that is not async")
    if inspect.isgenerator(output):
        raise refused("a generator", fix="return the row instead of yielding it")
    if not isinstance(output, Mapping):
        raise refused(_kind(output))
    if output.get("input_ids") is None:
        keys = ", ".join(sorted(map(str, output))) or "nothing"
        raise refused(f"no input_ids among {keys}")
    padded = _one_row(output["input_ids"], "input_ids", refused)
    shown = torch.ones_like(padded, dtype=torch.bool)
    if output.get("attention_mask") is not None:
        shown = _one_row(output["attention_mask"], "attention_mask", refused).bool()
        if len(shown) != len(padded):
            raise refused(f"an attention_mask of {len(shown)} for {len(padded)} ids",
                          "one for each id")  # fmt: skip
    ids = padded[shown]
    if not len(ids):
        raise refused("no ids", "at least one")
    odd = ids[(ids < 0) | (ids >= vocabulary)]
    if len(odd):
        raise refused(
            f"the id {int(odd[0])}", f"ids from 0 to {vocabulary - 1}",
            "return the prompt's ids; labels, with -100 in them, are something else",
        )  # fmt: skip
    tensors = _tensors(output, refused)
    if "position_ids" in tensors:
        places = tensors["position_ids"].reshape(-1, tensors["position_ids"].shape[-1])
        if places.shape[-1] != len(padded) or len(places) not in (1, 3, 4):
            raise refused(f"position_ids of shape {tuple(tensors['position_ids'].shape)}",
                          f"(3, 1, {len(padded)})")  # fmt: skip
        # one row counts for all three axes; a fourth in front is the text's own
        tensors["position_ids"] = places[-3:, shown].expand(3, -1)
    return {**output, **tensors, "input_ids": ids, "attention_mask": None}


def _kind(value: Any) -> str:
    if isinstance(value, list | tuple):
        inside = f" of {type(value[0]).__name__}" if value else ""
        return f"a {type(value).__name__}{inside}, of length {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _one_row(value: Any, name: str, refused: Any) -> Tensor:
    tensor = _tensor(value, name, refused)
    if tensor.dim() not in (1, 2):
        raise refused(f"{name} of shape {tuple(tensor.shape)}", "(tokens,) or (1, tokens)")
    if tensor.dim() == 2 and len(tensor) != 1:
        raise refused(f"{name} of {len(tensor)} rows", "one")
    whole = tensor.flatten().to(torch.int64)
    if tensor.is_floating_point() and not torch.equal(whole.to(tensor.dtype), tensor.flatten()):
        raise refused(f"{name} that are not whole numbers", "whole numbers")
    return whole


def _tensor(value: Any, name: str, refused: Any) -> Tensor:
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        try:
            return torch.stack([one.flatten() if one.dim() < 2 else one for one in value])
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(one.shape)) for one in value[:4])
            raise refused(f"{name} of tensors of shapes {shapes}", "one shape") from error
    try:
        return torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"{name} that are no array ({one_line(error, 200)})"
        raise refused(got, "numbers, of one length") from error


def _tensors(output: Mapping[str, Any], refused: Any) -> dict[str, Tensor]:
    found = {}
    for name, (dimensions, shape) in _DIMENSIONS.items():
        if output.get(name) is None:
            continue
        tensor = _tensor(output[name], name, refused)
        grid = name.endswith("grid_thw")
        if tensor.dim() not in dimensions or (grid and tensor.shape[-1] != 3):
            raise refused(f"{name} of shape {tuple(tensor.shape)}", shape)
        if grid and not bool((tensor >= 1).all()):
            raise refused(f"{name} of {tensor.tolist()}", "time, height and width of 1 or more")
        found[name] = tensor
    return found
