"""``omni-grpo train`` on several CUDA devices, a process on each, as a launcher starts it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omni_grpo_core.training.config import TrainConfig

TESTS = Path(__file__).parents[1]
FSDP: Mapping[str, str] = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2_5OmniDecoderLayer",
}
KEPT: Mapping[str, str] = {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}


@dataclass(frozen=True, slots=True)
class Run:
    """``codes`` and ``outputs``: by rank. ``after_kill``: seconds from the kill to the last end."""

    codes: list[int | None]
    outputs: list[str]
    seconds: float
    after_kill: float | None


def lines_of(out: Path) -> list[dict[str, Any]]:
    log = out / "log.jsonl"
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def command(
    config: TrainConfig,
    folder: Path,
    world: int,
    kind: Mapping[str, str] | None = None,
    *,
    kill: Callable[[], bool] = lambda: False,
    victims: tuple[int, ...] = (),
    limit: float = 500.0,
    program: Sequence[str] = ("-m", "omni_grpo_core", "train"),
) -> Run:
    """Run it to its end; ``victims`` are killed when ``kill()`` is true, all after ``limit``
    seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    values = {key: value for key, value in asdict(config).items() if value is not None}
    path.write_text(json.dumps(values))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {
        **os.environ, **(kind or {}), "PYTHONPATH": os.pathsep.join(map(str, (*sys.path, TESTS))),
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "4",
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    begin = time.monotonic()
    processes = []
    for rank in range(world):
        with (folder / f"rank-{rank}.txt").open("w") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *program, str(path)],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
            )
    killed = None
    while any(process.poll() is None for process in processes):
        if killed is None and victims and kill():
            killed = time.monotonic()
            for rank in victims:
                processes[rank].send_signal(signal.SIGKILL)
        if time.monotonic() - begin > limit:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    end = time.monotonic()
    return Run(
        [process.returncode for process in processes],
        [(folder / f"rank-{rank}.txt").read_text(errors="replace") for rank in range(world)],
        end - begin,
        None if killed is None else end - killed,
    )
