"""An upgrade tried before it is made: other libraries, another checkpoint, or both.

The present environment records goldens of the suite; every other combination is checked against
them, as by :mod:`~omni_grpo_core.golden.bisect`, and so are the stored goldens. Each step's result
is kept until the end, see :mod:`~omni_grpo_core.io.resumable`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.golden import beside
from omni_grpo_core.golden.behaviour import Behaviour
from omni_grpo_core.golden.beside import PackageChange
from omni_grpo_core.golden.bisect import Change, change_of
from omni_grpo_core.golden.calibrate import copy_for_recording, run_check, run_json
from omni_grpo_core.golden.environment import environment
from omni_grpo_core.golden.suite import Suite
from omni_grpo_core.golden.upgrade_report import UpgradeReport
from omni_grpo_core.io.resumable import Steps

Watch = Callable[[int, int, str], None]
"""Called with the steps done, all steps, and what is being done."""
OnCase = Callable[[str], None]
Run = Callable[[str, Sequence[str], Mapping[str, str], OnCase], dict[str, Any]]
"""A Python, the arguments and environment variables of a command, and its progress."""


@dataclass(frozen=True, slots=True)
class Task:
    """``requests``: libraries to try, none to keep the present ones. ``checkpoint``: the new one,
    ``None`` to keep the suite's. ``folder``: of the goldens, with their ``suite``; ``cases``: all
    if empty."""

    requests: tuple[Requirement, ...]
    checkpoint: Path | None
    folder: Path
    suite: Suite
    cases: tuple[str, ...] = ()

    def key(self) -> str:
        """Changes with whatever can change the result: versions, suite, goldens, checkpoints.
        Large files are known by size and time."""
        suite = self.suite
        inputs = [Path(suite.file), suite.path(suite.data), *_files(self.folder)]
        for used in (suite.checkpoint_dir(), suite.processor_dir(), self.checkpoint):
            inputs += [] if used is None else sorted(used.glob("*"))
        files = [path.absolute() for path in inputs if path.is_file()]
        stamps = [(str(path), (at := path.stat()).st_size, at.st_mtime_ns) for path in files]
        new = self.checkpoint and str(self.checkpoint.absolute())
        asked = [*map(str, self.requests), new]
        parts = [environment(), sys.prefix, asked, self.cases, stamps]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _files(folder: Path) -> Iterator[Path]:
    """The goldens and settings of a folder, in order; pending ones do not count."""
    yield from sorted((*folder.glob("*.yaml"), *folder.glob("[!.]*/*.txt")))


def work_folder(key: str) -> Path:
    """Where an upgrade works unless it is told otherwise: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache"
    return base / "omni-grpo" / "upgrade" / key


def try_upgrade(task: Task, steps: Steps, watch: Watch) -> UpgradeReport:
    """Try ``task``, step by step. Takes minutes: the suite runs six times or more, each time in a
    process of its own.

    Raises:
        ConfigError: there is nothing to try, the packages cannot be installed, or the suite does
            not run even in the present environment.
    """
    watch(0, 1, "plan")
    packages = _plan(task, steps)
    return _Trial(task, steps, watch, packages).run()


def _plan(task: Task, steps: Steps) -> tuple[PackageChange, ...]:
    if not task.requests:
        return ()
    by = beside.installer()
    found = steps.step("plan", lambda: [asdict(p) for p in beside.planned(by, task.requests)])
    if not found and task.checkpoint is None:
        raise nothing_to_try(task.requests)
    return tuple(PackageChange(**one) for one in found)


def nothing_to_try(requests: Sequence[Requirement]) -> ConfigError:
    return ConfigError(
        " ".join(map(str, requests)) or "upgrade",
        got="what the present environment already has" if requests else "nothing to try",
        want="another version of a package, or --checkpoint",
        fix="name a version, like transformers==5.24.0",
    )


Side = tuple[str, Mapping[str, str]]
"""A Python and its environment variables."""


