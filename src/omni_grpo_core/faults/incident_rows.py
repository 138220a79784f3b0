"""What the software reports on each part of the incident, measured anew on every run.

A row is ``broken`` (the doctor blames it in the replayed run), ``caught`` (injected into the clean
loop, and the doctor names it), ``cleared`` (checked in the replayed run and sound) or ``shown``
(what the team had to find by hand is displayed). A row without its evidence is ``missed``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any, Literal

import yaml

from omni_grpo_core.faults import incident_parts as parts
from omni_grpo_core.faults.fault import cache_is_dropped, cache_is_repaired, kept
from omni_grpo_core.faults.incident import Replay
from omni_grpo_core.faults.plan import BY_ID
from omni_grpo_core.faults.trial import config_for, trial
from omni_grpo_core.rewards.degenerate import degenerate_text
from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.types import Malformed, Stage

Answer = Literal["broken", "caught", "cleared", "shown", "missed"]
RowAnswer = tuple[Answer, str]


@dataclass(frozen=True, slots=True)
class RowFinding:
    """One row of the incident: what the team reported (``told``), and what is found."""

    row: int
    told: str
    answer: Answer
    found: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def reported() -> dict[int, str]:
    """The incident, row by row, as its team reported it.

    >>> len(reported())
    21
    """
    text = (files("omni_grpo_core.faults") / "data" / "incident.yaml").read_text(encoding="utf-8")
    rows: dict[int, str] = yaml.safe_load(text)
    return rows


def findings(replay: Replay) -> tuple[RowFinding, ...]:
    """The findings for all 21 rows."""
    return tuple(RowFinding(row, text, *ROWS[row](replay)) for row, text in reported().items())


# --------------------------------------------------------------------------- kinds of evidence


def _blamed(replay: Replay, stage: Stage, cause: str) -> RowAnswer:
    """The doctor names the cause in the replayed run."""
    finding = replay.finding(stage)
    explained = next((c for c in finding.causes if c.cause == cause), None) if finding else None
    if explained is None:
        return "missed", f"{cause} is not named in the replayed run"
    return "broken", f"{stage}: {explained.seen}; {explained.fix}"


def _caught(fault: str) -> RowAnswer:
    """Injected into the clean loop, the fault is named by the doctor."""
    known = BY_ID[fault]
    found = trial((known,), config_for((known,)) or parts.CONFIG)
    if found.first != known.stage:
        return "missed", f"{fault} injected, {found.first or 'nothing'} blamed"
    return "caught", f"injected, blamed on {known.stage} ({found.cause}): {found.sentences[0]}"


def _cleared(replay: Replay, fault: str, sound: str) -> RowAnswer:
    """Checked in the replayed run and sound, while the doctor catches the injected fault."""
    stage = BY_ID[fault].stage
    if stage not in replay.verdict.judged:
        return "missed", f"stage {stage} was not checked"
    finding = replay.finding(stage)
    if finding is not None:
        return "broken", f"{stage}: {finding.evidence[0].sentence}"
    answer, found = _caught(fault)
    return ("cleared" if answer == "caught" else "missed"), f"{sound}; when broken: {found}"


def _holds(holds: bool, found: str) -> RowAnswer:
    return ("shown" if holds else "missed"), found


# --------------------------------------------------------------------------- the rows


def media_counts(replay: Replay) -> RowAnswer:
    answer, found = _blamed(replay, "conversation", "conv.media-twice")
    call = replay.cases[0].processed[0]
    rows = len(call.texts)
    per_row = f"{len(call.videos) // rows} video and {len(call.audios) // rows} audios per row"
    return answer, f"{per_row}; {found}"


def placeholders(replay: Replay) -> RowAnswer:
    spans = parts.spans(replay.cases[0].processed[0])
    return _holds(
        any(name == "video" for name, _ in spans) and any(name == "audio" for name, _ in spans),
        "prompt 0 holds " + ", ".join(f"{count} {name}" for name, count in spans) + " tokens",
    )


def structure(replay: Replay) -> RowAnswer:
    call = replay.cases[0].templates[0]
    turns = parts.structure(call.messages)
    return _holds(bool(turns), "; ".join(turns))


def repeated(replay: Replay) -> RowAnswer:
    if not cache_is_dropped():
        return _holds(not replay.garbage, f"{kept()}: no loop here")
    if replay.raised:
        answer, found = _blamed(replay, "completion", "gen.checkpointing-train")
        return answer, f"no loop here: generate stops at the second token, {replay.raised}; {found}"
    text = max(replay.texts, key=parts.longest_run)
    run = parts.longest_run(text)
    failed = [rules for rules in replay.degenerate if rules]
    if len(failed) * 2 <= len(replay.texts):
        return "missed", f"{len(failed)} of {len(replay.texts)} completions fail the gate"
    answer, found = _blamed(replay, "completion", "gen.checkpointing-train")
    return answer, (
        f"one word {run} times in a row: {text[-40:]!r}; {len(failed)} of {len(replay.texts)} fail "
        f"the gate on raw ids ({failed[0][0]}); {found}"
    )


def salad(replay: Replay) -> RowAnswer:
    reasons = degenerate_text(parts.SALAD)
    loop = degenerate_text("system " * 200)
    return _holds(
        bool(reasons) and set(map(parts.rule, reasons)) != set(map(parts.rule, loop)),
        f"salad: {'; '.join(reasons)}. One repeated word: {'; '.join(loop)}",
    )


def malformed(replay: Replay) -> RowAnswer:
    if replay.raised:
        return "shown", f"no completion was produced: {replay.raised}"
    found = [parse(text) for text in replay.texts]
    wrong = [f"{one.what} at {one.where}" for one in found if isinstance(one, Malformed)]
    if not cache_is_dropped():
        return _holds(len(wrong) < len(found), f"{kept()}: {len(wrong)} malformed")
    return _holds(len(wrong) == len(found), f"{len(wrong)} of {len(found)} malformed: {wrong[0]}")


def stuck(replay: Replay) -> RowAnswer:
    if replay.raised:
        return "shown", f"no reward was paid: {replay.raised}"
    answer, found = _blamed(replay, "reward", "reward.floor")
    rewards = sorted(set(replay.rewards))
    if cache_is_dropped() and rewards != [0.1]:
        return "missed", f"rewards {rewards}"
    return answer, f"rewards {', '.join(f'{r:.2f}' for r in rewards)}; {found}"


def embeddings(replay: Replay) -> RowAnswer:
    sound = "the placeholders hold the towers' features, equal when replayed"
    return _cleared(replay, "embed.not-injected", sound)


def template(replay: Replay) -> RowAnswer:
    sound = "the rendered text equals the reference's, placeholders included"
    return _cleared(replay, "text.media-dropped", sound)


def keywords(replay: Replay) -> RowAnswer:
    ignored = [k for case in replay.cases for call in case.processed for k in call.ignored]
    answer, found = _caught("batch.audios-kwarg")
    if ignored:
        return "broken", f"ignored: {', '.join(ignored)}"
    return answer, f"no keyword was ignored in the replayed run; audios= is {found}"


def good_and_bad(replay: Replay) -> RowAnswer:
    first = replay.verdict.first
    verdict = "right" if all(replay.right) else "wrong"
    where = "no stage breaks" if first is None else f"the first stage to break is {first.stage}"
    return _holds(
        all(replay.right) and first is not None,
        f"the same weights in eval mode: {replay.good[0]!r}, {verdict}; in training {where}",
    )


def system_prompt(replay: Replay) -> RowAnswer:
    heard = any("System prompt modified" in text for text in parts.warnings(replay.cases))
    blamed = replay.finding("text")
    return _holds(
        blamed is None,
        f"{'issued' if heard else 'not issued by this version'}; harmless: it concerns speech "
        "output, and the output here is text",
    )


def requires_grad(replay: Replay) -> RowAnswer:
    while_generating = any(
        "requires_grad=True" in text
        for case in replay.cases
        for call in case.generated
        for text in call.warnings
    )
    # a step that raised has no summary
    heard = while_generating or any(
        "requires_grad=True" in text for text in parts.warnings(replay.cases)
    )
    on = any(call.modes.checkpointing for case in replay.cases for call in case.generated)
    state = "checkpointing was on while generating"
    if not heard and cache_is_repaired():
        return _holds(on, f"not issued by this version, although {state}: {kept()}")
    harm = "and the cache was dropped" if cache_is_dropped() else f"but {kept()}"
    return _holds(
        while_generating and on,
        f"issued {'during' if while_generating else 'outside'} generate: {state}, {harm}",
    )


ROWS: Mapping[int, Callable[[Replay], RowAnswer]] = {
    1: lambda replay: _caught("text.first-only"),
    2: lambda replay: _caught("batch.flag-forward"),
    3: lambda replay: _caught("media.images-only"),
    4: media_counts,
    5: placeholders,
    6: structure,
    7: repeated,
    8: salad,
    9: malformed,
    10: stuck,
    11: embeddings,
    12: template,
    13: keywords,
    14: good_and_bad,
    15: system_prompt,
    16: requires_grad,
    17: lambda replay: _holds(*parts.settings_that_cannot_work()),
    18: lambda replay: _holds(*parts.four_processes()),
    19: lambda replay: _holds(*parts.readers()),
    20: lambda replay: _holds(*parts.good_path()),
    21: lambda replay: _holds(*parts.checkpoints()),
}
