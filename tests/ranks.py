"""Several gloo processes on this machine, forked from the test: nothing is imported again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

DDP: Mapping[str, str] = {}
FSDP: Mapping[str, str] = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2_5OmniDecoderLayer",
}
LIMIT = 300
"""Seconds; only ends a hang."""


@dataclass(frozen=True, slots=True)
class Ended:
    """``code``: of a killed process the negative signal. ``output``: standard output and error."""

    code: int | None
    output: str


def codes(ended: list[Ended]) -> list[int | None]:
    return [one.code for one in ended]


def together(
    world: int, work: Callable[[int], None], folder: Path, kind: Mapping[str, str] = DDP
) -> list[Ended]:
    """``work(rank)`` in ``world`` processes, with the variables that ``accelerate launch`` sets:
    how each ended, by rank. Processes still there after :data:`LIMIT` are killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1", **kind,
    }  # fmt: skip
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_child, args=(rank, common, work, folder)) for rank in range(world)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(LIMIT)
        if child.is_alive():
            child.kill()
            child.join()
    return [
        Ended(child.exitcode, (folder / f"rank-{rank}.txt").read_text(errors="replace"))
        for rank, child in enumerate(children)
    ]


def _child(rank: int, common: Mapping[str, str], work: Callable[[int], None], folder: Path) -> None:
    handle = os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    # pytest has put its own in their place
    sys.stdout = sys.stderr = os.fdopen(handle, "w", buffering=1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    os.environ.update({**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        work(rank)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
