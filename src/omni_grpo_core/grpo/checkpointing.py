"""Saved states of a run: there whole or not at all, the newest whole one is resumed from.

``out/state/000050`` holds what Accelerate saves (weights, optimizer) and ``run.json``: the step
that comes next, the configuration's fingerprint, and what the guard remembers. Sampling, order and
learning rate are functions of seed and step, so there is no other state.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_grpo_core.errors import TrainError
from omni_grpo_core.grpo.train_config import TrainConfig, as_values
from omni_grpo_core.policy import Policy
from omni_grpo_core.trace.atomic import write_file

_FREE = ("steps", "save_every", "keep", "eval_every", "eval_data", "trackers", "guard", "out")
"""Keys that may change between a run and its resumption: they do not change a step. (A schedule
that falls until the last step depends on ``steps``, so then that may not change.)"""


@dataclass(frozen=True, slots=True)
class Saved:
    """A whole saved state. ``step``: the one that comes next. ``guard``: remembered steps."""

    folder: Path
    step: int
    guard: tuple[Mapping[str, Any], ...]


def fingerprint(config: TrainConfig) -> str:
    """Of everything in the configuration that decides what a step does."""
    free = _FREE if config.optimizer.schedule == "constant" else _FREE[1:]
    values = {key: value for key, value in as_values(config).items() if key not in free}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def newest(out: Path, config: TrainConfig) -> Saved | None:
    """The newest whole state under ``out``, or ``None``. What a killed writer left is removed.

    Raises ``TrainError`` when it is another configuration's.
    """
    states = out / "state"
    if not states.is_dir():
        return None
    whole = sorted(p for p in states.iterdir() if not p.name.startswith("."))
    if not whole:
        return None
    record = json.loads((whole[-1] / "run.json").read_text(encoding="utf-8"))
    if record["fingerprint"] != fingerprint(config):
        raise TrainError(
            str(out),
            got="the state of a run with other settings",
            want="a new folder, or the settings it was started with",
            fix=f"compare with {out / 'config.json'}",
        )
    return Saved(whole[-1], int(record["step"]), tuple(record["guard"]))


def save(
    out: Path,
    config: TrainConfig,
    step: int,
    guard: tuple[Mapping[str, Any], ...],
    *,
    write: Callable[[Path], None],
    main: bool,
    wait: Callable[[], None],
) -> None:
    """Write the state from which ``step`` comes next. Every process calls this; ``write`` is
    Accelerate's, into a hidden folder; the main process then renames it and drops old ones."""
    states = out / "state"
    target = states / f"{step:06d}"
    partial = states / f".{target.name}.partial"
    if main:
        states.mkdir(parents=True, exist_ok=True)
        for left in states.glob(".*.partial"):
            shutil.rmtree(left)
        partial.mkdir()
    wait()
    write(partial)
    wait()
    if main and not target.exists():
        record = {"step": step, "fingerprint": fingerprint(config), "guard": list(guard)}
        (partial / "run.json").write_text(json.dumps(record), encoding="utf-8")
        for path in (*partial.rglob("*"), partial, states):
            _sync(path)
        partial.rename(target)
        _sync(states)
        for old in sorted(p for p in states.iterdir() if not p.name.startswith("."))[
            : -config.keep
        ]:
            # hidden first: a half-removed state must not be taken for a whole one
            doomed = old.with_name(f".{old.name}.partial")
            old.rename(doomed)
            shutil.rmtree(doomed)
    wait()


def export(policy: Policy, config: TrainConfig, folder: Path, weights: Mapping[str, Any]) -> None:
    """The trained thinker as a checkpoint folder, ``weights`` (adapters merged) and processor; it
    takes the place of an earlier one.

    Files of a thinker's own folder are copied as they are: no version's own save can be read by all
    supported ones.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    policy.model.save_pretrained(partial, state_dict=dict(weights))
    source = Path(policy.checkpoint)
    kind = json.loads((source / "config.json").read_text(encoding="utf-8")).get("model_type", "")
    if kind.endswith("_thinker"):
        for file in (*source.glob("*.json"), *source.glob("*.txt"), *source.glob("*.jinja")):
            if not file.name.endswith(".index.json"):
                shutil.copy(file, partial / file.name)
    if not (partial / "preprocessor_config.json").exists():
        policy.processor.save_pretrained(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def cut_log(path: Path, step: int) -> None:
    """Drop the lines of steps from ``step`` on (and a half-written last one): they come again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        if json.loads(line)["step"] < step:
            kept.append(line)
    write_file(path, "".join(kept).encode())


def append_log(path: Path, record: Mapping[str, Any]) -> None:
    """One line of JSON, on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
