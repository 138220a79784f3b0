"""``regen``: the stages of a run that differ from their goldens, written to ``golden/.pending``.

It never overwrites a golden. The header of a pending file gives the platform, the commit, whether
the git tree was clean and whether completions are degenerate: ``accept`` relies on these.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.golden.checking import CheckOptions, checked_cases, contexts, run_header
from omni_grpo_core.golden.generations import garbage_of
from omni_grpo_core.golden.replay import kept, replay_case
from omni_grpo_core.golden.results import FINE, CaseResult
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
from omni_grpo_core.io.atomic import write_file
from omni_grpo_core.pipeline.stages import Context
from omni_grpo_core.types import Rollout

_NEW = "no golden yet"
NO_GIT = "unknown, since git was not found"
NOT_UNDER_GIT = "not under git"
NO_COMMIT = "under git without a commit"
_SHOWN = 6
"""Sentences per stage."""


@dataclass(frozen=True, slots=True)
class Regenerated:
    """``result``: the case compared with its goldens. ``files``: now pending review."""

    result: CaseResult
    files: tuple[Path, ...]


def tree_state(folder: Path) -> dict[str, str]:
    """Commit and state of the git tree that contains ``folder``; changes inside ``folder`` itself
    do not count.

    >>> tree_state(Path("/"))
    {'commit': 'unknown', 'tree': 'not under git'}
    """
    commit = git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": "unknown", "tree": _why_none(folder)}
    changed = git(folder, "status", "--porcelain", "--untracked-files=all")
    top = Path((git(folder, "rev-parse", "--show-toplevel") or ".").strip())
    inside = folder.absolute().resolve()
    lines = [line for line in (changed or "").splitlines() if not _within(top, line, inside)]
    return {"commit": commit.strip(), "tree": "dirty" if lines else "clean"}


def _why_none(folder: Path) -> str:
    if shutil.which("git") is None:
        return NO_GIT
    return NOT_UNDER_GIT if git(folder, "rev-parse", "--git-dir") is None else NO_COMMIT


def _within(top: Path, line: str, folder: Path) -> bool:
    """Whether a line of ``git status --porcelain`` names a file in ``folder``."""
    name = line[3:].rpartition(" -> ")[2].strip('"')
    path = (top / name).resolve()
    return path == folder or folder in path.parents


def git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command; ``None`` if it fails or git is missing."""
    there = next((p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir()), None)
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=there, capture_output=True, encoding="utf-8", errors="replace", check=False,
        )  # fmt: skip
    except OSError:  # no git here
        return None
    return done.stdout if done.returncode == 0 else None


def fresh_goldens(context: Context, key: str, sidecar: Path | None = None) -> dict[str, str]:
    """Golden text of every stage of a case, made from the case alone; the tensors that it stores
    only as fingerprints go into ``sidecar``.

    Raises ``TraceError`` if the pass fails: then there are no goldens.
    """
    head = run_header(context.policy, context.settings, key)
    replay = replay_case(context, {}, StageTolerances(), head)
    garbage = [
        why
        for value in replay.fresh.values()
        if isinstance(value, Rollout) and value.temperature == 0
        for completion in value.completions
        for why in garbage_of(context.policy, completion, None)
    ]
    note = {"degenerate": "; ".join(garbage)} if garbage else {}
    texts = {}
    for stage, seen in replay.seen.items():
        if seen.text:
            aside = {} if sidecar is None else store(sidecar, kept(replay.fresh.get(stage)))
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
    waiting = pending_folder(folder)
    state = tree_state(folder)
    done = []
    for context, goldens, tolerances, result in checked_cases(policy, suite, folder, key, **how):
        target = waiting / result.case
        files = []
        # a case within tolerance writes nothing: stages after a sampled token flipped by rounding
        # are not computed from the golden's values, and would look changed
        fine = result.verdict in FINE
        fresh = {} if fine else fresh_goldens(context, key, how.get("sidecar"))
        for stage, text in fresh.items():
            found = goldens.get(stage)
            if found is not None:
                now = parse_golden(text)
                if compare_goldens(found.golden, now, tolerances.of(stage)).verdict in FINE:
                    continue
            path = target / file_name(stage, key, suite.base)
            entries = {**state, "verdict": result.verdict}
            write_file(path, with_header(text, entries).encode("utf-8", "surrogatepass"))
            files.append(path)
        _drop_stale(target, files, key, suite)
        done.append(Regenerated(result, tuple(files)))
    return tuple(done)


def _drop_stale(target: Path, fresh: Sequence[Path], key: str, suite: Suite) -> None:
    """Remove pending files of an earlier run on this platform. New ones are already written, so an
    interrupted run leaves too many files rather than too few."""
    for path in sorted(target.glob("*.txt")):
        stage = path.name.removesuffix(".txt").partition("@")[0]
        if path not in fresh and path.name == file_name(stage, key, suite.base):
            path.unlink()
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()


def record(
    policy: Policy, suite: Suite, folder: Path, key: str, **how: Unpack[CheckOptions]
) -> tuple[Path, ...]:
    """Write goldens of every case straight into ``folder``, for comparing two environments without
    a review."""
    files = []
    for name, context in contexts(policy, suite, suite.chosen(how.get("names", ()))).items():
        for stage, text in fresh_goldens(context, key, how.get("sidecar")).items():
            path = folder / name / file_name(stage, key, suite.base)
            write_file(path, text.encode("utf-8", "surrogatepass"))
            files.append(path)
    return tuple(files)


@dataclass(frozen=True, slots=True)
class PendingCase:
    """``verdict``: of the run that made it. ``stages``: what differs, by file name."""

    verdict: str
    stages: Mapping[str, tuple[str, ...]]

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
    found = {}
    for case, paths in pending_cases(folder).items():
        verdict = "new"
        stages: dict[str, tuple[str, ...]] = {}
        for path in paths:
            now, target = read_golden(path), folder / case / path.name
            verdict = now.header.get("verdict", verdict)
            stage, key = split_name(path.name, suite.base)
            if not os.path.lexists(target):
                stages[path.name] = (_NEW,)
                continue
            compared = compare_goldens(
                read_golden(target), now, load_tolerances(folder, key).of(stage)
            )
            stages[path.name] = tuple(
                d.sentence for d in compared.differences if d.verdict == "differs"
            )
        found[case] = PendingCase(verdict, stages)
    return found
