"""How long the doctor takes on a recording, from a fresh process: imports, checkpoint, diagnosis.

::

    python tests/benchmarks/bench_doctor.py [--steps 3] [--fault ID …] [--html]

Records ``steps`` of the clean loop, sound, and once with each fault (a finding is reproduced, which
takes longest), and runs ``omni-grpo doctor`` on each recording with one thread. Prints one JSON
object: seconds of processor time and of wall time by fault (``""``: sound), and bytes recorded. The
goal is 15 s of one core for three steps.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from omni_grpo_core.faults.config import LoopConfig
from omni_grpo_core.faults.plan import BY_ID
from omni_grpo_core.faults.reference_loop import ReferenceLoop
from omni_grpo_core.faults.trial import config_for, recording, reference

FAULTS = ("media.reversed", "batch.resized-again", "gen.checkpointing-train")


def recorded(folder: Path, fault: str, steps: int) -> None:
    faults = [BY_ID[fault]] if fault else []
    config = config_for(faults, LoopConfig(rows=(0, 5), group_size=4, max_new_tokens=48))
    assert config is not None
    loop = ReferenceLoop(reference(config.dtype).policy, config)
    with recording(loop, faults, folder, steps) as recorder:
        for _ in range(steps):
            loop.step(recorder)


def diagnosed(folder: Path, html: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "omni_grpo_core", "doctor", str(folder), "--json"]
    command += ["--html", str(folder / "page.html")] if html else []
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode > 1:
        sys.exit(ended.stderr.decode())
    used = sum(getattr(after, kind) - getattr(before, kind) for kind in ("ru_utime", "ru_stime"))
    size = sum(file.stat().st_size for file in folder.rglob("*.*") if file.suffix != ".html")
    return {"cpu_seconds": round(used, 2), "seconds": round(wall, 2), "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--fault", action="append", choices=sorted(BY_ID))
    parser.add_argument("--html", action="store_true")
    given = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for fault in ("", *(given.fault or FAULTS)):
            place = Path(folder) / (fault or "sound")
            recorded(place, fault, given.steps)
            found[fault] = diagnosed(place, given.html)
    print(json.dumps({"steps": given.steps, "by_fault": found}, indent=1))


if __name__ == "__main__":
    main()
