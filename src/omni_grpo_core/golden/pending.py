"""``regen``: the stages of a run that differ from their goldens, written to ``golden/.pending``.

It never overwrites a golden. The header of a pending file gives the platform, the commit, whether
the git tree was clean and whether completions are degenerate: ``accept`` relies on these.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.golden.checking import (
    CheckOptions,
    checked_cases,
    contexts,
    run_header,
)
from omni_grpo_core.golden.generations import garbage_of
from omni_grpo_core.golden.git_tree import tree_state
from omni_grpo_core.golden.replay import Replay, kept, replay_case
from omni_grpo_core.golden.results import FINE, VERDICTS, CaseResult, Verdict, worst
from omni_grpo_core.golden.sidecar import store
from omni_grpo_core.golden.store import (
    file_name,
    pending_cases,
    pending_folder,
    read_golden,
    split_name,
)
from omni_grpo_core.golden.suite import Suite
from omni_grpo_core.golden.text import compare_goldens, parse_golden, with_header
from omni_grpo_core.golden.tolerances import StageTolerances, load_tolerances
from omni_grpo_core.io.atomic import locked, write_file
from omni_grpo_core.pipeline.stages import Context
from omni_grpo_core.types import Rollout

_NEW = "no golden yet"
_SHOWN = 6
"""Sentences per stage."""


@dataclass(frozen=True, slots=True)
class Regenerated:
    """``result``: the case compared with its goldens. ``files``: now pending review."""

    result: CaseResult
    files: tuple[Path, ...]


def fresh_goldens(fresh: Replay, sidecar: Path | None = None) -> dict[str, str]:
    """Golden text of every stage of a pass that used no goldens, but those that failed; the tensors
    that it stores only as fingerprints go into ``sidecar``."""
    garbage = [
        why
        for value in fresh.fresh.values()
        if isinstance(value, Rollout) and value.temperature == 0
        for completion in value.completions
        for why in garbage_of(fresh.context.policy, completion, None)
    ]
    note = {"degenerate": "; ".join(garbage)} if garbage else {}
    texts = {}
    for stage, seen in fresh.seen.items():
        if seen.text:
            aside = {} if sidecar is None else store(sidecar, kept(fresh.fresh.get(stage)))
            texts[stage] = with_header(seen.text, {**note, **aside})
    return texts


def regen(
    policy: Policy, suite: Suite, folder: Path, key: str, **how: Unpack[CheckOptions]
) -> tuple[Regenerated, ...]:
    """Write every stage of every case that differs from its golden to ``folder/.pending``;
    arguments as in :func:`~omni_grpo_core.golden.checking.checked_cases`.

    Pending files of these cases and this platform are replaced. Each file is written atomically.
    Raises ``TraceError`` if ``.pending`` is not a folder.
    """
    pending_folder(folder)
    state = tree_state(folder)
    return tuple(
        regen_case(*checked, suite, folder, key, state, how.get("sidecar"))
        for checked in checked_cases(policy, suite, folder, key, **how)
    )


def regen_case(
    result: CaseResult,
    replay: Replay,
    suite: Suite,
    folder: Path,
    key: str,
    state: Mapping[str, str],
    sidecar: Path | None = None,
) -> Regenerated:
    """:func:`regen` of one case that was already compared; ``state`` as from ``tree_state``."""
    files = {}
    # a case within tolerance writes nothing: stages after a sampled token flipped by rounding are
    # not computed from the golden's values, and would look changed
    fresh = {} if result.verdict in FINE else fresh_goldens(_without_goldens(replay), sidecar)
    for stage, text in fresh.items():
        found = replay.goldens.get(stage)
        if found is not None:
            now = parse_golden(text)
            if compare_goldens(found.golden, now, replay.tolerances.of(stage)).verdict in FINE:
                continue
        entries = {**state, "verdict": result.verdict}
        data = with_header(text, entries).encode("utf-8", "surrogatepass")
        files[file_name(stage, key, suite.base)] = data
    with locked(folder):
        target = pending_folder(folder) / result.case
        for name, data in files.items():
            write_file(target / name, data)
        _drop_stale(target, files.keys(), key, suite)
    return Regenerated(result, tuple(target / name for name in files))


def _without_goldens(replay: Replay) -> Replay:
    """The same case without the goldens that took the place of its values."""
    return fresh_pass(replay.context, replay.header) if replay.goldens else replay


def fresh_pass(context: Context, header: Mapping[str, str]) -> Replay:
    """Every stage of a case, made from the case alone."""
    return replay_case(context, {}, StageTolerances(), header)


def _drop_stale(target: Path, fresh: Collection[str], key: str, suite: Suite) -> None:
    """Remove pending files of an earlier run on this platform. New ones are already written, so an
    interrupted run leaves too many files rather than too few."""
    for path in sorted(target.glob("*.txt")):
        stage = path.name.removesuffix(".txt").partition("@")[0]
        if path.name not in fresh and path.name == file_name(stage, key, suite.base):
            path.unlink(missing_ok=True)
    with suppress(OSError):  # not empty, or not there
        target.rmdir()


def record(
    policy: Policy, suite: Suite, folder: Path, key: str, **how: Unpack[CheckOptions]
) -> tuple[Path, ...]:
    """Write goldens of every case straight into ``folder``, for comparing two environments without
    a review."""
    files = []
    for name, context in contexts(policy, suite, suite.chosen(how.get("names", ()))).items():
        if "on_case" in how:
            how["on_case"](name)
        fresh = fresh_pass(context, run_header(policy, context.settings, key))
        for stage, text in fresh_goldens(fresh, how.get("sidecar")).items():
            path = folder / name / file_name(stage, key, suite.base)
            write_file(path, text.encode("utf-8", "surrogatepass"))
            files.append(path)
    return tuple(files)


@dataclass(frozen=True, slots=True)
class PendingCase:
    """``verdict``: of the run that made it, the worst if there were several. ``stages``: what
    differs, by file name."""

    verdict: Verdict
    stages: Mapping[str, tuple[str, ...]]

    @property
    def new(self) -> bool:
        """Whether there is nothing to compare it with."""
        return self.verdict == "new" and set(self.stages.values()) == {(_NEW,)}

    def lines(self, case: str) -> list[str]:
        """For a person."""
        lines = [f"{case}: {self.verdict}"]
        new = [name for name, sentences in self.stages.items() if sentences == (_NEW,)]
        lines += [f"  new: {', '.join(new)}"] if new else []
        for name, sentences in self.stages.items():
            if name in new:
                continue
            lines.append(f"  {name}")
            lines += [f"    {sentence}" for sentence in sentences[:_SHOWN]]
        return lines


def pending_changes(folder: Path, suite: Suite) -> dict[str, PendingCase]:
    """Pending files compared with their goldens, by case; no model is needed.

    Raises ``TraceError`` for a broken file on either side.
    """
    with locked(folder):  # a file that is decided on meanwhile would be missing
        return {
            case: _pending_case(folder, case, paths, suite)
            for case, paths in pending_cases(folder).items()
        }


def _pending_case(folder: Path, case: str, paths: Sequence[Path], suite: Suite) -> PendingCase:
    verdicts: list[Verdict] = []
    stages: dict[str, tuple[str, ...]] = {}
    for path in paths:
        now, target = read_golden(path), folder / case / path.name
        verdicts += [verdict for verdict in VERDICTS if verdict == now.header.get("verdict")]
        stage, key = split_name(path.name, suite.base)
        if not os.path.lexists(target):
            stages[path.name] = (_NEW,)
            continue
        compared = compare_goldens(read_golden(target), now, load_tolerances(folder, key).of(stage))
        stages[path.name] = tuple(
            d.sentence for d in compared.differences if d.verdict == "differs"
        )
    return PendingCase(worst(verdicts or ("new",)), stages)
