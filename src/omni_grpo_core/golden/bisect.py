"""Two environments and two checkpoints: which change moved which stage.

Each environment runs in its own process. The old one records goldens; every other combination is
checked against them, replay included, so that each change is charged only with its own stages.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.golden.calibrate import copy_for_recording, run_check, run_golden
from omni_grpo_core.golden.results import Verdict, worst


@dataclass(frozen=True, slots=True)
class Change:
    """One combination compared with the old one. ``what``: ``library``, ``checkpoint`` or ``both``.
    ``versions``: old and new version by library. ``added``, ``inherited``: stages that introduced
    a divergence, or were only handed one (in every case where they diverge), with the worst verdict
    of each. ``first``, ``verdict``: over all cases. ``failed``: why the suite does not run at all,
    else empty; then ``report`` is too."""

    what: str
    verdict: Verdict
    first: str | None
    versions: dict[str, list[str]]
    added: dict[str, Verdict]
    inherited: dict[str, Verdict]
    report: dict[str, Any]
    failed: str = ""


@dataclass(frozen=True, slots=True)
class BisectReport:
    old: str
    new: str
    changes: tuple[Change, ...]

    @property
    def moved(self) -> dict[str, list[str]]:
        """See :func:`moved_by`."""
        return moved_by(self.changes)

    @property
    def differs(self) -> bool:
        return any(change.verdict not in ("exact", "within") for change in self.changes)

    def lines(self) -> list[str]:
        """For a person."""
        lines = []
        for change in self.changes:
            lines.append(f"{change.what}: {change.verdict}, first stage {change.first or 'none'}")
            lines += [f"  {key}: {was} → {now}" for key, (was, now) in change.versions.items()]
            lines += [f"  {stage} added a divergence: {v}" for stage, v in change.added.items()]
        return [*lines, *(f"{s}: moved by {' and '.join(by)}" for s, by in self.moved.items())]

    def to_json(self) -> dict[str, Any]:
        return {
            "old": self.old,
            "new": self.new,
            "verdict": "differs" if self.differs else "within",
            "moved": self.moved,
            "changes": [asdict(change) for change in self.changes],
        }


def moved_by(changes: Sequence[Change]) -> dict[str, list[str]]:
    """Stage -> the changes that moved it, each taken alone where possible."""
    stages: dict[str, list[str]] = {}
    for change in changes:
        for stage in change.added if change.what != "both" else ():
            stages.setdefault(stage, []).append(change.what)
    for change in changes:
        for stage in change.added:
            stages.setdefault(stage, [change.what])
    return stages


def python_of(name: str, work: Path, project: Path) -> str:
    """The Python of an environment: an interpreter, a virtual environment's folder, the name of a
    tox environment under ``project``, or a constraints file, installed into ``work``.

    Raises:
        ConfigError: none of these, or the installation fails.
    """
    path = Path(name)
    for candidate in (path / "bin" / "python", project / ".tox" / name / "bin" / "python"):
        if candidate.is_file():
            return str(candidate.absolute())
    if path.is_file() and path.suffix == ".txt":
        return _install(path, work / path.stem, project)
    if path.is_file():
        return str(path.absolute())
    raise ConfigError(
        f"environment {name}",
        got="no interpreter, virtual environment, tox environment or constraints file",
        want="one of these",
        fix=f"create it: tox -e {name} --notest",
    )


def _install(constraints: Path, folder: Path, project: Path) -> str:
    python = folder / "bin" / "python"
    install = ["-m", "pip", "install", "-q", "-c", str(constraints.absolute()), str(project)]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), *install],
    ):
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode:
            raise ConfigError(
                f"environment from {constraints}",
                got=" / ".join((done.stderr or done.stdout).strip().splitlines()[-2:]),
                want="constraints that can be installed",
                fix="correct the constraints, or name an existing environment",
            )
    return str(python)


def bisect(
    old: str,
    new: str,
    folder: Path,
    work: Path,
    *,
    cases: Sequence[str] = (),
    checkpoint: Path | None = None,
    new_checkpoint: Path | None = None,
) -> BisectReport:
    """``old`` and ``new``: environments, see :func:`python_of`. ``checkpoint`` (default: the
    suite's own) is crossed with ``new_checkpoint``, if given. ``work`` is an empty folder."""
    was, now = (python_of(name, work, Path.cwd()) for name in (old, new))
    recorded = work / "old"
    copy_for_recording(folder, recorded)
    before = [] if checkpoint is None else ["--checkpoint", str(checkpoint)]
    after = [] if new_checkpoint is None else ["--checkpoint", str(new_checkpoint)]
    run_golden(was, ["record", str(recorded), "--golden", str(recorded), *before, *cases], {})
    crossed = [("library", now, before)]
    if new_checkpoint is not None:
        crossed += [("checkpoint", was, after), ("both", now, after)]
    changes = tuple(
        change_of(
            what,
            run_check(python, ["--golden", str(recorded), *of, *cases], {}),
        )
        for what, python, of in crossed
    )
    return BisectReport(old, new, changes)


def change_of(what: str, report: dict[str, Any]) -> Change:
    """From the report of a check, as JSON."""
    versions: dict[str, list[str]] = {}
    stages: dict[str, dict[str, list[Any]]] = {"added": {}, "inherited": {}}
    for case in report["cases"]:
        versions |= case["versions"]
        for stage in case["stages"]:
            if stage["origin"] != "none":
                kind = "added" if stage["origin"] == "added" else "inherited"
                stages[kind].setdefault(stage["stage"], []).append(stage["verdict"])
    added, inherited = (
        {stage: worst(verdicts) for stage, verdicts in found.items()} for found in stages.values()
    )
    inherited = {stage: verdict for stage, verdict in inherited.items() if stage not in added}
    return Change(what, report["verdict"], report["first"], versions, added, inherited, report)
