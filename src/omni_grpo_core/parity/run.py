"""A path over all rows: in this process, in another Python, or from stored traces."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.errors import BatchError, ConfigError
from omni_grpo_core.io.atomic import new_folder
from omni_grpo_core.parity.accepted import accepted
from omni_grpo_core.parity.given import Setup, given_rows, setup_of
from omni_grpo_core.parity.paths import PATHS, UsersPath, open_path, users_path
from omni_grpo_core.parity.seen import failed, header_of, listening, trace_of
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.trace.store import load_trace, save_trace
from omni_grpo_core.types import Sample, Trace

OnRow = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Task:
    """What both paths are run on. ``data``, ``root``, ``format``, ``limit``: the rows."""

    checkpoint: Path
    data: Path
    settings: Settings
    processor: Path | None = None
    root: Path | None = None
    format: str | None = None
    limit: int | None = None

    def setup(self) -> Setup:
        return setup_of(self.checkpoint, self.settings, processor=self.processor)

    def samples(self) -> tuple[Sample, ...]:
        return load_samples(self.data, root=self.root, format=self.format)[: self.limit]


def run_path(
    name: str | UsersPath,
    setup: Setup,
    samples: Sequence[Sample],
    on_row: OnRow = lambda row: None,
) -> tuple[Trace, ...]:
    """One trace per sample, of a path by its name or of a user's function. What a path raises at a
    row is kept in that row's header as ``error``.

    Raises :class:`~omni_grpo_core.errors.BatchError` for an output that is none, and where a user's
    function raises at every row.
    """
    path = open_path(name, setup) if isinstance(name, str) else users_path(name, setup)
    title = name if isinstance(name, str) else getattr(name, "__qualname__", type(name).__name__)
    header = header_of(title, setup)
    vocabulary = 1 + max(setup.processor.tokenizer.get_vocab().values())
    traces = []
    for number, given in enumerate(given_rows(setup, samples)):
        on_row(number)
        with listening(setup.processor) as sounds:
            try:
                output = path(given)
            except Exception as error:  # a foreign library's: the row is a finding, not our bug
                traces.append(failed(header, given, error))
                continue
        row = accepted(output, f"{title}, {given.sample.sample_id}", vocabulary)
        traces.append(trace_of(header, given, row, sounds, setup))
    if title not in PATHS and traces and all("error" in trace.header for trace in traces):
        raise BatchError(
            title,
            got=f"{traces[0].header['error']}, and none of {len(traces)} rows without an error",
            want="function(messages, processor) that returns what the processor does for a row",
            fix="correct it: nothing can be compared",
        )
    return tuple(traces)


def is_stored(name: str) -> bool:
    """Whether a path is named by the folder of its traces."""
    return (Path(name) / "0000" / "trace.json").is_file()


def save_traces(traces: Sequence[Trace], folder: Path) -> None:
    """Store traces in a new folder, numbered; whole or not at all."""
    with new_folder(folder) as partial:
        for number, trace in enumerate(traces):
            save_trace(trace, partial / f"{number:04}", durable=False)


def load_traces(folder: Path) -> tuple[Trace, ...]:
    """The traces that :func:`save_traces` stored."""
    return tuple(load_trace(place) for place in sorted(folder.iterdir()) if place.is_dir())


def run_in(python: Path, name: str, task: Task, place: Path) -> tuple[Trace, ...]:
    """The path in another Python, whose environment has the libraries that it needs and this
    package's own; this package itself is taken from here. ``place``: a new folder for the traces.

    Raises :class:`~omni_grpo_core.errors.ConfigError` with the last line that it printed if it
    fails.
    """
    source = Path(__file__).parents[2]
    environment = dict(os.environ)
    # this code, but never a whole site-packages, whose libraries would replace the other ones
    if not (source / "transformers").exists():
        paths = [str(source), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [str(python), "-m", "omni_grpo_core.parity.other_python"]
    with TemporaryDirectory() as scratch:
        request = Path(scratch) / "request.json"
        request.write_text(json.dumps(_request(name, task, place)), encoding="utf-8")
        try:
            done = subprocess.run(
                [*command, str(request)],
                env=environment, capture_output=True, text=True, errors="replace", check=False,
            )  # fmt: skip
            got = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            failed_to_run = bool(done.returncode)
        except OSError as error:
            got, failed_to_run = str(error.strerror), True
    if failed_to_run:
        raise ConfigError(
            f"input path {name} in {python}",
            got=got,
            want="a Python with the libraries of that path and of omni-grpo-core",
            fix="install them there, or make the traces there (--traces) and pass their folder",
        )
    return load_traces(place)


def _request(name: str, task: Task, place: Path) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "path": name,
        "into": str(place.absolute()),
        "checkpoint": str(task.checkpoint.absolute()),
        "processor": None if task.processor is None else str(task.processor.absolute()),
        "data": str(task.data if str(task.data).startswith("hub:") else task.data.absolute()),
        "root": None if task.root is None else str(task.root.absolute()),
        "format": task.format,
        "limit": task.limit,
        "settings": asdict(task.settings),
    }