class _Trial:
    """One trial, after its plan."""

    def __init__(
        self, task: Task, steps: Steps, watch: Watch, packages: tuple[PackageChange, ...]
    ) -> None:
        self.task, self.steps, self.watch, self.packages = task, steps, watch, packages
        chosen = task.suite.chosen(task.cases)
        stored = any(any((task.folder / case).glob("*.txt")) for case in chosen)
        self.names = (
            *(("plan", "environment") if packages else ()),
            *(("before", "record", "stored before") if stored else ("before", "record")),
            *(("library",) if packages else ()),
            *(("checkpoint",) if task.checkpoint else ()),
            *(("both",) if packages and task.checkpoint else ()),
            *(("stored after", "after") if stored else ("after",)),
        )

    def run(self) -> UpgradeReport:
        task = self.task
        was: Side = (sys.executable, {})
        now = (self._environment(), beside.ENVIRON) if self.packages else was
        recorded = self.steps.folder / "old"
        stored = ["--golden", str(task.folder.absolute()), *task.cases]
        before = ["--golden", str(recorded), *task.cases]
        new = ["--checkpoint", str(task.checkpoint)] if task.checkpoint else []
        behaved = self._step("before", was, _behaviour, stored)
        self._step("record", was, self._record, before)
        differed = self._step("stored before", was, run_check, stored)
        sides = {"library": (now, []), "checkpoint": (was, new), "both": (now, new)}
        changes = [
            _change(name, self._step(name, side, _tried(run_check), [*before, *options]))
            for name, (side, options) in sides.items()
            if name in self.names
        ]
        differ = after = None
        if not changes[-1].failed:
            differ = self._step("stored after", now, _tried(run_check), [*stored, *new])
            after = self._step("after", now, _tried(_behaviour), [*stored, *new])
            failed = next((one["failed"] for one in (differ, after) if one and "failed" in one), "")
            changes[-1] = replace(changes[-1], failed=failed)
        runs = not changes[-1].failed
        return UpgradeReport(
            requests=tuple(map(str, task.requests)),
            checkpoint=None if task.checkpoint is None else str(task.checkpoint),
            folder=str(task.folder),
            packages=self.packages,
            changes=tuple(changes),
            stored_before=differed,
            stored_after=differ if runs else None,
            before=Behaviour.from_json(behaved["behaviour"]),
            after=Behaviour.from_json(after["behaviour"]) if after and runs else None,
            steps=len(self.names),
            resumed=tuple(self.steps.resumed),
        )

    def _step(self, name: str, side: Side, run: Run, arguments: Sequence[str]) -> Any:
        """The result of a step that runs ``run`` on ``side``; ``None`` if it is left out."""
        if name not in self.names:
            return None
        at = self.names.index(name)

        def on_case(case: str) -> None:
            self.watch(at, len(self.names), f"{name}: {case}" if case else name)

        on_case("")
        python, environ = side
        return self.steps.step(name, lambda: run(python, arguments, environ, on_case))

    def _environment(self) -> str:
        self.watch(1, len(self.names), "environment")

        def make() -> str:
            folder = self.steps.empty("environment")
            return str(beside.build(folder, beside.installer(), self.packages))

        return str(self.steps.step("environment", make))

    def _record(
        self, python: str, arguments: Sequence[str], environ: Mapping[str, str], on_case: OnCase
    ) -> dict[str, Any]:
        folder = self.steps.empty("old")
        copy_for_recording(self.task.folder, folder)
        command = ["record", str(folder), *arguments]
        return run_json("files", python, command, environ, on_case)


def _behaviour(
    python: str, arguments: Sequence[str], environ: Mapping[str, str], on_case: OnCase
) -> dict[str, Any]:
    return run_json("behaviour", python, ["behaviour", *arguments], environ, on_case)


def _tried(run: Run) -> Run:
    """In a new state a suite that does not run is a finding."""

    def tried(
        python: str, arguments: Sequence[str], environ: Mapping[str, str], on_case: OnCase
    ) -> dict[str, Any]:
        try:
            return run(python, arguments, environ, on_case)
        except ConfigError as error:
            return {"failed": error.got}

    return tried


def _change(what: str, found: dict[str, Any]) -> Change:
    if "failed" in found:
        return Change(what, "harmful", None, {}, {}, {}, {"cases": []}, found["failed"])
    return change_of(what, found)
