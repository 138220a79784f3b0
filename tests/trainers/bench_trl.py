"""What recording costs TRL's trainer: seconds of CPU of three recorded steps over those of three
that are not, the median of pairs run in turn.

With ``OMNI_TRAINER_RESULTS=write`` it is stored for the table of trainers, which ``python
docs/trainers_table.py`` writes.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import trl_runs
from test_trl_trainer import LANE

from omni_grpo_core import tiny
from omni_grpo_core.core.policy import load_policy


def seconds(recorded: bool) -> float:
    policy = load_policy(tiny.checkpoint_dir())
    plain = nullcontext() if recorded else mock.patch.object(trl_runs, "record", _nothing)
    with tempfile.TemporaryDirectory() as folder, plain:
        begun = time.process_time()
        rows = trl_runs.pictures()
        trl_runs.trained(Path(folder), policy.model, policy.processor, rows, max_steps=3)
        return time.process_time() - begun


def _nothing(*_: object, **__: object) -> nullcontext[None]:
    return nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=7)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    seconds(True)
    ratios = []
    for number in range(pairs):
        order = (True, False) if number % 2 else (False, True)
        took = {recorded: seconds(recorded) for recorded in order}
        ratios.append(took[True] / took[False])
    ratio = statistics.median(ratios)
    print(f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f} in {pairs} pairs)")
    LANE.cost(
        ratio,
        f"python tests/trainers/bench_trl.py --pairs {pairs}",
        f"tiny omni, pictures, CPU time, one of {os.cpu_count()} {platform.machine()} cores",
        datetime.date.today().isoformat(),
    )


if __name__ == "__main__":
    main()
