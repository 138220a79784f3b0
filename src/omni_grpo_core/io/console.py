"""Shared by all commands: progress, checks that outputs can be written, quiet libraries.

Heavy libraries are imported inside the functions.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io import newer_than_tested

PROGRESS = "OMNI_GRPO_PROGRESS"
"""Set in the environment by a command that started this one and shows its progress: each stage is
then a line on stderr, after this word."""
_MOST_PROBED = 256
_VERBOSITIES = ("detail", "debug", "info", "warning", "error", "critical")
"""The ones transformers accepts; it prints two lines about any other."""


@contextmanager
def progress(title: str, as_json: bool) -> Iterator[Callable[[str], None]]:
    """A spinner with the current stage on stderr, if it is a terminal."""
    if os.environ.get(PROGRESS):
        yield lambda name: print(f"{PROGRESS} {name}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if as_json or not console.is_terminal:
        yield lambda name: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda name: progress.update(task, description=f"{title}: {name}")


@contextmanager
def step_progress(as_json: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar of steps on stderr, if it is a terminal: call it with the steps done, all steps, and
    what is being done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if as_json or not console.is_terminal:
        yield lambda done, steps, text: None
        return
    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, steps, text: progress.update(
            task, completed=done, total=steps, description=text
        )


def require_outputs(
    *, files: Sequence[Path | None] = (), folders: Sequence[Path | None] = ()
) -> None:
    """Check, before the work starts, that these can be written. An existing file will be replaced;
    a folder must be new or empty; links are followed.

    Raises:
        ConfigError: the path is something else (a pipe, a device, where stdout goes), its folder is
            missing or not writable, or one path is given twice.
    """
    seen: set[str] = set()
    for target, found in (
        *((path, _in_the_way_of_a_file(path)) for path in files if path is not None),
        *((path, _in_the_way_of_a_folder(path)) for path in folders if path is not None),
    ):
        if found is None:
            real = os.path.realpath(target)
            found = "the path of another output" if real in seen else None
            seen.add(real)
        if found is not None:
            raise ConfigError(
                str(target), got=found, want="a free name in a writable folder",
                fix="choose another path, or create its folder",
            )  # fmt: skip


def _in_the_way_of_a_file(target: Path) -> str | None:
    from omni_grpo_core.io.bounded import kind_of

    status = _status(target)
    if isinstance(status, str):
        return status
    if status is not None and not stat.S_ISREG(status.st_mode):
        return kind_of(status.st_mode)
    if status is not None and not os.access(target, os.W_OK):
        return "a file without write permission"
    if status is not None and any(os.path.samestat(status, os.fstat(n)) for n in (0, 1, 2)):
        return "the file of this command's own standard input or output"
    return _refusal(target)


def _in_the_way_of_a_folder(target: Path) -> str | None:
    status = _status(target)
    if isinstance(status, str):
        return status
    if status is not None and not stat.S_ISDIR(status.st_mode):
        return "something other than a folder"
    if status is not None and os.path.samestat(status, Path().stat()):
        return "the working directory"
    if status is not None and any(target.iterdir()):
        return "a folder that is not empty"
    return _refusal(target)


def _status(target: Path) -> os.stat_result | str | None:
    """The status of what is there, ``None`` if nothing is, or why that is unknown."""
    try:
        return target.stat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # a loop of links, a file for a folder, a NUL
        return getattr(error, "strerror", None) or str(error)


def _refusal(target: Path) -> str | None:
    """Why no file can be created beside ``target``; tried, since permissions do not tell all."""
    folder = Path(os.path.realpath(target)).parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder}: {error.strerror or error}"


def require_device(device: str) -> None:
    """Raises :class:`ConfigError` for ``cuda`` on a machine without it."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda",
            got="no CUDA device",
            want="one that torch can see",
            fix="use --device cpu",
        )


def quiet_libraries(*, worker: bool = False) -> None:
    """No network, progress bars or irrelevant advice from libraries; call before importing them.

    Warns about a transformers newer than any tested one, before it can do harm: once, from the
    command, not from its worker processes (``worker``, or a rank above 0).

    Raises:
        RuntimeError: threads cannot be started. OpenMP would end the process with exit code 1.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # what it logs as an error it also raises or recovers from, and the text holds whole configs
    if os.environ.get("TRANSFORMERS_VERBOSITY") not in _VERBOSITIES:
        os.environ["TRANSFORMERS_VERBOSITY"] = "critical"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # threads that spin while waiting make a small model ten times slower on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    def harmless(record: logging.LogRecord) -> bool:
        # processors up to 4.57 log this once per conversation; it concerns speech output only
        return not str(record.msg).startswith("System prompt modified")

    logging.getLogger().addFilter(harmless)
    if not worker and os.environ.get("RANK", "0") == "0":
        _warn_of_newer()
    _start_threads()


def _warn_of_newer() -> None:
    # imports forty modules, most of them for mail: not at the start of every command
    from importlib.metadata import PackageNotFoundError, version

    try:
        warning = newer_than_tested(version("transformers"))
    except PackageNotFoundError:  # the import reports it better
        return
    if warning is not None:
        typer.echo(f"warning: {warning}", err=True)


def _start_threads() -> None:
    """Start as many threads as OpenMP is about to, all at once."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    wanted = int(limit[:9]) if limit.isdecimal() else os.cpu_count() or 1
    done = threading.Event()
    try:
        for _ in range(min(wanted, _MOST_PROBED)):
            threading.Thread(target=done.wait).start()
    finally:
        done.set()


def quiet_transformers() -> None:
    """Turn off transformers' progress bars; call once it is imported."""
    transformers: Any = sys.modules.get("transformers")
    if transformers is not None:
        transformers.utils.logging.disable_progress_bar()
