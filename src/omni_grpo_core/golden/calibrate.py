"""How far apart are two runs of the same case on this platform?

The cases are recorded once, then checked against that record repeatedly, each time in a new
process: on a CPU with one and two threads and each vector instruction set that torch can be
restricted to, on a CUDA device with each of torch's matrix multiplication backends.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
from omni_grpo_core.io.console import PROGRESS
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
    # a different workspace selects a different algorithm, with or without split-K
    {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "0"},
    {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
)
_HEADROOM = 2.0
"""A tolerance is this many times the measured maximum: other machines round differently."""


@dataclass(frozen=True, slots=True)
class StageDrift:
    """Over all cases and runs: the largest |Δ| of any float of a stage, and whether every
    difference is within the current tolerance. ``turned``: a completion's token flipped at a near
    tie; from there on the text is different, so its floats are not counted."""

    stage: str
    max_abs: float
    within: bool
    turned: bool = False

    def merged(self, other: StageDrift) -> StageDrift:
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
        lines = [
            f"{s.stage:13} max |Δ| {s.max_abs:.3g}"
            + ("" if s.within else ", beyond tolerance")
            + ("; a token flipped at a near tie" if s.turned else "")
            for s in self.stages
            if s.max_abs or s.turned
        ]
        verdict = "within tolerance" if self.within else "beyond tolerance"
        last = f"{self.platform}: {self.runs} runs, max |Δ| {self.max_abs:.3g}: {verdict}"
        return [*lines, last]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "within": self.within}


def _ignore(case: str) -> None:
    """The default ``on_case``."""


def run_golden(
    python: str,
    arguments: Sequence[str],
    environ: Mapping[str, str],
    on_case: Callable[[str], None] = _ignore,
) -> str:
    """``omni-grpo golden ARGUMENTS`` in another process -> its stdout. Exit code 1 (differs) is
    a valid result. ``on_case``: called with what it reports as its progress.

    Raises:
        ConfigError: it cannot be started, or exits with another code; quotes its last lines.
    """
    command = [python, "-m", "omni_grpo_core", "golden", *arguments]
    env = {**os.environ, **environ, "PYTHONIOENCODING": "utf-8", PROGRESS: "1"}
    said: deque[str] = deque(maxlen=3)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stdout:
        try:
            process = subprocess.Popen(
                command, env=env, stdout=stdout, stderr=subprocess.PIPE,
                encoding="utf-8", errors="replace",
            )  # fmt: skip
        except OSError as error:
            raise _failed(python, arguments, str(error.strerror)) from None
        with process:
            try:
                for line in process.stderr or ():
                    if line.startswith(PROGRESS):
                        on_case(line.removeprefix(PROGRESS).strip())
                    elif line.strip():
                        said.append(line.strip())
            except BaseException:
                process.kill()
                raise
        stdout.seek(0)
        answer = stdout.read()
    code = process.returncode
    if code not in (0, 1) or (code and not answer):
        lines = said or answer.strip().splitlines()[-3:]
        raise _failed(python, arguments, f"exit code {code}: {' / '.join(lines)}")
    return answer


def run_json(
    wanted: str,
    python: str,
    arguments: Sequence[str],
    environ: Mapping[str, str],
    on_case: Callable[[str], None] = _ignore,
) -> dict[str, Any]:
    """The object that ``omni-grpo golden ARGUMENTS --json`` prints in another process; ``wanted``
    is one of its keys.

    Raises:
        ConfigError: as :func:`run_golden`, or its stdout is not such an object.
    """
    answer = run_golden(python, [*arguments, "--json"], environ, on_case)
    try:
        found = json.loads(answer)
    except ValueError:
        found = None
    if not isinstance(found, dict) or wanted not in found:
        raise _failed(python, arguments, "no report on stdout")
    return found


def run_check(
    python: str,
    arguments: Sequence[str],
    environ: Mapping[str, str],
    on_case: Callable[[str], None] = _ignore,
) -> dict[str, Any]:
    """The report of ``omni-grpo golden check ARGUMENTS`` in another process. Raises as
    :func:`run_json`."""
    return run_json("cases", python, ["check", *arguments], environ, on_case)


def copy_for_recording(folder: Path, target: Path) -> None:
    """The suite and the recorded tolerances of ``folder``, where goldens are about to be recorded.
    Raises as :func:`~omni_grpo_core.golden.suite.load_suite`."""
    copy_suite(folder, target)
    if (recorded := tolerances_file(folder)).is_file():
        shutil.copy(recorded, target / TOLERANCES)


def _failed(python: str, arguments: Sequence[str], got: str) -> ConfigError:
    return ConfigError(
        f"omni-grpo golden {arguments[0]} with {python}",
        got=got,
        want="a run that succeeds",
        fix="run it by hand; PYTHONPATH may have to include this package",
    )


def calibrate(
    folder: Path, work: Path, key: str, runs: int, arguments: Sequence[str]
) -> Calibration:
    """One record in ``work`` and ``runs - 1`` checks against it, cycling through the variations.
    ``arguments``: further options of both (cases, checkpoint, device)."""
    variations = CUDA_VARIATIONS if key.startswith("cuda") else VARIATIONS
    first = work / "first"
    copy_for_recording(folder, first)
    record = ["record", str(first), "--golden", str(first), *arguments]
    run_golden(sys.executable, record, variations[0])
    check = ["--golden", str(first), *arguments]
    found: dict[str, StageDrift] = {}
    for number in range(1, runs):
        report = run_check(sys.executable, check, variations[number % len(variations)])
        for case in report["cases"]:
            for stage in map(_drift, case["stages"]):
                found[stage.stage] = stage.merged(found.get(stage.stage, stage))
    return Calibration(key, runs, tuple(found.values()))


def _drift(stage: Mapping[str, Any]) -> StageDrift:
    """From one stage of a check's report."""
    name = stage["stage"]
    fine = stage["verdict"] in FINE
    turned = base_stage(name) == "completion" and any(
        d["verdict"] == "differs" and d["path"].endswith(".token_ids") for d in stage["differences"]
    )
    within = fine or (turned and stage["verdict"] == "benign-drift")
    return StageDrift(name, float(stage["max_abs"]), within, turned)


def record_tolerances(folder: Path, found: Calibration) -> Path:
    """Write the platform's tolerances to ``tolerances.yaml``: the current ones, and for each stage
    whose runs exceeded them its own, twice the measured maximum.

    Raises:
        ConfigError: this would widen tolerances that are already recorded.
    """
    file = tolerances_file(folder)
    recorded = read_mapping(file) if os.path.lexists(file) else {}
    if found.platform in recorded and not found.within:
        beyond = next(stage for stage in found.stages if not stage.within)
        raise ConfigError(
            f"{file}: {beyond.stage}",
            got=f"runs that differ by {beyond.max_abs:.3g}",
            want=f"at most the tolerance recorded for {found.platform}",
            fix="find what became less repeatable: a recorded tolerance is never widened",
        )
    known = load_tolerances(folder, found.platform)
    new = {name: known.plain.of(name) for name in ("float32", "float")} | dict(known.stages)
    for stage in found.stages:
        if not stage.within:
            name = base_stage(stage.stage)
            before = new.get(name, known.plain.of("float"))
            new[name] = Tolerance(max(before.atol, _HEADROOM * stage.max_abs), before.rtol)
    recorded = {**recorded, found.platform: {name: asdict(one) for name, one in new.items()}}
    file = folder / TOLERANCES
    write_file(file, yaml.safe_dump(recorded, sort_keys=True).encode())
    return file
