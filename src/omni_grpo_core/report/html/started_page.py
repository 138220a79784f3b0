"""A new golden suite as one HTML page: which rows it has and why, what the model is given in each
case, and what would be stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from omni_grpo_core.golden.starting import Plan, Started, StartedCase, given
from omni_grpo_core.golden.text import read_text
from omni_grpo_core.pipeline.hints import STAGE_SUMMARY
from omni_grpo_core.pipeline.stages import Values
from omni_grpo_core.report import pieces, shortened
from omni_grpo_core.report.html import Decode, render
from omni_grpo_core.report.html.sample_view import SampleView, sample_view
from omni_grpo_core.report.html.words import ended, passed_line

MOST_CASES = 24
"""Cases shown with their media, each kind of input first; every case is in the table."""
_LINES, _WIDTH = 12, 200
"""Lines shown of a golden's value, and characters of each."""


@dataclass(frozen=True, slots=True)
class StoredStage:
    """A golden: what its stage does, its bytes, and the first lines of its value. ``more``: lines
    that are not shown."""

    name: str
    does: str
    bytes: int
    lines: tuple[str, ...]
    more: int


def started_page(plan: Plan, started: Started) -> str:
    """The page for a suite that was just made; its media are decoded again."""
    names = _shown(started)
    views: dict[str, tuple[SampleView, ...]] = {}
    count = 0
    for name, values in given(plan.policy, started, names):
        views[name] = _views(values, count, plan.policy.decode)
        count += len(views[name])
    return render(
        "started_page.html.j2",
        plan=plan,
        choice=plan.choice,
        started=started,
        check_line=passed_line(plan.check),
        views=views,
        stored={one.case.name: _stored(started, one) for one in started.cases},
        pieces=pieces,
        ended=ended,
        kilobytes=lambda size: f"{size / 1000:.0f}",
        open=_open(views),
    )


def _shown(started: Started) -> tuple[str, ...]:
    """Names of the cases shown with their media: of each modality and audio mode the first, then
    the others."""
    first: dict[tuple[str, ...], str] = {}
    for one in started.cases:
        # what is left of a kind without problem type and length
        first.setdefault(tuple(one.case.kind.split(", ")[:-2]), one.case.name)
    names = [one.case.name for one in started.cases]
    chosen = [*dict.fromkeys((*first.values(), *names))][:MOST_CASES]
    return tuple(name for name in names if name in chosen)


def _open(views: Mapping[str, Sequence[SampleView]]) -> set[int]:
    """The number of the one sample shown expanded: the first with media."""
    samples = [sample for of in views.values() for sample in of]
    return {sample.number for sample in [s for s in samples if s.clips or s.sounds][:1]}


def _views(values: Values, before: int, decode: Decode) -> tuple[SampleView, ...]:
    rows = range(len(values["batch"].rows))
    views = (sample_view(values, row, decode) for row in rows)
    return tuple(replace(view, number=before + view.number) for view in views)


def _stored(started: Started, one: StartedCase) -> tuple[StoredStage, ...]:
    return tuple(
        _stage(name, size, read_text(started.goldens / one.case.name / name))
        for name, size in one.files.items()
    )


def _stage(name: str, size: int, text: str) -> StoredStage:
    stage = name.removesuffix(".txt")
    # after the header, and before the checksums
    lines = text.split("\n\n", 1)[1].rpartition("\nend: ")[0].rstrip("\n").split("\n")
    return StoredStage(
        name=stage,
        does=STAGE_SUMMARY.get(stage.partition(".")[0], ""),
        bytes=size,
        lines=tuple(shortened(line, _WIDTH) for line in lines[:_LINES]),
        more=max(0, len(lines) - _LINES),
    )
