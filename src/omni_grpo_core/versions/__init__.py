"""What each version of transformers changes for an omni batch.

Several interpreters, one transformers each -> what every version does, as one JSON object.

``{"family": FAMILY, "default": NAME, "rows": n, "versions": {NAME: {"facts": …, "stages": …}}}``:
facts as :mod:`~omni_grpo_core.versions.facts` writes them, stages compared with the default's trace
(absent for the default itself).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omni_grpo_core import tiny
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.trace.compare import compare
from omni_grpo_core.trace.store import load_trace, value_at
from omni_grpo_core.types import Batch, Positions, Rollout, Trace

Matrix = dict[str, Any]


def interpreters(given: Sequence[str]) -> dict[str, Path]:
    """``NAME=PYTHON`` by name, in order.

    Raises:
        ConfigError: another form, a duplicate name, a file that does not exist.

    >>> interpreters(["old"])
    Traceback (most recent call last):
    omni_grpo_core.errors.ConfigError: config: old: found no '=', wanted NAME=PYTHON; name the ...
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, python = text.partition("=")
        if not equals or not name:
            raise _bad(text, "no '='" if not equals else "no name", "NAME=PYTHON")
        if name in found:
            raise _bad(name, "a second interpreter of that name", "each name once")
        if not os.access(python, os.X_OK) or Path(python).is_dir():
            raise _bad(text, f"nothing that runs at {python!r}", "a Python interpreter")
        # not resolved: a virtual environment's Python is a link and depends on its own location
        found[name] = Path(python).absolute()
    return found


def _bad(item: str, got: str, want: str) -> ConfigError:
    return ConfigError(item, got=got, want=want, fix="name the interpreter of an environment")


def measure(
    pythons: Mapping[str, Path],
    default: str,
    family: tiny.FamilyName = "qwen2.5",
    on_version: Callable[[str], None] = lambda name: None,
) -> Matrix:
    """Probe every interpreter in a process of its own, one after another, and compare each with
    ``default``. Takes a minute each on one core.

    Raises:
        ConfigError: ``default`` is not among them, or an interpreter cannot run the probe.
    """
    if default not in pythons:
        raise _bad(f"default {default!r}", "no such name", " or ".join(pythons))
    with TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / str(i) for i, name in enumerate(pythons)}
        for name, python in pythons.items():
            on_version(name)
            _probe(name, python, folders[name], family)
        facts = {n: json.loads((f / "facts.json").read_bytes()) for n, f in folders.items()}
        reference = load_trace(folders[default] / "trace")
        versions: dict[str, Any] = {}
        for name, folder in folders.items():
            versions[name] = {"facts": facts[name]}
            if name != default:
                versions[name]["stages"] = against(reference, load_trace(folder / "trace"))
    return {
        "family": family,
        "default": default,
        "rows": facts[default]["rows"],
        "versions": versions,
    }


def against(default: Trace, other: Trace) -> dict[str, Any]:
    """Each stage of ``other`` compared with ``default``: verdict, largest |Δ| of a float, the first
    sentences on what differs; and in how many rows ids, positions and answers are equal."""
    stages: dict[str, Any] = {
        stage.stage: {
            "verdict": stage.verdict,
            "max_abs": float(f"{stage.max_abs:.2g}"),
            "differs": [d.sentence for d in stage.differences if d.verdict == "differs"][:3],
        }
        for stage in compare(default, other).stages
    }
    for name, of in (("ids", _ids), ("places", _places), ("answers", _answers)):
        was, now = of(default), of(other)
        stages[f"equal {name}"] = sum(a == b for a, b in zip(was, now, strict=True))
    return stages


def _ids(trace: Trace) -> list[list[int]]:
    return [row.input_ids.tolist() for row in value_at(trace, "batch", Batch).rows]


def _places(trace: Trace) -> list[list[list[int]]]:
    positions = value_at(trace, "positions", Positions).position_ids
    return [positions[:, row].tolist() for row in range(positions.shape[1])]


def _answers(trace: Trace) -> list[tuple[int, ...]]:
    greedy = value_at(trace, "completion", Rollout)
    return [completion.token_ids for completion in greedy.completions]


def _probe(name: str, python: Path, folder: Path, family: tiny.FamilyName) -> None:
    environment = dict(os.environ)
    source = Path(__file__).parents[2]
    # this code under another interpreter, but never a whole site-packages: its transformers would
    # replace the one to measure
    if not (source / "transformers").exists():
        environment["PYTHONPATH"] = str(source)
    command: list[str | Path] = [python, "-m", "omni_grpo_core.versions.facts", folder, family]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", check=False
        )
        got = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        failed = bool(done.returncode)
    except OSError as error:
        got, failed = str(error.strerror), True
    if failed or not (folder / "facts.json").is_file():
        raise ConfigError(
            f"{name}={python}",
            got=got,
            want="an environment that this package runs in",
            fix="install omni-grpo-core there; what was found is the probe's last line",
        )
