"""The headers of a checkpoint's weight files: shapes and types, without reading a tensor.

A pickle can run any code, and a header can state more bytes than there are: only safetensors are
read, and every number in a header is compared with the file's size.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from omni_grpo_core.core.checkpoint_files import FOREIGN, read_object, shown
from omni_grpo_core.core.family import published_name
from omni_grpo_core.errors import CheckpointError
from omni_grpo_core.io.bounded import Unreadable, json_value, plain_file

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100 << 20
"""Bytes of a weight file's header: safetensors' own limit."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = ("F64", "F32", "F16", "BF16")


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the thinker's tensors, by their published names, from the headers of its
    safetensors files. A full checkpoint's talker is left out.

    Raises:
        CheckpointError: no safetensors, a pickle in their place, a shard that is missing or in
            another folder, a header that is invalid or states more bytes than the file has.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        for name, entry in _header(path).items():
            if not name.startswith(FOREIGN):
                shapes[published_name(name.removeprefix("thinker."))] = entry
    if not shapes:
        _bad_weights(folder, "no thinker weights", "the weights of a thinker")
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / INDEX
    if single.exists():
        return [single]
    if not index.exists():
        pickles = sorted(path.name for kind in _PICKLES for path in folder.glob(kind))
        if pickles:
            _bad_weights(
                folder, f"{pickles[0]}, a pickle, which may run any code and is not read",
                "safetensors", "convert the weights to safetensors if you trust them",
            )  # fmt: skip
        _bad_weights(folder, "no model.safetensors", "weights in safetensors")
    places = read_object(index).get("weight_map")
    names = set(places.values()) if _is_map_of_texts(places) else set()
    for name in sorted(names):
        if Path(name).name != name:
            _bad_weights(index, f"the shard {shown(name)}", "a file in the same folder")
        # Path.is_file raises if the name is too long
        if not os.path.isfile(folder / name):  # noqa: PTH113
            _bad_weights(index, f"the shard {shown(name)}, which is not there", "every shard")
    if not names:
        _bad_weights(index, "no weight_map of names to files", "one")
    return [folder / name for name in sorted(names)]


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes in one file's header: 8 bytes of length, JSON, then the tensors' bytes."""
    try:
        with plain_file(path) as (file, size):
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise Unreadable(f"a header of {length} bytes in a file of {size}")
            header = json_value(file.read(length).decode("utf-8"))
    except Unreadable as error:
        _bad_weights(path, error.got, "a whole safetensors file")
    if not isinstance(header, dict):
        _bad_weights(path, f"a header that is a {type(header).__name__}", "a safetensors file")
    shapes, end = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        entry = entry if isinstance(entry, dict) else {}
        shape, place = _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
        if shape is None or place is None or len(place) != 2:
            _bad_weights(path, f"{shown(name)} without a shape and two offsets", "both")
        if name.endswith((".weight", ".bias")) and not name.startswith(FOREIGN):
            _check_dtype(path, name, entry.get("dtype"))
        # a byte holds at most two numbers
        if math.prod(shape) > 2 * (place[1] - place[0]):
            _bad_weights(path, f"{shown(name)} of shape {shape} in bytes {place}", "room for it")
        shapes[name] = tuple(shape)
        end = max(end, place[1])
    if end != size - 8 - length:
        _bad_weights(path, f"{size} bytes", f"the {end + 8 + length} that its header states")
    return shapes


def _check_dtype(path: Path, name: str, dtype: Any) -> None:
    """Others are cast silently: complex numbers lose a part, eight-bit ones lack their scale."""
    if dtype not in _DTYPES:
        _bad_weights(
            path, f"{shown(name)} of dtype {shown(dtype)}",
            f"unquantised floating-point weights, {', '.join(_DTYPES)}",
            "convert the weights again from the original checkpoint",
        )  # fmt: skip


def _bad_weights(path: Path, got: str, want: str, fix: str = "get the file again") -> NoReturn:
    raise CheckpointError(f"weights in {path}", got=got, want=want, fix=fix)


def _counts(value: Any) -> list[int] | None:
    whole = isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
    return value if whole else None


def _is_map_of_texts(value: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
