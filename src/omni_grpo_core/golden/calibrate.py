"""How far apart are two runs of the same thing on this platform?

The cases are recorded once and then checked against that record again and again, in processes of
their own: on a CPU with one and two threads and with each of the vector instruction sets that torch
can be told to use, on a CUDA device with each way that torch has to multiply matrices.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.golden.classify import base_stage
from omni_grpo_core.golden.results import FINE
from omni_grpo_core.golden.suite import copy_suite
from omni_grpo_core.golden.tolerances import TOLERANCES, load_tolerances, tolerances_file
from omni_grpo_core.io.atomic import write_file
from omni_grpo_core.io.strict import read_mapping
from omni_grpo_core.tolerances import Tolerance

VARIATIONS: tuple[Mapping[str, str], ...] = tuple(
    {"OMP_NUM_THREADS": threads, "ATEN_CPU_CAPABILITY": capability}
    for capability in ("default", "avx2", "avx512")
    for threads in ("1", "2")
)
CUDA_VARIATIONS: tuple[Mapping[str, str], ...] = (
    {},
    {"TORCH_BLAS_PREFER_CUBLASLT": "1"},
    {"DISABLE_ADDMM_CUDA_LT": "1"},
    # other workspaces: other algorithms, split along the sum or not
    {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "0"},
    {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
)
_ROOM = 2.0
"""A tolerance is this many times what was measured: other machines round elsewhere."""


@dataclass(frozen=True, slots=True)
class StageDrift:
    """Over all cases and runs: the largest |Δ| of any float of a stage, and whether every
    difference lies within the tolerance in force. ``turned``: the tokens of a completion did, at a
    near tie; from there on it is another text, and its floats are not counted."""

    stage: str
    max_abs: float
    within: bool
    turned: bool = False

    def joined(self, other: StageDrift) -> StageDrift:
        """Both, as one."""
        return StageDrift(
            self.stage,
            max(self.max_abs, other.max_abs),
            self.within and other.within,
            self.turned or other.turned,
        )


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
        told = [
            f"{s.stage:13} max |Δ| {s.max_abs:.3g}"
            + ("" if s.within else ", beyond tolerance")
            + ("; a near tie turned" if s.turned else "")
            for s in self.stages
            if s.max_abs or s.turned
        ]
        verdict = "within tolerance" if self.within else "beyond tolerance"
        last = f"{self.platform}: {self.runs} runs, max |Δ| {self.max_abs:.3g}: {verdict}"
        return [*told, last]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "within": self.within}


def run_golden(python: str, arguments: Sequence[str], environ: Mapping[str, str]) -> str:
    """``omni-grpo golden ARGUMENTS`` in another process -> its stdout. Exit code 1 (differs) is
    an answer.

    Raises:
        ConfigError: it cannot be started, or any other exit code, with the last lines it wrote.
    """
    try:
        done = subprocess.run(
            [python, "-m", "omni_grpo_core", "golden", *arguments],
            env={**os.environ, **environ, "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise _failed(python, arguments, str(error.strerror)) from None
    if done.returncode not in (0, 1) or (done.returncode and not done.stdout):
        lines = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise _failed(python, arguments, f"exit code {done.returncode}: {' / '.join(lines)}")
    return done.stdout


def checked(python: str, arguments: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
    """What ``omni-grpo golden check --json ARGUMENTS`` answers in another process.

    Raises:
        ConfigError: as :func:`run_golden`, or it answers something else.
    """
    command = ["check", "--json", *arguments]
    answer = run_golden(python, command, environ)
    try:
        found = json.loads(answer)
    except ValueError:
        found = None
    if not isinstance(found, dict) or "cases" not in found:
        raise _failed(python, command, "something else than a report on stdout")
    return found


def _failed(python: str, arguments: Sequence[str], got: str) -> ConfigError:
    return ConfigError(
        f"omni-grpo golden {arguments[0]} with {python}",
        got=got,
        want="a run that ends well",
        fix="run it by hand; PYTHONPATH may have to name this package",
    )


def calibrate(
    folder: Path, work: Path, key: str, runs: int, arguments: Sequence[str]
) -> Calibration:
    """One record in ``work`` and ``runs - 1`` checks against it, under the variations in turn.
    ``arguments``: further options of both (cases, checkpoint, device)."""
    variations = CUDA_VARIATIONS if key.startswith("cuda") else VARIATIONS
    first = work / "first"
    copy_suite(folder, first)
    record = ["record", str(first), "--golden", str(first), *arguments]
    run_golden(sys.executable, record, variations[0])
    if (recorded := tolerances_file(folder)).is_file():
        shutil.copy(recorded, first / TOLERANCES)
    check = ["--golden", str(first), *arguments]
    found: dict[str, StageDrift] = {}
    for number in range(1, runs):
        answer = checked(sys.executable, check, variations[number % len(variations)])
        for case in answer["cases"]:
            for stage in map(_drift, case["stages"]):
                found[stage.stage] = stage.joined(found.get(stage.stage, stage))
    return Calibration(key, runs, tuple(found.values()))


def _drift(stage: Mapping[str, Any]) -> StageDrift:
    """From one stage of a check's answer."""
    name = stage["stage"]
    fine = stage["verdict"] in FINE
    turned = base_stage(name) == "completion" and any(
        d["verdict"] == "differs" and d["path"].endswith(".token_ids") for d in stage["differences"]
    )
    within = fine or (turned and stage["verdict"] == "benign-drift")
    return StageDrift(name, float(stage["max_abs"]), within, turned)


def record_tolerances(folder: Path, found: Calibration) -> Path:
    """Write the platform's tolerances to ``tolerances.yaml``: those in force, and for each stage
    whose runs went beyond them one of its own, twice what was measured.

    Raises:
        ConfigError: tolerances are on record already and would be widened.
    """
    file = tolerances_file(folder)
    recorded = read_mapping(file) if os.path.lexists(file) else {}
    if found.platform in recorded and not found.within:
        beyond = next(stage for stage in found.stages if not stage.within)
        raise ConfigError(
            f"{file}: {beyond.stage}",
            got=f"runs that are {beyond.max_abs:.3g} apart",
            want=f"at most the tolerance on record for {found.platform}",
            fix="a tolerance is not widened: find what became less repeatable",
        )
    known = load_tolerances(folder, found.platform)
    new = {name: known.plain.of(name) for name in ("float32", "float")} | dict(known.stages)
    for stage in found.stages:
        if not stage.within:
            name = base_stage(stage.stage)
            before = new.get(name, known.plain.of("float"))
            new[name] = Tolerance(max(before.atol, _ROOM * stage.max_abs), before.rtol)
    recorded = {**recorded, found.platform: {name: asdict(one) for name, one in new.items()}}
    file = folder / TOLERANCES
    write_file(file, yaml.safe_dump(recorded, sort_keys=True).encode())
    return file
