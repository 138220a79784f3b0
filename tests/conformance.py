"""What the doctor said of real trainers, lane by lane: stored as JSON, compared by each test that
runs a trainer, and shown by ``docs/trainers_table.py``.

A lane is what one command runs. Its tests hand over the doctor's report, each its own::

    LANE = Lane("trl", "TRL `GRPOTrainer`", packages=("trl", "transformers"), lines=LINES)
    LANE.sound("text", "accumulation", report)
    LANE.fault("image", "picture dropped while scoring", report, stage="media")

Each fails where the stored result is another. ``OMNI_TRAINER_RESULTS=write`` stores it instead;
remove the lane's file first, so that nothing stays of tests that are gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "trainers" / "results"
WRITE = "OMNI_TRAINER_RESULTS"
_SEEN = ("sound", "differs", "broken", "inherited", "allowed")


@dataclass(frozen=True)
class Lane:
    """``name``: of the file under ``trainers/results``. ``trainer``: as the table calls it.
    ``packages``: distributions whose versions are stored; ``versions``: of what is no package.
    ``lines``: what a user writes to record it."""

    name: str
    trainer: str
    packages: tuple[str, ...]
    lines: str
    versions: str = ""

    def sound(self, modality: str, name: str, report: Mapping[str, Any]) -> None:
        """A run in which nothing is wrong, by its settings' name."""
        self._note(modality, "sound", name, {"verdict": verdict(report), "unseen": unseen(report)})

    def fault(self, modality: str, name: str, report: Mapping[str, Any], *, stage: str) -> None:
        """A run with a mistake planted in ``stage``, by the mistake's name."""
        self._note(modality, "faults", name, found(report, stage))

    def cost(self, ratio: float, command: str, machine: str, date: str) -> None:
        """What recording costs: seconds of a recorded step over those of one that is not."""
        if os.environ.get(WRITE) == "write":
            measured = {"ratio": round(ratio, 2), "command": command}
            self._write(("cost",), measured | {"machine": machine, "date": date})

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.json"

    def _note(self, modality: str, kind: str, name: str, result: Any) -> None:
        if os.environ.get(WRITE) == "write":
            self._write(("rows", modality, kind, name), result)
            return
        held = json.loads(self.file.read_text(encoding="utf-8"))
        stored = held["rows"].get(modality, {}).get(kind, {}).get(name)
        assert stored == result, (
            f"{self.file.name} has {stored} for {modality}, {name}; now it is {result}: "
            f"if that is right, run the lane with {WRITE}=write, then python docs/trainers_table.py"
        )

    def _write(self, keys: tuple[str, ...], value: Any) -> None:
        """Workers of one run write into the same file."""
        self.file.touch()
        with self.file.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            held = json.loads(file.read() or "{}") | {
                "trainer": self.trainer,
                "versions": ", ".join(
                    [*filter(None, [self.versions]), *(f"{p} {version(p)}" for p in self.packages)]
                ),
                "lines": self.lines,
            }
            inner = held
            for key in keys[:-1]:
                inner = inner.setdefault(key, {})
            inner[keys[-1]] = value
            file.seek(0)
            file.write(json.dumps(held, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
            file.truncate()


def verdict(report: Mapping[str, Any]) -> str:
    """
    >>> findings = [{"stage": "loss", "severity": "differs"}]
    >>> verdict({"exit": 0, "healthy": True, "findings": findings})
    'healthy; differs: loss'
    """
    stages: dict[str, list[str]] = {"breaks": [], "differs": []}
    for finding in report["findings"]:
        stages[finding["severity"]].append(finding["stage"])
    word = "BROKEN" if report["exit"] else "healthy" if report["healthy"] else "nothing learned"
    said = (f"{name}: {', '.join(held)}" for name, held in stages.items() if held)
    return "; ".join((word, *said))


def unseen(report: Mapping[str, Any]) -> dict[str, str]:
    """Stages that were not judged, and why; folders of the run that said so are left out.

    >>> held = {"state": "unseen", "why": "no reference: /tmp/1/vl has none"}
    >>> unseen({"coverage": {"logits": held}})
    {'logits': 'no reference: vl has none'}
    """
    return {
        stage: re.sub(r"(?<!\S)/\S*/", "", held.get("why", held["state"]))
        for stage, held in report["coverage"].items()
        if held["state"] not in _SEEN
    }


def found(report: Mapping[str, Any], stage: str) -> str:
    """The headline's stage and the causes shown there, with ``"not found"`` or ``"not at STAGE"``
    where that is not what was planted.

    >>> cause = {"cause": "media.zero", "proved": True}
    >>> finding = {"stage": "media", "severity": "breaks", "causes": [cause]}
    >>> report = {"exit": 1, "headline": {"stage": "media"}, "findings": [finding]}
    >>> found(report, "media"), found(report, "loss")
    ('media: media.zero (proved)', 'not at loss; media: media.zero (proved)')
    """
    head = report["headline"]["stage"]
    if not report["exit"]:
        return "not found"
    causes = [
        f"{cause['cause']} ({'proved' if cause['proved'] else 'fits'})"
        for finding in report["findings"]
        if finding["stage"] == head
        for cause in finding["causes"]
    ]
    said = f"{head or 'symptom'}: {', '.join(causes) or 'cause unknown'}"
    return said if head == stage else f"not at {stage}; {said}"
