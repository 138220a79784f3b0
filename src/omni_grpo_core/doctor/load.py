"""A recording on disk -> cases: one folder, or a folder of ``rank-*`` and ``step-*`` folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omni_grpo_core import observed
from omni_grpo_core.doctor.evidence import Case, Reference
from omni_grpo_core.errors import TraceError
from omni_grpo_core.trace.store import load_trace
from omni_grpo_core.types import Trace

_TRACE = "trace.json"
_FOLDERS = ("step-", "rank-")


def step_folders(folder: Path) -> tuple[Path, ...]:
    """The recorded steps under ``folder``, in order of rank and step.

    A step that a killed run left unfinished has no name of its own yet and is not among them.

    Raises:
        TraceError: there is none.
    """
    if (folder / _TRACE).exists():
        return (folder,)
    found: list[Path] = []
    for inner in _named(folder):
        found += [inner] if (inner / _TRACE).exists() else step_folders(inner)
    if not found:
        raise TraceError(
            str(folder),
            got=_kind(folder),
            want=f"a recorded step ({_TRACE}), or a folder of step-* folders",
            fix="point to the folder that was given to record(); a run that was killed before its "
            "first step ended left nothing",
        )
    return tuple(found)


def read_traces(folder: Path) -> list[tuple[str, Trace]]:
    """Every recorded step under ``folder``, by its path.

    Raises:
        TraceError: nothing was recorded, or a file is cut, altered or foreign.
    """
    return [(str(step), load_trace(step)) for step in step_folders(folder)]


def as_cases(
    traces: Sequence[tuple[str, Trace]], reference: Reference | None = None
) -> tuple[Case, ...]:
    """Cases of named traces.

    Raises:
        TraceError: they are passes of the good path rather than recordings of a trainer.
    """
    for name, trace in traces:
        kinds = {type(record.value).__name__ for record in trace.stages}
        if kinds and not any(hasattr(observed, kind) for kind in kinds):
            raise TraceError(
                name,
                got=f"a trace of {', '.join(sorted(kinds))}",
                want="a recording of a trainer's calls",
                fix="record the trainer with omni_grpo_core.record(…); a pass of the good path is "
                "judged by omni-grpo check",
            )
    return tuple(Case(trace, reference) for _, trace in traces)


def _named(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.name.startswith(_FOLDERS))


def _kind(folder: Path) -> str:
    if not folder.exists():
        return "no such folder"
    return "a folder without any" if folder.is_dir() else "a file"
