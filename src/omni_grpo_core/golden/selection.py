"""Which pending goldens a decision is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.golden.results import VERDICTS
from omni_grpo_core.golden.store import PENDING, pending_cases, read_golden, split_name
from omni_grpo_core.golden.suite import Suite


def select(
    folder: Path,
    patterns: Sequence[str],
    suite: Suite,
    *,
    verdicts: Sequence[str] = (),
    platform: str | None = None,
) -> list[Path]:
    """Pending files of the cases whose names match one of the shell ``patterns`` (none: of all),
    made on ``platform`` (``None``: on any), by runs with one of the ``verdicts`` (none: any).

    Raises:
        ConfigError: an unknown verdict, a pattern that nothing pending matches, nothing selected.
        TraceError: with ``verdicts``, a pending file that is broken.
    """
    pending = pending_cases(folder)
    if not pending:
        raise _nothing(str(folder / PENDING), "nothing pending", "pending goldens", platform)
    chosen: dict[Path, tuple[str, str]] = {}
    for pattern in patterns or ("*",):
        found = {
            path: (case, split_name(path.name, suite.base)[1])
            for case, paths in pending.items()
            if case == pattern or fnmatchcase(case, pattern)
            for path in paths
        }
        if not found:
            raise ConfigError(
                f"case {pattern}",
                got="nothing pending of that name",
                want=f"one of {', '.join(pending)}",
                fix="correct the name, or run omni-grpo golden regen",
            )
        keys = {key for _, key in found.values()}
        if platform is not None and platform not in keys:
            got = f"pending goldens of {', '.join(sorted(keys))} only"
            item = f"case {pattern}" if patterns else str(folder / PENDING)
            raise _nothing(item, got, f"goldens made on {platform}", platform)
        chosen |= {path: of for path, of in found.items() if platform in (None, of[1])}
    return _with_verdicts(chosen, verdicts) if verdicts else sorted(chosen)


def _nothing(item: str, got: str, want: str, platform: str | None) -> ConfigError:
    on = f" on {platform}" if platform else ""
    return ConfigError(item, got=got, want=want, fix=f"run omni-grpo golden regen{on}")


def _with_verdicts(chosen: Mapping[Path, tuple[str, str]], verdicts: Sequence[str]) -> list[Path]:
    """``chosen``: case and platform of each file. A case is taken whole or not at all: an
    interrupted regen may have left files of two runs."""
    for verdict in verdicts:
        if verdict not in VERDICTS:
            raise ConfigError(
                "--verdict",
                got=repr(verdict),
                want=f"one or more of {', '.join(VERDICTS)}",
                fix="correct the name",
            )
    found: dict[tuple[str, str], set[str]] = {}
    for path, of in chosen.items():
        found.setdefault(of, set()).add(read_golden(path).header.get("verdict", "unknown"))
    paths = [path for path, of in sorted(chosen.items()) if found[of] <= set(verdicts)]
    if not paths:
        shown = (f"{case}: {' and '.join(sorted(of))}" for (case, _), of in found.items())
        raise ConfigError(
            f"--verdict {','.join(verdicts)}",
            got=f"no such case pending ({', '.join(shown)})",
            want="pending cases of that verdict",
            fix="choose another verdict, or the cases by name",
        )
    return paths
