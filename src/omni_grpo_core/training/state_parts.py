"""The tensors of a saved state: what learns and the optimizer's, without what can be loaded again.

Each process that holds a part writes it, ``part-1-of-2.bin``, and nothing is gathered: under FSDP
its rows of every weight, else one process all of them. A run may go on with another number of
processes: each takes its rows from the parts that have them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from omni_grpo_core.training.exhausted import bytes_of


def learning(model: Any) -> dict[str, Tensor]:
    """What learns, by name, in the order in which the optimizer has it."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def size(model: Any, optimizer: Any, *, rank: int) -> int:
    """Bytes of this process's part."""
    if rank and not _sharded(learning(model)):
        return 0
    states = (v for state in optimizer.state.values() for v in state.values())
    tensors = [v for v in (*learning(model).values(), *states) if isinstance(v, Tensor)]
    return sum(map(bytes_of, tensors))


def write_part(
    folder: Path, model: Any, optimizer: Any, *, rank: int, world: int
) -> dict[str, list[Any]]:
    """Write this process's part: name -> size and SHA-256. Nothing if another one has all of it."""
    weights = learning(model)
    if not _sharded(weights):
        if rank:
            return {}
        world = 1
    name = f"part-{rank + 1}-of-{world}.bin"
    content = {
        "weights": {key: _own(weight) for key, weight in weights.items()},
        "optimizer": _each(optimizer.state_dict(), _own),
    }
    with (folder / name).open("wb") as file, ThreadPoolExecutor(1) as beside, _no_crc():
        hashing: Any = _Hashing(file, beside)
        torch.save(content, hashing)
        file.flush()
        os.fsync(file.fileno())
    return {name: [hashing.size, hashing.digest.hexdigest()]}


def read_parts(folder: Path, files: Sequence[str], model: Any, optimizer: Any) -> None:
    """Fill weights and optimizer with what :func:`write_part` wrote, all parts of which are among
    ``files``. Raises ``ValueError``, and what torch raises, if it is not of this model."""
    names = sorted((name for name in files if name.startswith("part-")), key=_number)
    weights = learning(model)
    whole = len(names) == 1 and not _sharded(weights)
    parts = [
        # rows are copied from what is mapped
        torch.load(folder / name, map_location="cpu", weights_only=True, mmap=not whole)
        for name in names
    ]
    if not parts or len(parts) != int(names[0].rpartition("-")[2].partition(".")[0]):
        raise ValueError(f"{len(parts)} parts: {', '.join(names)}")
    for part in parts:
        if part["weights"].keys() != weights.keys():
            raise ValueError("weights of other names")
    with torch.no_grad():
        for name, weight in weights.items():
            _own(weight).copy_(_rows([part["weights"][name] for part in parts], weight))
    states = [part["optimizer"]["state"] for part in parts]
    merged = {
        index: {
            key: _joined([state[index][key] for state in states], weight)
            for key in states[0][index]
        }
        for index, weight in enumerate(weights.values())
        if index in states[0]
    }
    optimizer.load_state_dict({**parts[0]["optimizer"], "state": merged})


def _sharded(weights: Mapping[str, Tensor]) -> bool:
    return any(isinstance(weight, DTensor) for weight in weights.values())


def _number(name: str) -> int:
    return int(name.split("-")[1])


def _own(value: Any) -> Any:
    """This process's rows of a tensor that is sharded; anything else as it is."""
    found = value.to_local() if isinstance(value, DTensor) else value
    return found.detach() if isinstance(found, Tensor) else found


def _joined(parts: Sequence[Any], weight: Tensor) -> Any:
    """One value of the optimizer's state of ``weight``, as this process holds it."""
    first = parts[0]
    if len(parts) == 1 and not isinstance(weight, DTensor):
        return first
    if not isinstance(first, Tensor) or first.dim() == 0:
        return first.clone() if isinstance(first, Tensor) else first
    rows = _rows(parts, weight)
    if not isinstance(weight, DTensor):
        return rows
    return DTensor.from_local(
        rows.to(weight.device), weight.device_mesh, weight.placements,
        shape=weight.shape, stride=weight.stride(),
    )  # fmt: skip


def _rows(parts: Sequence[Tensor], weight: Tensor) -> Tensor:
    """This process's rows of a tensor of the shape of ``weight``, of which ``parts`` are the rows
    in order. FSDP gives each process equally many, and the last ones fewer or none."""
    total = sum(len(part) for part in parts)
    if any(part.shape[1:] != weight.shape[1:] for part in parts) or total != weight.shape[0]:
        raise ValueError(f"{total} rows of {list(parts[0].shape[1:])} for {list(weight.shape)}")
    first, count = 0, total
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        first = min(total, mesh.get_local_rank() * -(-total // mesh.size()))
        count = len(weight.to_local())
    found, begin = [], 0
    for part in parts:
        lower, upper = max(first, begin), min(first + count, begin + len(part))
        if lower < upper:
            found.append(part[lower - begin : upper - begin])
        begin += len(part)
    return torch.cat(found) if found else parts[0][:0]


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _each(inner, change) for key, inner in value.items()}
    return [_each(inner, change) for inner in value] if isinstance(value, list) else change(value)


class _Hashing:
    """A file that knows size and SHA-256 of what is written to it: reading 50 GB again takes as
    long as writing them. Both happen at once."""

    def __init__(self, file: Any, beside: Executor) -> None:
        self._file, self._beside = file, beside
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        hashed = self._beside.submit(self.digest.update, data)
        try:
            written = int(self._file.write(data))
        finally:
            hashed.result()
        self.size += written
        return written

    def flush(self) -> None:
        self._file.flush()


@contextmanager
def _no_crc() -> Iterator[None]:
    """torch's own checksum is slower than the disk."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
