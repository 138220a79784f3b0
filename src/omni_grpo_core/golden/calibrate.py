"""How far apart are two runs of the same thing on this platform?

The cases are run again and again in processes of their own, with one and two threads and with each
of the vector instruction sets that torch can be told to use, and held against the first run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.golden.lanes import LANES, load_lanes
from omni_grpo_core.golden.store import all_files, read_golden
from omni_grpo_core.golden.text import compare_goldens
from omni_grpo_core.strict import read_mapping
from omni_grpo_core.trace.atomic import write_file
from omni_grpo_core.trace.divergence import Lane, Tolerances

VARIATIONS: tuple[Mapping[str, str], ...] = tuple(
    {"OMP_NUM_THREADS": threads, "ATEN_CPU_CAPABILITY": capability}
    for capability in ("default", "avx2", "avx512")
    for threads in ("1", "2")
)
_ROOM = 4.0
"""A lane is this many times what was measured: other machines round elsewhere."""


@dataclass(frozen=True, slots=True)
class StageDrift:
    """Over all cases and runs: the largest |Δ| of any float of a stage, and whether every
    difference lies within the lane in force."""

    stage: str
    max_abs: float
    within: bool


@dataclass(frozen=True, slots=True)
class Calibration:
    platform: str
    runs: int
    stages: tuple[StageDrift, ...]

    @property
    def within(self) -> bool:
        return all(stage.within for stage in self.stages)

    @property
    def max_abs(self) -> float:
        return max((stage.max_abs for stage in self.stages), default=0.0)

    def lines(self) -> list[str]:
        """For a person."""
        told = [f"{s.stage:13} max |Δ| {s.max_abs:.3g}" for s in self.stages if s.max_abs]
        verdict = "within the lane" if self.within else "beyond the lane"
        last = f"{self.platform}: {self.runs} runs, max |Δ| {self.max_abs:.3g}: {verdict}"
        return [*told, last]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "within": self.within}


def run_golden(python: str, arguments: Sequence[str], environ: Mapping[str, str]) -> str:
    """``omni-grpo golden ARGUMENTS`` in another process -> its stdout. Exit code 1 (differs) is
    an answer.

    Raises:
        ConfigError: any other exit code, with the last lines it wrote.
    """
    done = subprocess.run(
        [python, "-m", "omni_grpo_core", "golden", *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1) or (done.returncode and not done.stdout):
        lines = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise ConfigError(
            f"omni-grpo golden {arguments[0]} with {python}",
            got=f"exit code {done.returncode}: {' / '.join(lines)}",
            want="a run that ends well",
            fix="run it by hand; PYTHONPATH may have to name this package",
        )
    return done.stdout


def calibrate(
    folder: Path, work: Path, key: str, runs: int, arguments: Sequence[str]
) -> Calibration:
    """``runs`` records in ``work`` under the variations in turn. ``arguments``: further options of
    ``record`` (cases, checkpoint, device)."""
    for number in range(runs):
        target = str(work / str(number))
        run_golden(
            sys.executable,
            ["record", target, "--golden", str(folder), *arguments],
            VARIATIONS[number % len(VARIATIONS)],
        )
    tolerances = load_lanes(folder, key)
    found: dict[str, StageDrift] = {}
    for number in range(1, runs):
        for path in all_files(work / "0"):
            again = work / str(number) / path.parent.name / path.name
            drift = _compared(path, again, tolerances)
            before = found.get(drift.stage, drift)
            found[drift.stage] = StageDrift(
                drift.stage,
                max(before.max_abs, drift.max_abs),
                before.within and drift.within,
            )
    return Calibration(key, runs, tuple(found.values()))


def _compared(path: Path, again: Path, tolerances: Tolerances) -> StageDrift:
    was = read_golden(path)
    compared = compare_goldens(was, read_golden(again), tolerances)
    return StageDrift(was.stage, compared.max_abs, compared.verdict != "differs")


def record_lanes(folder: Path, found: Calibration) -> Path:
    """Write the platform's lanes to ``lanes.yaml``: those in force, or if the runs went beyond
    them four times what was measured.

    Raises:
        ConfigError: a lane is on record already and would be widened.
    """
    file = folder / LANES
    recorded = read_mapping(file) if file.is_file() else {}
    lanes = load_lanes(folder, found.platform)
    new = {
        dtype: lane if found.within else Lane(max(lane.atol, _ROOM * found.max_abs), lane.rtol)
        for dtype in ("float32", "float")
        for lane in [lanes.lane(dtype)]
    }
    if found.platform in recorded and not found.within:
        raise ConfigError(
            str(file),
            got=f"runs that are {found.max_abs:.3g} apart",
            want=f"at most the lane on record for {found.platform}",
            fix="a lane is not widened: find what became less repeatable",
        )
    recorded = {**recorded, found.platform: {name: asdict(lane) for name, lane in new.items()}}
    write_file(file, yaml.safe_dump(recorded, sort_keys=True).encode())
    return file
