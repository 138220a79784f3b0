"""What every command shares: JSON output, what a person watches, and quiet libraries.

Heavy libraries are imported inside the functions.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.tested import newer_than_tested


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class TinyFamily(StrEnum):
    qwen2_5 = "qwen2.5"
    qwen3 = "qwen3"


FamilyOption = Annotated[TinyFamily, typer.Option(help="Qwen2.5-Omni's make or Qwen3-Omni's.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def print_json(data: Any) -> None:
    """One JSON object on stdout, in whatever encoding it has; numbers that JSON lacks are null."""
    plain = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") != "utf8"
    try:
        text = json.dumps(data, ensure_ascii=plain, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(data), ensure_ascii=plain)
    print(text)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextmanager
def progress(title: str, as_json: bool) -> Iterator[Callable[[str], None]]:
    """A spinner with the current stage on stderr, where a person watches."""
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


def writable(target: Path) -> None:
    """Raises :class:`ConfigError`, before the work starts, for a place that cannot take a file or
    folder: no folder to put it in, or something there that is neither, such as a pipe."""
    real = Path(os.path.realpath(target))
    if real.exists() and not (real.is_file() or real.is_dir()):
        raise ConfigError(
            str(target), got="a pipe, socket or device", want="a file, or a free name",
            fix="choose another place",
        )  # fmt: skip
    if not real.parent.is_dir() or not os.access(real.parent, os.W_OK):
        raise ConfigError(
            str(target), got="no writable folder to put it in", want="one that exists",
            fix=f"create {real.parent} or choose another place",
        )  # fmt: skip


def require_device(device: str) -> None:
    """Raises :class:`ConfigError` for ``cuda`` on a machine without."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda",
            got="no CUDA device",
            want="one that torch sees",
            fix="use --device cpu",
        )


def quiet_libraries(*, worker: bool = False) -> None:
    """No network, no bars and no advice that is not ours to follow; set before the imports.

    A transformers that is newer than any tested one is told of here, before it can do harm: once,
    by the command, not by its worker processes (``worker``, or a rank above 0).
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # threads that spin while they wait make a small model ten times slower on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    def harmless(record: logging.LogRecord) -> bool:
        # the processors up to 4.57 say this once a conversation; it concerns speech output only
        return not str(record.msg).startswith("System prompt modified")

    logging.getLogger().addFilter(harmless)
    if not worker and os.environ.get("RANK", "0") == "0":
        _tell_of_newer()


def _tell_of_newer() -> None:
    # forty modules, most of them for mail: not at the start of every command
    from importlib.metadata import PackageNotFoundError, version

    try:
        told = newer_than_tested(version("transformers"))
    except PackageNotFoundError:  # the import says it better
        return
    if told is not None:
        typer.echo(f"warning: {told}", err=True)


def quiet_transformers() -> None:
    """No bars of transformers' own; to be called once it is imported."""
    transformers: Any = sys.modules.get("transformers")
    if transformers is not None:
        transformers.utils.logging.disable_progress_bar()
