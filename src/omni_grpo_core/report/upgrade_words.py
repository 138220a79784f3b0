"""What the trial of an upgrade shows, on the terminal and on its page: rows and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omni_grpo_core.golden.behaviour import SHARES, Behaviour, ModalityBehaviour
from omni_grpo_core.golden.bisect import Change
from omni_grpo_core.golden.commands import command
from omni_grpo_core.golden.results import (
    FINE,
    GoldenReport,
    Origin,
    StageResult,
    Verdict,
    stage_order,
    worst,
)
from omni_grpo_core.golden.suite import shipped_goldens
from omni_grpo_core.golden.upgrade_report import Review, UpgradeReport

_TITLES: Mapping[str, str] = {
    "library": "The new libraries",
    "checkpoint": "The new checkpoint",
    "both": "Both together",
}
_MODALITY: Mapping[str, str] = {
    "reaches": "reaches the model",
    "lost": "LOST",
    "not judged": "not judged",
}
_NONE = "–"


@dataclass(frozen=True, slots=True)
class StageRow:
    """A stage over all cases. ``cases``: in how many it diverges. ``reason``: of the first case
    with its verdict."""

    stage: str
    verdict: Verdict
    origin: Origin
    cases: int
    reason: str


@dataclass(frozen=True, slots=True)
class BehaviourRow:
    name: str
    before: str
    after: str
    change: Literal["worse", "better", ""] = ""


def title_of(change: Change) -> str:
    """
    >>> title_of(Change("both", "exact", None, {}, {}, {}, {"cases": []}))
    'Both together'
    """
    return _TITLES[change.what]


def stage_rows(change: Change) -> list[StageRow]:
    """The stages of all cases, in the order of the pipeline."""
    found: dict[str, list[StageResult]] = {}
    for case in GoldenReport.from_json(change.report).cases if not change.failed else ():
        for stage in case.stages:
            found.setdefault(stage.stage, []).append(stage)
    return [_stage_row(name, found[name]) for name in sorted(found, key=stage_order)]


def _stage_row(name: str, cases: list[StageResult]) -> StageRow:
    verdict = worst(one.verdict for one in cases)
    origins = [one.origin for one in cases if one.origin != "none"]
    diverged = [one for one in cases if one.verdict not in FINE]
    # what a stage adds in one case it may only inherit in another
    origin: Origin = "added" if "added" in origins else next(iter(origins), "none")
    reason = next(
        (one.reason for one in diverged if (one.verdict, one.origin) == (verdict, origin)),
        next((one.reason for one in cases if one.verdict == verdict), ""),
    )
    return StageRow(name, verdict, origin, len(diverged), reason)


def behaviour_rows(before: Behaviour, after: Behaviour | None) -> list[BehaviourRow]:
    """Old against new; without ``after`` the suite does not run there."""
    rows = []
    for name, (what, worse) in SHARES.items():
        was = getattr(before, name)
        now = None if after is None else getattr(after, name)
        rows.append(_row(what, was, now, worse))
    length = None if after is None else after.mean_length
    rows.append(
        BehaviourRow(
            "mean length, tokens",
            f"{before.mean_length:.1f}",
            _NONE if length is None else f"{length:.1f}",
        )
    )
    new = {} if after is None else after.modalities
    for name in dict.fromkeys((*before.modalities, *new)):
        rows += _modality_rows(name, before.modalities.get(name), new.get(name))
    return rows


def _row(what: str, was: float, now: float | None, worse: str) -> BehaviourRow:
    if now is None or now == was:
        return BehaviourRow(what, f"{was:.1%}", _NONE if now is None else f"{now:.1%}")
    word = "rose" if now > was else "fell"
    change: Literal["worse", "better"] = "worse" if word == worse else "better"
    return BehaviourRow(what, f"{was:.1%}", f"{now:.1%}", change)


def _modality_rows(
    name: str, was: ModalityBehaviour | None, now: ModalityBehaviour | None
) -> list[BehaviourRow]:
    def words(one: ModalityBehaviour | None) -> tuple[str, str]:
        if one is None:
            return _NONE, _NONE
        return _MODALITY[one.judgement], f"{one.accuracy:.0%} ({one.without:.0%})"

    (proof, right), (new_proof, new_right) = words(was), words(now)
    lost = [one is not None and one.judgement == "lost" for one in (was, now)]
    change: Literal["worse", "better", ""] = ""
    if now is not None and lost[0] != lost[1]:
        change = "worse" if lost[1] else "better"
    return [
        BehaviourRow(name, proof, new_proof, change),
        BehaviourRow(f"{name}: right answers (without it)", right, new_right),
    ]


@dataclass(frozen=True, slots=True)
class ReviewGroup:
    """Cases whose goldens differ in the same way."""

    cases: tuple[str, ...]
    verdict: Verdict
    first: str | None
    already: bool


def review_groups(found: Sequence[Review]) -> list[ReviewGroup]:
    """The goldens that differ, grouped by verdict and first stage."""
    groups: dict[tuple[Verdict, str | None, bool], list[str]] = {}
    for one in found:
        groups.setdefault((one.verdict, one.first, one.already), []).append(one.case)
    return [ReviewGroup(tuple(cases), *key) for key, cases in groups.items()]


def packages_line(report: UpgradeReport) -> str:
    """What the new environment changes, on one line."""
    return ", ".join(f"{p.name} {p.was or 'none'} → {p.now}" for p in report.packages)


def pins_title(report: UpgradeReport) -> str:
    """The heading above the pins."""
    return "The pins would be" if report.verdict == "harmful" else "Pins to write"


def review_commands(report: UpgradeReport) -> list[str]:
    """The commands to run after the upgrade was made; none where nothing needs review, or the
    goldens are those shipped with this package, which its next release brings."""
    if not report.review or shipped(report):
        return []
    new = ["--checkpoint", report.checkpoint] if report.checkpoint else []
    folder = Path(report.folder)
    cases = [one.case for one in report.review]
    if len(cases) == len(report.final.report["cases"]):
        cases = []  # all of them, which is the default
    return [command("regen", folder, *cases, *new), command("review", folder)]


def shipped(report: UpgradeReport) -> bool:
    """Whether the goldens are the package's own."""
    return report.folder == str(shipped_goldens())
