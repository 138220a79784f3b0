"""``accept`` and ``reject``: a person's decision on pending goldens, with the reason recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from omni_grpo_core.errors import ConfigError, TraceError
from omni_grpo_core.golden.classify import first_nonfinite
from omni_grpo_core.golden.commands import command
from omni_grpo_core.golden.git_tree import CLEAN, NO_COMMIT, WANTED, author, require_git
from omni_grpo_core.golden.selection import select
from omni_grpo_core.golden.steps import golden_stages
from omni_grpo_core.golden.store import PENDING, all_files, pending_cases, read_golden, split_name
from omni_grpo_core.golden.suite import Suite
from omni_grpo_core.golden.text import Golden, read_text, with_header
from omni_grpo_core.io.atomic import locked, sweep, write_file

REASON_LENGTH = 5
"""Shortest reason accepted, in characters: "ok" is not one, "first" is."""
_ENTRIES = ("accepted", "reason", "supersedes", "git")
"""What ``accept`` adds to a golden's header, in this order; ``git`` only with ``no_git``."""
_NAMED = 5
"""Cases that a command names one by one, if another option selects the same ones."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """``file``: the golden. ``supersedes``: sha256 of the golden it replaced, or ``nothing``.
    ``verdict``: of the run that made it."""

    file: Path
    supersedes: str
    case: str
    platform: str
    verdict: str


@dataclass(frozen=True, slots=True)
class _Ready:
    """A pending file that may be accepted: its text, and what it becomes."""

    path: Path
    text: str
    becomes: Accepted


def require_reason(reason: str) -> None:
    """Raises ``ConfigError`` for a reason that is none."""
    if len(reason.strip()) < REASON_LENGTH:
        raise ConfigError(
            "--reason",
            got=repr(reason),
            want=f"why the change is right, in {REASON_LENGTH} characters or more",
            fix="state what changed and why the change is wanted",
        )


def accept(
    folder: Path,
    cases: Sequence[str],
    reason: str,
    suite: Suite,
    *,
    verdicts: Sequence[str] = (),
    platform: str | None = None,
    by: str | None = None,
    no_git: bool = False,
) -> tuple[Accepted, ...]:
    """Replace goldens with their pending files, with who, why and what they supersede in the
    header. Every file is checked before any is written; if interrupted, the same call completes it.

    ``cases``, ``verdicts``, ``platform``: which, see
    :func:`~omni_grpo_core.golden.selection.select`. ``no_git``: whatever the state of the git tree
    is, and was when they were made; goes on record.

    Raises:
        ConfigError: no reason, a git tree that is dirty now or was at regen, non-finite values,
            degenerate completions, a platform that regen did not run on, nothing selected.
        TraceError: a pending file that is broken or was edited.
    """
    require_reason(reason)
    tree = None if no_git else require_git(folder)
    entries = {
        "accepted": f"{datetime.now(UTC):%Y-%m-%d} by {by or author(folder)}",
        "reason": reason.strip(),
    }
    git = {"git": "not required (--no-git)"} if no_git else {}
    with locked(folder):
        paths = select(folder, cases, suite, verdicts=verdicts, platform=platform)
        ready, wrong = _sorted_out(folder, paths, suite, tree)
        if wrong:
            chosen = _rest(ready, wrong, cases)
            options = [*(["--platform", platform] if platform else []), *["--no-git"] * no_git]
            rest = command("accept", folder, *chosen, *options) if chosen else ""
            raise _refusal(wrong, rest)
        for one in ready:
            _replace(one, {**entries, "supersedes": one.becomes.supersedes, **git})
    return tuple(one.becomes for one in ready)


def _sorted_out(
    folder: Path, paths: Sequence[Path], suite: Suite, tree: str | None
) -> tuple[list[_Ready], dict[str, ConfigError]]:
    """Every file as it would be accepted, and the cases that may not be, with the first reason
    of each. ``tree``: the state of the git tree, ``None`` if it does not matter."""
    ready, wrong = [], dict[str, ConfigError]()
    for path in paths:
        golden, text, case = read_golden(path), read_text(path), path.parent.name
        target, key = folder / case / path.name, split_name(path.name, suite.base)[1]
        supersedes = _superseded(target, text)
        verdict = golden.header.get("verdict", "unknown")
        ready.append(_Ready(path, text, Accepted(target, supersedes, case, key, verdict)))
        try:
            _require_acceptable(path, golden, key)
            if tree is not None:
                made = golden.header.get("tree", "unknown")
                _require_tree(path, tree, made, new=supersedes == "nothing")
        except ConfigError as error:
            wrong.setdefault(case, error)
    return ready, wrong


def _superseded(target: Path, text: str) -> str:
    """The golden that ``text`` replaces. An interrupted run may have put it in place already: then
    the one that it replaced."""
    if not target.is_file():
        return "nothing"
    with suppress(TraceError):
        header = read_golden(target).header
        entries = {key: header[key] for key in _ENTRIES if key in header}
        if "supersedes" in entries and with_header(text, entries) == read_text(target):
            return entries["supersedes"]
    return f"sha256 {hashlib.sha256(target.read_bytes()).hexdigest()[:16]}"


def _require_acceptable(path: Path, golden: Golden, key: str) -> None:
    header = golden.header
    if header.get("platform") != key:
        raise ConfigError(
            str(path),
            got=f"a golden made on {header.get('platform', 'an unknown platform')}",
            want=f"one made on {key}",
            fix=f"run omni-grpo golden regen on {key}",
        )
    nonfinite = first_nonfinite(golden.leaves)
    if nonfinite is not None:
        raise ConfigError(
            str(path),
            got=f"a non-finite value at {nonfinite}",
            want="finite values",
            fix="find its cause: omni-grpo golden diff names the first divergent stage",
        )
    if header.get("degenerate") or header.get("verdict") == "degenerate":
        raise ConfigError(
            str(path),
            got=f"a degenerate completion ({header.get('degenerate') or 'see golden check'})",
            want="completions that are not degenerate",
            fix="find the cause: omni-grpo golden diff names the first divergent stage",
        )


def _require_tree(path: Path, tree: str, made: str, *, new: bool) -> None:
    """``tree``: the state now; ``made``: at regen. Before the first commit only what is ``new`` may
    be accepted: no commit misleads, and nothing is lost that no commit could bring back."""
    if made not in (CLEAN, NO_COMMIT):
        raise ConfigError(
            str(path),
            got=f"a golden made in a tree that is {made}",
            want=WANTED,
            fix="commit, then run omni-grpo golden regen again, or pass --no-git",
        )
    if NO_COMMIT in (tree, made) and not new:
        raise ConfigError(
            str(path),
            got=f"a golden to replace, in a tree that is {NO_COMMIT}",
            want="a commit to restore it from",
            fix="commit the files and run omni-grpo golden regen again, or pass --no-git",
        )


def _rest(
    ready: Sequence[_Ready], wrong: Mapping[str, ConfigError], patterns: Sequence[str]
) -> list[str]:
    """What selects the cases that nothing is wrong with; nothing if there are none."""
    left = [one.becomes for one in ready if one.becomes.case not in wrong]
    names = list(dict.fromkeys(one.case for one in left))
    verdicts = {one.verdict for one in left}
    refused = {one.becomes.verdict for one in ready if one.becomes.case in wrong}
    if len(names) <= _NAMED or verdicts & refused:
        return names
    return [*patterns, "--verdict", ",".join(sorted(verdicts))]


def _refusal(wrong: Mapping[str, ConfigError], rest: str) -> ConfigError:
    first = next(iter(wrong.values()))
    several = len(wrong) > 1
    return ConfigError(
        f"cases {', '.join(wrong)}, first {first.item}" if several else first.item,
        got=first.got,
        want=first.want,
        fix=f"{first.fix}; accept the rest by {rest}" if rest else first.fix,
    )


def _replace(one: _Ready, entries: Mapping[str, str]) -> None:
    target = one.becomes.file
    # the golden is complete before the pending file is removed: if interrupted, accept again
    write_file(target, with_header(one.text, entries).encode("utf-8", "surrogatepass"))
    sweep(target)
    _drop(one.path)


def reject(
    folder: Path,
    cases: Sequence[str],
    suite: Suite,
    *,
    verdicts: Sequence[str] = (),
    platform: str | None = None,
) -> tuple[Path, ...]:
    """Delete pending files; goldens are left unchanged. Arguments and errors as of
    :func:`~omni_grpo_core.golden.selection.select`."""
    with locked(folder):
        paths = select(folder, cases, suite, verdicts=verdicts, platform=platform)
        for path in paths:
            _drop(path)
    return tuple(paths)


def _drop(path: Path) -> None:
    path.unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        path.parent.rmdir()


def stale(folder: Path, key: str, suite: Suite, *, every: bool) -> list[Path]:
    """Goldens that no case of the suite uses: of platform ``key`` only, unless ``every``, since a
    run on one machine does not know what another needs. Goldens not made by a suite (those of
    single tests) are excluded.
    """
    stages = {name: set(golden_stages(case)) for name, case in suite.cases.items()}
    found = []
    for path in all_files(folder):
        stage, of = split_name(path.name, suite.base)
        if of != key and not every:
            continue
        if stage not in stages.get(path.parent.name, set()) and _made_by_suite(path):
            found.append(path)
    return found


def unsound(folder: Path) -> list[str]:
    """What must not be committed, one sentence each: goldens that are broken or were edited by
    hand, that were never accepted, and those still pending. No model is needed.

    Raises:
        ConfigError: ``folder`` is not a folder.
        TraceError: its ``.pending`` is not a folder.
    """
    if not folder.is_dir():
        raise ConfigError(
            str(folder), got="no folder", want="a folder of goldens", fix="correct --golden"
        )
    found = []
    for path in all_files(folder):
        try:
            header = read_golden(path).header
        except TraceError as error:
            found.append(str(error))
            continue
        # regen writes "tree", accept writes "accepted"
        if "tree" in header and "accepted" not in header:
            found.append(
                f"{path}: found a golden that was never accepted, wanted one with a recorded "
                f"reason; move it back to {PENDING} and run omni-grpo golden accept"
            )
    with locked(folder):  # a folder that is emptied meanwhile could not be listed
        pending = pending_cases(folder)
    for case, paths in pending.items():
        found.append(
            f"{folder / PENDING / case}: found {len(paths)} pending, wanted none; "
            "run omni-grpo golden review"
        )
    return found


def _made_by_suite(path: Path) -> bool:
    return "platform" in read_golden(path).header
