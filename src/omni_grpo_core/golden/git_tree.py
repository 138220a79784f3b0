"""The git tree around a golden folder: the commit that a golden records, and what ``accept`` asks
of the tree, so that this commit identifies the code that made the golden."""

from __future__ import annotations

import getpass
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.atomic import is_partial

CLEAN, DIRTY = "clean", "dirty"
NO_GIT = "unknown, since git was not found"
NOT_UNDER_GIT = "not under git"
NO_COMMIT = "under git without a commit"
WANTED = "a clean git tree, so that the golden's commit identifies the code that made it"
_NAMED = 3
"""Changed files named in a message."""
_FIXES = {
    NO_GIT: "install git",
    NOT_UNDER_GIT: "create a repository (git init) and commit the files before goldens are made",
}


def tree_state(folder: Path) -> dict[str, str]:
    """Commit and state of the git tree that contains ``folder``; changes inside ``folder`` itself
    do not count, nor what a killed command left half-written.

    >>> tree_state(Path("/"))
    {'commit': 'unknown', 'tree': 'not under git'}
    """
    commit = git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": "unknown", "tree": _why_none(folder)}
    return {"commit": commit.strip(), "tree": DIRTY if any(_changed_outside(folder)) else CLEAN}


def _changed_outside(folder: Path) -> Iterator[str]:
    """Names of changed files that are not in ``folder``, nor left half-written by a killed
    command."""
    top = Path((git(folder, "rev-parse", "--show-toplevel") or ".").strip())
    inside = folder.absolute().resolve()
    for name in _changed(folder):
        if not (_within(top / name, inside) or is_partial(Path(name))):
            yield name


def _changed(folder: Path) -> Iterator[str]:
    """Names of changed files, as of the top of the tree; both names of a renamed one."""
    # without -z, names with quotes or other than English letters are escaped
    status = git(folder, "status", "--porcelain", "--untracked-files=all", "-z") or ""
    entries = iter(status.split("\0")[:-1])
    for entry in entries:
        yield entry[3:]
        if {*"RC"} & {*entry[:2]}:
            yield next(entries)


def _why_none(folder: Path) -> str:
    if shutil.which("git") is None:
        return NO_GIT
    return NOT_UNDER_GIT if git(folder, "rev-parse", "--git-dir") is None else NO_COMMIT


def _within(path: Path, folder: Path) -> bool:
    path = path.resolve()
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


def require_git(folder: Path, *, no_git: bool = False) -> str:
    """The state of the git tree around ``folder``, which need not exist yet: clean, or without any
    commit, where goldens can be accepted that replace none. With ``no_git`` any state will do.

    Raises:
        ConfigError: no git, no repository, or changes that are not committed.
    """
    tree = tree_state(folder)["tree"]
    if not no_git and tree not in (CLEAN, NO_COMMIT):
        raise ConfigError(
            str(folder),
            got=f"a tree that is {tree}{_named(folder) if tree == DIRTY else ''}",
            want=WANTED,
            fix=f"{_FIXES.get(tree, 'commit or undo the changes')}, or pass --no-git",
        )
    return tree


def _named(folder: Path) -> str:
    names = list(_changed_outside(folder))
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f" ({', '.join(names[:_NAMED])}{more})"


def author(folder: Path) -> str:
    """Name and mail of git's user, else the login name."""
    name, mail = ((git(folder, "config", f"user.{key}") or "").strip() for key in ("name", "email"))
    return f"{name or getpass.getuser()} <{mail}>" if mail else name or getpass.getuser()
