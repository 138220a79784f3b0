"""What the trial of an upgrade found: one verdict, and what it rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from omni_grpo_core.golden.behaviour import Behaviour, behaviour_changes
from omni_grpo_core.golden.beside import PackageChange
from omni_grpo_core.golden.bisect import Change, moved_by
from omni_grpo_core.golden.results import FINE, VERDICTS
from omni_grpo_core.golden.results import Verdict as GoldenVerdict

Verdict = Literal["safe", "drift", "harmful"]
"""``safe``: every case is exact or within tolerance, and the behaviour is unchanged. ``drift``: of
libraries, floats moved beyond tolerance, and nothing that follows turned; of another checkpoint,
which is meant to answer otherwise, it behaves no worse. ``harmful``: anything else."""


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
        return judge(self.changes, self.before, self.after)

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


def judge(
    changes: Sequence[Change], before: Behaviour, after: Behaviour | None
) -> tuple[Verdict, str]:
    """The answer to an upgrade, from the ``changes``, the last of which is the new state, and from
    the behaviour on both sides."""
    final = changes[-1]
    if after is None:
        return "harmful", f"the suite does not run: {final.failed}"
    moved = behaviour_changes(before, after)
    told = "; ".join(one.sentence for one in sorted(moved, key=lambda one: not one.worse))
    if final.what == "library":
        return _judge_libraries(final, told)
    libraries = next((_judge_libraries(one, "") for one in changes if one.what == "library"), None)
    answers = [told or "accuracy, form and modalities are unchanged"]
    if libraries and libraries[0] == "harmful":
        answers.append(f"the new libraries alone: {libraries[1]}")
    differing = _cases(final, [one for one in VERDICTS if one not in FINE])
    if differing:
        answers.append(f"different in {differing} ({final.verdict}){_first(final)}")
    if len(answers) == 1 and not moved:
        return "safe", f"{_cases(final, FINE)}, all exact or within tolerance; {answers[0]}"
    worse = any(one.worse for one in moved) or _cases(final, ("degenerate",))
    harmful = worse or (libraries is not None and libraries[0] == "harmful")
    return "harmful" if harmful else "drift", "; ".join(answers)


def _judge_libraries(change: Change, told: str) -> tuple[Verdict, str]:
    """New libraries should change nothing. ``told``: what changed in the behaviour."""
    beyond = _cases(change, [one for one in VERDICTS if one not in (*FINE, "benign-drift")])
    if change.failed:
        return "harmful", f"the suite does not run: {change.failed}"
    if beyond:
        behaved = told or "accuracy, form and modalities are unchanged"
        return "harmful", f"{beyond} beyond drift ({change.verdict}){_first(change)}; {behaved}"
    if told:
        return "harmful", f"every case holds, but {told}"
    drifted = _cases(change, ("benign-drift",))
    if drifted:
        moved = f"floats moved beyond tolerance in {drifted}{_first(change)}"
        return "drift", f"{moved}; completions and behaviour are unchanged"
    fine = f"{_cases(change, FINE)}, all exact or within tolerance"
    return "safe", f"{fine}; the behaviour is unchanged"


def _cases(change: Change, verdicts: Sequence[str]) -> str:
    """How many cases have one of these verdicts, empty if none has: ``2 of 10 cases``."""
    cases = change.report["cases"]
    count = sum(case["verdict"] in verdicts for case in cases)
    total = f"{len(cases)} case" + "s" * (len(cases) != 1)
    if not count:
        return ""
    return total if count == len(cases) else f"{count} of {total}"


def _first(change: Change) -> str:
    return f", first in {change.first}" if change.first else ""


def _differing(report: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Cases that differ from stored goldens. One without any is not a difference."""
    return [
        {"case": case["case"], "verdict": case["verdict"], "first": case["first"]}
        for case in (report or {"cases": ()})["cases"]
        if case["verdict"] not in FINE and any(stage["golden"] for stage in case["stages"])
    ]
