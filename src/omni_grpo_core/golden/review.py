"""``accept`` and ``reject``: a person's decision on pending goldens, with the reason recorded."""

from __future__ import annotations

import getpass
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from omni_grpo_core.errors import ConfigError, TraceError
from omni_grpo_core.golden.classify import first_nonfinite
from omni_grpo_core.golden.pending import NO_COMMIT, NO_GIT, NOT_UNDER_GIT, git, tree_state
from omni_grpo_core.golden.steps import golden_stages
from omni_grpo_core.golden.store import PENDING, all_files, pending_cases, read_golden, split_name
from omni_grpo_core.golden.suite import Suite
from omni_grpo_core.golden.text import read_text, with_header
from omni_grpo_core.io.atomic import write_file

REASON_LENGTH = 8
"""Shortest reason accepted, in characters: "ok" is not one."""
_FIXES = {
    NO_GIT: "install git, or put it on the PATH",
    NOT_UNDER_GIT: "create a repository (git init) and commit the files",
    NO_COMMIT: "commit the files",
}


@dataclass(frozen=True, slots=True)
class Accepted:
    """``file``: the golden, ``supersedes``: sha256 of the golden it replaced, or ``nothing``."""

    file: Path
    supersedes: str


def waiting(folder: Path, cases: Sequence[str], platform: str | None, suite: Suite) -> list[Path]:
    """Pending files of these cases (by default all) and this platform (``None``: all).

    Raises:
        ConfigError: nothing is pending: regen was not run, or not on that platform.
    """
    pending = pending_cases(folder)
    for case in cases or pending or ("",):
        paths = pending.get(case, ())
        keys = sorted({split_name(path.name, suite.base)[1] for path in paths})
        if not paths or (platform is not None and platform not in keys):
            raise ConfigError(
                f"case {case}" if case else str(folder / PENDING),
                got=f"pending goldens of {', '.join(keys)} only" if keys else "nothing pending",
                want=f"goldens made on {platform}" if platform else "pending goldens",
                fix="run omni-grpo golden regen" + (f" on {platform}" if platform else ""),
            )
    return [
        path
        for case in cases or pending
        for path in pending[case]
        if platform in (None, split_name(path.name, suite.base)[1])
    ]


def accept(
    folder: Path,
    cases: Sequence[str],
    reason: str,
    suite: Suite,
    *,
    platform: str | None = None,
    by: str | None = None,
) -> tuple[Accepted, ...]:
    """Replace goldens of ``cases`` with their pending files, with who, why and what they supersede
    in the header. Every file is checked before any is written.

    Raises:
        ConfigError: no reason, a git tree that is dirty now or was at regen, non-finite values,
            degenerate completions, a platform that regen did not run on, nothing pending.
        TraceError: a pending file that is broken or was edited.
    """
    if len(reason.strip()) < REASON_LENGTH:
        raise ConfigError(
            "--reason",
            got=repr(reason),
            want=f"why the change is right, in {REASON_LENGTH} characters or more",
            fix="state what changed and why the change is wanted",
        )
    _require_clean(str(folder), tree_state(folder)["tree"], "commit or undo the changes")
    paths = waiting(folder, cases, platform, suite)
    for path in paths:
        _require_acceptable(path, suite)
    who = by or _author(folder)
    return tuple(_replace(folder, path, reason.strip(), who) for path in paths)


def _require_clean(item: str, tree: str, fix: str) -> None:
    if tree != "clean":
        raise ConfigError(
            item,
            got=f"a tree that is {tree}",
            want="a clean git tree, so that the golden's commit identifies the code that made it",
            fix=_FIXES.get(tree, fix),
        )


def _require_acceptable(path: Path, suite: Suite) -> None:
    golden = read_golden(path)
    header = golden.header
    key = split_name(path.name, suite.base)[1]
    if header.get("platform") != key:
        raise ConfigError(
            str(path),
            got=f"a golden made on {header.get('platform', 'an unknown platform')}",
            want=f"one made on {key}",
            fix=f"run omni-grpo golden regen on {key}",
        )
    _require_clean(
        str(path), header.get("tree", "unknown"), "commit, then run omni-grpo golden regen again"
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


def _author(folder: Path) -> str:
    name, mail = ((git(folder, "config", f"user.{key}") or "").strip() for key in ("name", "email"))
    return f"{name or getpass.getuser()} <{mail}>" if mail else name or getpass.getuser()


def _replace(folder: Path, path: Path, reason: str, who: str) -> Accepted:
    target = folder / path.parent.name / path.name
    old = target.read_bytes() if target.is_file() else None
    supersedes = "nothing" if old is None else f"sha256 {hashlib.sha256(old).hexdigest()[:16]}"
    text = read_text(path)
    entries = {
        "accepted": f"{datetime.now(UTC):%Y-%m-%d} by {who}",
        "reason": reason,
        "supersedes": supersedes,
    }
    # the golden is complete before the pending file is removed: if interrupted, accept again
    write_file(target, with_header(text, entries).encode("utf-8", "surrogatepass"))
    path.unlink()
    _drop_empty(path.parent)
    return Accepted(target, supersedes)


def reject(folder: Path, cases: Sequence[str], suite: Suite) -> tuple[Path, ...]:
    """Delete the pending files of ``cases``; goldens are left unchanged.

    Raises:
        ConfigError: nothing is pending.
    """
    paths = waiting(folder, cases, None, suite)
    for path in paths:
        path.unlink()
        _drop_empty(path.parent)
    return tuple(paths)


def _drop_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


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
    for case, paths in pending_cases(folder).items():
        found.append(
            f"{folder / PENDING / case}: found {len(paths)} pending, wanted none; "
            "run omni-grpo golden review"
        )
    return found


def _made_by_suite(path: Path) -> bool:
    return "platform" in read_golden(path).header
