"""A recording on disk -> cases: one folder, or a folder of ``rank-*`` and ``step-*`` folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omni_grpo_core.doctor.evidence import Case, Reference, is_checked
from omni_grpo_core.doctor.own_sampling import with_own_sampling
from omni_grpo_core.doctor.ranks import join_ranks
from omni_grpo_core.errors import TraceError
from omni_grpo_core.trace.calls import Call, GenerateCall, calls_of
from omni_grpo_core.trace.store import load_trace
from omni_grpo_core.types import Trace

_TRACE = "trace.json"
_FOLDERS = ("step-", "rank-")


def step_folders(folder: Path) -> tuple[Path, ...]:
    """The recorded steps under ``folder``, in order of rank and step.

    A step that a killed run left unfinished still has a temporary name and is not among them.

    Raises:
        TraceError: there is none.
    """
    if (folder / _TRACE).exists():
        return (folder,)
    # no deeper than ranks: links may form a cycle
    inside = [step for inner in _named(folder) for step in (inner, *_named(inner))]
    found = [step for step in inside if (step / _TRACE).exists()]
    if not found:
        raise TraceError(
            str(folder),
            got=_kind(folder),
            want=f"a recorded step ({_TRACE}), or a folder of step-* folders",
            fix="pass the folder that was given to record(); a run that was killed before its "
            "first step ended recorded nothing",
        )
    return tuple(found)


def read_traces(folder: Path) -> list[tuple[str, Trace]]:
    """Every recorded step under ``folder``, by its path; those of several ranks are one.

    Raises:
        TraceError: nothing was recorded, or a file is truncated, altered or foreign.
    """
    return join_ranks([(str(step), load_trace(step)) for step in step_folders(folder)])


def as_cases(
    traces: Sequence[tuple[str, Trace]],
    reference: Reference | None = None,
    no_reference: str = "pass --checkpoint",
) -> tuple[Case, ...]:
    """Cases of named traces. ``no_reference``: why there is none.

    Raises:
        TraceError: one of them has no trainer calls and did not raise either, or one under the
            wrong stage.
    """
    for name, trace in traces:
        if is_checked(trace):
            continue
        calls = [record for record in trace.stages if isinstance(record.value, Call)]
        if not calls and not trace.header.get("raised"):
            kinds = sorted({type(record.value).__name__ for record in trace.stages})
            raise TraceError(
                name,
                got=f"a trace of {', '.join(kinds)}" if kinds else "a step without any call",
                want="a recording of a trainer's calls, or the trace of a run that was stopped",
                fix="record the trainer with omni_grpo_core.record(…); use omni-grpo check for a "
                "pass of the reference pipeline",
            )
        for number, record in enumerate(trace.stages):
            stage = record.value.stage if isinstance(record.value, Call) else None
            if record.stage != stage:
                kind = type(record.value).__name__
                raise TraceError(
                    f"{name}: stage {number}",
                    got=f"a {kind} under {record.stage!r}",
                    want="a trainer call" if stage is None else repr(stage),
                    fix="record it again: it was altered, or written by another version",
                )
    eos = () if reference is None else reference.policy.eos_token_ids
    return tuple(
        Case(with_own_sampling(_without_others(trace), eos), reference, no_reference=no_reference)
        for _, trace in traces
    )


def _without_others(trace: Trace) -> Trace:
    """Where the recorded model generates, what other instances of its class generate, as a judge
    does, is no rollout; where it does not, they do it in its place."""
    generated = calls_of(trace, GenerateCall)
    others = [call for call in generated if not call.own]
    if not others or len(others) == len(generated):
        return trace
    stages = tuple(record for record in trace.stages if record.value not in others)
    return replace(trace, stages=stages)


def _named(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.name.startswith(_FOLDERS))


def _kind(folder: Path) -> str:
    if not folder.exists():
        return "no such folder"
    if folder.is_dir():
        return "a folder without any"
    return "a file" if folder.is_file() else "neither file nor folder"
