"""Two processes of one run, over gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch
from accelerate.state import AcceleratorState


def join(rank: int, port: int) -> None:
    """Be one of two ranks, in a forked process."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)


def both(target: Callable[..., None], *given: object) -> list[int | None]:
    """Exit codes of two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # forked: a new process would spend its time importing torch and transformers
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=target, args=(rank, port, *given)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return [rank.exitcode for rank in ranks]
