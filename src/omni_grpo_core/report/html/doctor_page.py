"""A diagnosis as one HTML page: what hurts, why, what to change, and the values behind it.

No scripts, no network. Someone new to the project should know what to do within a minute.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni_grpo_core.doctor.continuity import edges
from omni_grpo_core.doctor.evidence import Case, Evidence, Finding
from omni_grpo_core.doctor.rollouts import Completion, joined, texts_in
from omni_grpo_core.doctor.verdict import Diagnosis, State
from omni_grpo_core.pipeline.hints import STAGE_SUMMARY
from omni_grpo_core.report import doctor_words, shortened, visible
from omni_grpo_core.report.html import Decode, render
from omni_grpo_core.report.html.data_way import WIDTH, way
from omni_grpo_core.report.html.loss_ribbon import pushed_rows, pushes, rows_without_weight
from omni_grpo_core.report.html.prompt_view import prompt_views

MOST_EVIDENCE, MOST_ANSWERS = 12, 8
_LONGEST = 700
STATE_WORDS: Mapping[State, str] = {
    "broken": "✗ broke here",
    "differs": "! recipe differs",
    "allowed": "! allowed",
    "inherited": "~ inherited",
    "sound": "✓ sound",
    "failed": "◌ not judged",
    "unjudged": "◌ not judged",
    "unseen": "· not seen",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion, and what became of it. ``rewards``: by function. ``advantage``, ``push``: how
    much the loss pushed it up; empty where unknown."""

    text: str
    rewards: tuple[tuple[str, str], ...]
    advantage: str = ""
    push: str = ""
    way: str = ""


def doctor_page(
    cases: Sequence[Case],
    diagnoses: Sequence[Diagnosis],
    verdict: Diagnosis,
    decode: Decode | None,
) -> str:
    """The page for a recorded run; ``diagnoses`` are in the order of ``cases``.

    ``decode``: token ids -> text, special tokens kept; without it no prompts are drawn.
    """
    shown = _worst_step(diagnoses)
    case = cases[shown] if cases else None
    head = verdict.headline
    return render(
        "doctor_page.html.j2",
        verdict=verdict,
        head=head if isinstance(head, Finding) else None,
        words=doctor_words,
        ordered=doctor_words.ordered(verdict),
        header={} if case is None else case.trace.header,
        state_words=STATE_WORDS,
        values_of=_values,
        most=MOST_EVIDENCE,
        steps=[
            (number, [finding.stage for finding in diagnosis.findings])
            for number, diagnosis in enumerate(diagnoses)
        ],
        shown_step=shown,
        way_width=WIDTH,
        **_shown(case, diagnoses[shown] if diagnoses else verdict, verdict, decode),
        does=STAGE_SUMMARY,
        plain=_plain,
    )


def _shown(
    case: Case | None, diagnosis: Diagnosis, verdict: Diagnosis, decode: Decode | None
) -> dict[str, Any]:
    """What is drawn of a step, by name. A foreign recording may contain anything: ``undrawn`` says
    what could not be drawn."""
    drawn: dict[str, Callable[[Case], Any]] = {
        "way": lambda case: way(case, edges(case), verdict.coverage, verdict.findings),
        "pushed": lambda case: pushed_rows(case, decode),
        "unpushed": rows_without_weight,
        "prompts": lambda case: prompt_views(case, diagnosis, decode) if decode else (),
        "answers": lambda case: tuple(_answers(case))[:MOST_ANSWERS],
    }
    found: dict[str, Any] = dict.fromkeys(drawn)
    undrawn: list[str] = []
    if case is None:
        return {**found, "undrawn": undrawn}
    for name, draw in drawn.items():
        try:
            found[name] = draw(case)
        except Exception as error:
            undrawn.append(f"the drawing of {name} failed ({type(error).__name__}: {error})")
    return {**found, "undrawn": undrawn}


def _worst_step(diagnoses: Sequence[Diagnosis]) -> int:
    """The first step with a finding that breaks the run, else with any."""
    for wanted in ("breaking", "findings"):
        for at, diagnosis in enumerate(diagnoses):
            if getattr(diagnosis, wanted):
                return at
    return 0


def _plain(text: str) -> str:
    return shortened(visible(text), _LONGEST)


def _values(evidence: Evidence) -> str:
    """The offending values as text; empty if there are none."""
    values = json.dumps(dict(evidence.values), ensure_ascii=False, default=str)
    return "" if values == "{}" else _plain(values)


def _answers(case: Case) -> Iterator[Answer]:
    """Each completion as the rewards got it, with its score from each function."""
    earned = _earned(case)
    pushed = pushes(case)
    for at, (text, completion, rewards) in enumerate(earned):
        push = None if completion is None else pushed.get(completion)
        yield Answer(
            _plain(text),
            tuple(
                (name, "not scored" if value is None else f"{value:.4g}")
                for name, value in rewards.items()
            ),
            _advantage(case, at, len(earned)),
            "" if push is None else f"{push:+.3g}",
            "" if not push else "up" if push > 0 else "down",
        )


Earned = tuple[str, Completion | None, Mapping[str, float | None]]


def _earned(case: Case) -> list[Earned]:
    """Text, completion and rewards; by content, or as one call lists them where nothing that was
    generated was recorded."""
    held = joined(case)
    texts: dict[Completion, str] = {}
    for call, completions in zip(case.rewards, held.entries, strict=True):
        given = next((texts for texts in texts_in(call) if len(texts) == len(completions)), ())
        for completion, text in zip(completions, given, strict=False):
            if completion is not None:
                texts.setdefault(completion, text)
    if texts:
        return [
            (text, completion, held.rewards_of(completion)) for completion, text in texts.items()
        ]
    alike = [c for c in case.rewards if c.completions == case.rewards[0].completions]
    return [
        (text, None, {c.name: c.values[at] for c in alike if at < len(c.values)})
        for at, text in enumerate(alike[0].completions if alike else ())
    ]


def _advantage(case: Case, at: int, count: int) -> str:
    for seen in case.advantages:
        if seen.advantages.ndim == 1 and len(seen.advantages) == count:
            return f"{float(seen.advantages[at]):+.3g}"
    return ""
