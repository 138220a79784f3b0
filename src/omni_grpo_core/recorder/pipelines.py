"""A user's pipeline as one callable, run on our rows and recorded: no trainer needed.

A pipeline is any callable ``pipeline(rows, model, processor)`` that does with the rows what the
user's trainer does: render, load media, batch, generate, and optionally score. Its return value is
ignored. A row is a mapping as in HumanOmniV2's JSON, with absolute paths: ``problem``,
``problem_type``, ``options``, ``solution``, ``data_type``, ``path``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.recorder.record import record
from omni_grpo_core.trace.calls import SamplesSeen

Rows = Sequence[Mapping[str, Any]]
Pipeline = Callable[[Rows, Any, Any], Any]


def load_pipeline(path: str) -> Pipeline:
    """The callable ``module:name``.

    Raises :class:`~omni_grpo_core.errors.ConfigError` when ``path`` has another form, the module
    cannot be imported, or it has no callable of that name.

    >>> load_pipeline("builtins:print")
    <built-in function print>
    """
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise _bad(path, "no module:name", "use the form package.module:function")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # importing foreign code can raise anything
        got = f"{type(error).__name__} while importing it: {error}"
        raise _bad(path, got, "run from the folder that contains it, or install it") from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise _bad(path, f"no callable named {attribute!r}", "correct the name")
    loaded: Pipeline = found
    return loaded


def record_pipeline(
    pipeline: Pipeline, folder: Path, *, batches: Iterable[Rows], model: Any, processor: Any
) -> tuple[str, ...]:
    """Run ``pipeline`` on each of ``batches`` and record each as one step below ``folder``.

    Returns the exceptions it raised, as text; a batch that raises ends its step, and the next one
    is run.

    Raises:
        ConfigError: it called neither the processor nor the model it was given.
        TraceError: ``folder`` already holds steps.
    """
    raised = []
    called = False
    batches = list(batches)
    with record(folder, model=model, processor=processor, steps=len(batches)) as recorder:
        for rows in batches:
            ids = tuple(str(row.get("sample_id", place)) for place, row in enumerate(rows))
            recorder.note(SamplesSeen(tuple(rows), ids))
            try:
                pipeline(rows, model, processor)
            except Exception as error:  # the failure is what the user wants to see
                raised.append(recorder.buffer.plain.error(error))
            called = called or len(recorder.buffer.records) > 1 or not recorder.buffer.records
            recorder.end_step()
    if not called:
        raise _bad(
            f"{getattr(pipeline, '__module__', '')}:{getattr(pipeline, '__name__', pipeline)}",
            "; ".join(raised) or "no call of the processor or the model it was given",
            "use the processor and the model from its arguments",
        )
    return tuple(raised)


def _bad(path: str, got: str, fix: str) -> ConfigError:
    return ConfigError(
        f"pipeline {path}", got=got, want="a callable pipeline(rows, model, processor)", fix=fix
    )
