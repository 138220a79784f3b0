"""What the trial of an upgrade found: one verdict, and what it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from omni_grpo_core.golden.behaviour import Behaviour, behaviour_changes
from omni_grpo_core.golden.beside import PackageChange
from omni_grpo_core.golden.bisect import Change, moved_by
from omni_grpo_core.golden.results import FINE
from omni_grpo_core.golden.results import Verdict as GoldenVerdict

Verdict = Literal["safe", "drift", "harmful"]
"""``safe``: every case is exact or within tolerance. ``drift``: floats moved beyond tolerance, and
nothing that follows turned. In both the behaviour is unchanged. ``harmful``: anything else."""


@dataclass(frozen=True, slots=True)
class Review:
    """A stored golden that the upgrade makes differ. ``already``: it differs before, too."""

    case: str
    verdict: GoldenVerdict
    first: str | None
    already: bool


@dataclass(frozen=True, slots=True)
class UpgradeReport:
    """``packages``: what the new environment changes. ``changes``: against the present state, each
    alone and, last, both. ``stored_before``, ``stored_after``: the check of the stored goldens in
    the present state and in the new one, ``None`` without stored goldens. ``before``, ``after``:
    the behaviour. What needs the new state is ``None`` if the suite does not run there.
    ``resumed``: steps of an earlier run."""

    requests: tuple[str, ...]
    checkpoint: str | None
    folder: str
    packages: tuple[PackageChange, ...]
    changes: tuple[Change, ...]
    stored_before: dict[str, Any] | None
    stored_after: dict[str, Any] | None
    before: Behaviour
    after: Behaviour | None
    steps: int
    resumed: tuple[str, ...]

    @property
    def final(self) -> Change:
        """The new state: everything that was asked for."""
        return self.changes[-1]

    @property
    def verdict(self) -> Verdict:
        return self._judged[0]

    @property
    def why(self) -> str:
        """The verdict's reason, a sentence."""
        return self._judged[1]

    @property
    def _judged(self) -> tuple[Verdict, str]:
        return judge(self.final, self.before, self.after)

    @property
    def pins(self) -> list[str]:
        """Lines of a constraints file."""
        return [package.pin for package in self.packages]

    @property
    def already(self) -> list[Review]:
        """Stored goldens that differ before anything is upgraded."""
        return [Review(**one, already=True) for one in _differing(self.stored_before)]

    @property
    def review(self) -> list[Review]:
        """Stored goldens that differ in the new state."""
        known = {one.case for one in self.already}
        found = _differing(self.stored_after)
        return [Review(**one, already=one["case"] in known) for one in found]

    @property
    def moved(self) -> dict[str, list[str]]:
        """Stage -> library or checkpoint, see :func:`~omni_grpo_core.golden.bisect.moved_by`."""
        return moved_by(self.changes)

    def to_json(self) -> dict[str, Any]:
        """The one object that ``--json`` prints."""
        return {
            "verdict": self.verdict,
            "why": self.why,
            **asdict(self),
            "pins": self.pins,
            "moved": self.moved,
            "already": [asdict(one) for one in self.already],
            "review": [asdict(one) for one in self.review],
        }


def judge(change: Change, before: Behaviour, after: Behaviour | None) -> tuple[Verdict, str]:
    """The answer to an upgrade, from the cases of the new state and the behaviour on both sides."""
    if after is None:
        return "harmful", f"the suite does not run: {change.failed}"
    moved = behaviour_changes(before, after)
    told = "; ".join(one.sentence for one in sorted(moved, key=lambda one: not one.worse))
    cases = change.report["cases"]
    total = f"{len(cases)} case" + "s" * (len(cases) != 1)
    kinds: dict[str, list[str]] = {"drift": [], "harmful": []}
    for case in cases:
        if case["verdict"] not in FINE:
            kind = "drift" if case["verdict"] == "benign-drift" else "harmful"
            kinds[kind].append(case["first"] or "")
    first = f", first in {change.first}" if change.first else ""
    if kinds["harmful"]:
        behaved = told or "accuracy, form and modalities are unchanged"
        beyond = f"{len(kinds['harmful'])} of {total} beyond drift ({change.verdict}){first}"
        # a new library should change nothing, a new checkpoint should behave
        parts = [beyond, behaved] if change.what == "library" else [behaved, beyond]
        return "harmful", "; ".join(parts)
    if moved:
        return "harmful", f"every case holds, but {told}"
    if kinds["drift"]:
        drifted = f"floats moved beyond tolerance in {len(kinds['drift'])} of {total}{first}"
        return "drift", f"{drifted}; completions and behaviour are unchanged"
    return "safe", f"{total}, all exact or within tolerance; the behaviour is unchanged"


def _differing(report: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Cases that differ from stored goldens. One without any is not a difference."""
    return [
        {"case": case["case"], "verdict": case["verdict"], "first": case["first"]}
        for case in (report or {"cases": ()})["cases"]
        if case["verdict"] not in FINE and any(stage["golden"] for stage in case["stages"])
    ]
