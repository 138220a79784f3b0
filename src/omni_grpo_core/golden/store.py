"""Where goldens are stored, and which file applies to a platform.

``golden/<case>/<stage>.txt`` is the base platform's, ``<stage>@<platform>.txt`` another's where it
differs; pending files are in ``golden/.pending``. A platform uses its own file first, then those of
its declared fallbacks, then, for stages with nothing computed on a device, the base's. If none of
them exists the check fails: floats are never compared with another device's golden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from omni_grpo_core.errors import TraceError
from omni_grpo_core.golden.classify import base_stage
from omni_grpo_core.golden.suite import Suite
from omni_grpo_core.golden.text import REGENERATE, Golden, parse_golden, read_text
from omni_grpo_core.io.bounded import kind_of

PENDING = ".pending"
EXACT_STAGES = frozenset({"sample", "conversation", "text", "media", "batch", "positions"})
"""Computed on the CPU whatever the model runs on: every platform uses their base golden."""
_FROM_COMPLETIONS = frozenset({"parsed", "reward", "advantage"})
"""Computed from completions, also on the CPU: a platform with the same completions uses the base
golden, one with other completions has its own."""


@dataclass(frozen=True, slots=True)
class Found:
    """A golden and its file, relative to the golden folder."""

    golden: Golden
    file: str


def file_name(stage: str, key: str, base: str) -> str:
    """
    >>> file_name("logits", "cuda-sm90-bf16", base="cpu-fp32")
    'logits@cuda-sm90-bf16.txt'
    >>> file_name("logits", "cpu-fp32", base="cpu-fp32")
    'logits.txt'
    """
    return f"{stage}.txt" if key == base else f"{stage}@{key}.txt"


def split_name(name: str, base: str) -> tuple[str, str]:
    """Stage and platform from a golden's file name.

    >>> split_name("loss.1@cuda-sm90-bf16.txt", "cpu-fp32")
    ('loss.1', 'cuda-sm90-bf16')
    """
    stage, _, key = name.removesuffix(".txt").partition("@")
    return stage, key or base


def candidates(stage: str, key: str, suite: Suite) -> tuple[str, ...]:
    """File names that apply to a stage on a platform, in order of preference."""
    keys = [key, *suite.fallbacks.get(key, ())]
    if base_stage(stage) in EXACT_STAGES | _FROM_COMPLETIONS:
        keys.append(suite.base)
    return tuple(dict.fromkeys(file_name(stage, k, suite.base) for k in keys))


def read_golden(path: Path) -> Golden:
    """One golden file.

    Raises:
        TraceError: naming file and line, if it cannot be read, was cut or edited, has a newer
            format, or holds another stage than its name says.
    """
    golden = parse_golden(read_text(path), str(path))
    named = split_name(path.name, "")[0]
    if golden.stage != named:
        raise TraceError(
            str(path),
            got=f"a golden of {golden.stage!r}",
            want=f"one of {named!r}, as the file name says",
            fix=REGENERATE,
        )
    return golden


def find_goldens(folder: Path, case: str, key: str, suite: Suite) -> dict[str, Found]:
    """The golden of every stage of a case for a platform. Every file of the case is read, also
    those of other platforms: a broken one is reported wherever the check runs."""
    files = {path.name: path for path in sorted((folder / case).glob("*.txt"))}
    read = {name: read_golden(path) for name, path in files.items()}
    stages = dict.fromkeys(split_name(name, suite.base)[0] for name in read)
    found = {}
    for stage in stages:
        for name in candidates(stage, key, suite):
            if name in read:
                found[stage] = Found(read[name], f"{case}/{name}")
                break
    return found


def pending_folder(folder: Path) -> Path:
    """The folder of pending goldens, whether or not it exists yet.

    Raises:
        TraceError: it, or a case in it, is not a folder or is a link, which may lead out of the
            golden folder.
    """
    pending = folder / PENDING
    _require_folder(pending)
    for case in sorted(pending.iterdir()) if pending.is_dir() else ():
        if case.is_symlink() or not case.name.startswith("."):  # .DS_Store
            _require_folder(case)
    return pending


def _require_folder(path: Path) -> None:
    if path.is_symlink():
        got = "a link"
    elif path.is_dir() or not path.exists():
        return
    else:
        got = "an ordinary file" if path.is_file() else kind_of(path.stat().st_mode)
    raise TraceError(
        str(path),
        got=got,
        want="a folder",
        fix="remove it and run omni-grpo golden regen again",
    )


def pending_cases(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Pending files by case. Raises as :func:`pending_folder`."""
    cases: dict[str, list[Path]] = {}
    for path in sorted(pending_folder(folder).glob("*/*.txt")):
        cases.setdefault(path.parent.name, []).append(path)
    return {case: tuple(paths) for case, paths in cases.items()}


def all_files(folder: Path) -> Iterator[Path]:
    """Every stored golden, of every platform."""
    for path in sorted(folder.glob("*/*.txt")):
        if not path.parent.name.startswith("."):
            yield path


def changed_header(was: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Header entries that both sides have and that differ: versions, settings, platform.

    >>> changed_header({"torch": "2.10", "why": "new"}, {"torch": "2.11"})
    {'torch': ('2.10', '2.11')}
    """
    return {key: (was[key], now[key]) for key in was if key in now and was[key] != now[key]}
