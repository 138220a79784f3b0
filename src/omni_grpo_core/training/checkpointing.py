"""Saved states of a run: complete or absent; a run resumes from the newest complete one.

``out/state/000050`` holds what learns and the optimizer (:mod:`.state_parts`) and, written last,
``run.json``: the next step, the configuration's fingerprint, what the guard remembers, and size and
SHA-256 of every other file. A state that differs from its record is skipped. Sampling, order and
learning rate are functions of seed and step, so there is no other state.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import TrainError, one_line
from omni_grpo_core.io import is_out_of_memory
from omni_grpo_core.io.atomic import sync, write_file
from omni_grpo_core.io.bounded import Unreadable, json_value, read_bytes, read_text
from omni_grpo_core.rewards import health
from omni_grpo_core.training.config import TrainConfig
from omni_grpo_core.training.fingerprint import changed, fingerprint
from omni_grpo_core.training.step import Distributed
from omni_grpo_core.types import Sample

RECORD = "run.json"
FORMAT = 3
"""Of the state. Format 1, which did not state its number, did not list the files; format 2 held
the whole model, whatever learnt."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A complete saved state. ``files``: all but its record. ``step``: the next one. ``guard``:
    remembered steps. ``rows``: :func:`rows_hash` of what it was trained on. ``skipped``: newer
    states that are incomplete, and what is wrong with them."""

    folder: Path
    files: tuple[str, ...]
    step: int
    rows: str
    guard: tuple[health.Step, ...]
    skipped: tuple[str, ...]


def rows_hash(samples: Sequence[Sample]) -> str:
    """A hash of rows and their order, whatever the lines of their file that they are on. Of media
    the paths and stretches count, not the contents."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr(replace(sample, origin="")).encode(errors="backslashreplace"))
    return digest.hexdigest()


def check_rows(out: Path, saved: Saved, rows: str, *, accepted: bool) -> str | None:
    """A warning where a run goes on with other rows, ``accepted``; ``None`` where they are the
    same. Raises ``TrainError`` where they are not accepted."""
    if saved.rows == rows:
        return None
    if not accepted:
        raise TrainError(
            str(out), got="the state of a run on other rows",
            want="the rows that it was started with, in their order",
            fix="restore them, choose another 'out', or go on with these by --data-changed",
        )  # fmt: skip
    return f"the rows are not those that {out} was started with: it goes on with the new ones"


def lock(out: Path) -> int | None:
    """Keep other runs out of ``out`` until the returned descriptor is closed; ``None`` on a file
    system without locks. Raises ``TrainError`` if another run holds the lock."""
    handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise TrainError(
            str(out), got="a run that is still in progress", want="one run per folder",
            fix="wait for it to end, stop it, or choose another 'out'",
        ) from None  # fmt: skip
    except OSError:
        os.close(handle)
        return None
    return handle


def newest(out: Path, config: TrainConfig) -> Saved | None:
    """The newest complete state under ``out``, or ``None`` if none was ever saved.

    Raises ``TrainError`` if it has another configuration or another format, and if there are states
    but none is complete: a run never silently starts over.
    """
    states = out / "state"
    if not os.path.lexists(states):
        return None
    if not states.is_dir():
        raise TrainError(
            str(states), got="something other than a folder", want="a folder of saved states",
            fix="remove it, or choose another 'out'",
        )  # fmt: skip
    skipped: list[str] = []
    for folder in reversed(_in_order(states)):
        try:
            record = _read_record(folder, config)
            _check_files(folder, record["files"])
            guard = _remembered(record["guard"])
        except Unreadable as error:
            skipped.append(f"state {folder.name} is incomplete: {error.got}")
            continue
        return Saved(
            folder, tuple(record["files"]), record["step"], record["rows"], guard, tuple(skipped)
        )
    if skipped:
        raise TrainError(
            str(states), got="; ".join(skipped), want="at least one complete state",
            fix="restore its files, or start over in another 'out'",
        )  # fmt: skip
    return None


def _in_order(states: Path) -> list[Path]:
    """Saved states, oldest first; anything with another kind of name is not one."""
    named = (path for path in states.iterdir() if path.name.isdecimal())
    return sorted(named, key=lambda path: int(path.name))


def _read_record(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """Raises ``Unreadable`` for an invalid record, ``TrainError`` for that of another run."""
    try:
        record = json_value(read_text(folder / RECORD))
    except Unreadable as error:
        raise Unreadable(f"{RECORD}: {error.got}") from None
    wanted = {"step": int, "fingerprint": str, "rows": str, "guard": list, "files": dict}
    found = record.get("format") if isinstance(record, dict) else None
    if type(found) is int and found != FORMAT:
        raise TrainError(
            str(folder), got=f"a state of format {found}", want=f"format {FORMAT}",
            fix="use the version of omni-grpo that wrote it, or start in another 'out'",
        )  # fmt: skip
    if found != FORMAT or any(type(record.get(key)) is not kind for key, kind in wanted.items()):
        raise Unreadable(
            f"{RECORD} does not hold format, {', '.join(wanted)}: "
            "damaged, or written by an earlier version"
        )
    if record["step"] != int(folder.name):
        raise Unreadable(f"{RECORD} is from step {record['step']}")
    if record["fingerprint"] != fingerprint(config):
        stored = folder.parents[1] / "config.json"
        raise TrainError(
            str(folder.parents[1]),
            got=f"the state of a run with other settings{changed(stored, config)}",
            want="a new folder, or the settings it was started with",
            fix=f"compare with {stored}",
        )
    return dict(record)


def _check_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Raises ``Unreadable`` for the first file that is not as it was written."""
    for name, noted in files.items():
        path = folder / name
        if not path.is_file():
            raise Unreadable(f"{name} is missing")
        size = path.stat().st_size
        if not isinstance(noted, list) or len(noted) != 2:
            raise Unreadable(f"{RECORD} does not hold the size and hash of {name}")
        if size != noted[0]:
            raise Unreadable(f"{name} has {size} bytes of {noted[0]}")
    with ThreadPoolExecutor() as pool:
        for name, found in zip(files, pool.map(_digest, map(folder.joinpath, files)), strict=True):
            if found != files[name][1]:
                raise Unreadable(f"{name} differs from what was written")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remembered(entries: list[Any]) -> tuple[health.Step, ...]:
    """Raises ``Unreadable`` for entries that :func:`save` cannot have written."""
    keys = {"scores": dict, "totals": list, "group_ids": list, "capped": list}
    for entry in entries:
        fine = isinstance(entry, dict) and entry.keys() == keys.keys()
        fine = fine and all(type(entry[key]) is kind for key, kind in keys.items())
        if not fine or not _fits(entry):
            raise Unreadable(f"{RECORD}: what the guard remembers is not a step")
    return tuple(health.Step(**entry) for entry in entries)


def _fits(entry: Mapping[str, Any]) -> bool:
    numbers = [entry["totals"], *entry["scores"].values()]
    columns = (*numbers, entry["group_ids"], entry["capped"])
    return (
        all(type(column) is list for column in numbers)
        and len({len(column) for column in columns}) == 1
        and all(type(value) in (int, float, type(None)) for c in numbers for value in c)
        and all(type(value) is str for value in entry["group_ids"])
        and all(type(value) is bool for value in entry["capped"])
    )


def save(
    out: Path,
    config: TrainConfig,
    step: int,
    guard: Sequence[health.Step],
    *,
    rows: str,
    write: Callable[[Path], Mapping[str, list[Any]]],
    distributed: Distributed,
) -> None:
    """Write the state from which ``step`` comes next. Every process calls this; ``write`` writes a
    process's files into a hidden folder and returns size and SHA-256 of each; the main process then
    renames it and deletes old states.

    Raises ``TrainError`` if it cannot be written; earlier states stay as they were.
    """
    target = out / "state" / f"{step:06d}"
    partial = _hidden(target)
    record: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "fingerprint": fingerprint(config),
        "rows": rows,
        "guard": [asdict(entry) for entry in guard],
    }
    own: dict[str, list[Any]] = {}
    try:
        distributed.agree(lambda: _written(target, lambda: _begin(partial)), main_only=True)
        distributed.agree(lambda: _written(target, lambda: own.update(write(partial))))
        record["files"] = dict(distributed.gather([*own.items()]))
        distributed.agree(
            lambda: _written(target, lambda: _finish(target, record, config.keep)), main_only=True
        )
    except BaseException:
        if distributed.main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _written(target: Path, write: Callable[[], None]) -> None:
    """A full disk is an ``OSError`` in Python, a ``RuntimeError`` in torch, and safetensors has a
    class of its own. Out of memory is reported by :func:`~omni_grpo_core.training.loop.train`."""
    try:
        write()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = one_line(getattr(error, "strerror", None) or error)
        free = shutil.disk_usage(next(p for p in target.parents if p.exists())).free
        raise TrainError(
            str(target), got=f"{type(error).__name__}: {text} ({free / 2**20:.0f} MiB free)",
            want="a writable path with room for it",
            fix="check permissions and free space, then start the run again: what was saved "
            "before is intact",
        ) from error  # fmt: skip


def _begin(partial: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    for left in partial.parent.glob(".*.partial"):
        shutil.rmtree(left)
    partial.mkdir()


def _finish(target: Path, record: Mapping[str, Any], keep: int) -> None:
    partial, states = _hidden(target), target.parent
    write_file(partial / RECORD, json.dumps(record).encode())
    for path in (partial, states):
        sync(path)
    if target.exists():  # it was incomplete when the run was resumed
        _drop(target)
    partial.rename(target)
    sync(states)
    # later ones are incomplete too: they are written again when their step comes
    reached = [path for path in _in_order(states) if int(path.name) <= int(target.name)]
    for old in reached[:-keep]:
        _drop(old)


def _drop(state: Path) -> None:
    """Hidden first: a half-removed state must not be taken for a complete one."""
    doomed = state.with_name(f".{state.name}.old.partial")
    state.rename(doomed)
    if doomed.is_dir():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()


def export(policy: Policy, folder: Path, weights: Mapping[str, Any]) -> None:
    """The trained thinker as a checkpoint folder, ``weights`` (adapters merged) and processor; it
    replaces an earlier one.

    Files of a thinker's own folder are copied unchanged: no version saves what all supported ones
    can read. Raises ``TrainError`` if it cannot be written.
    """
    partial = _hidden(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _written(folder, lambda: _export(policy, partial, weights))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _export(policy: Policy, partial: Path, weights: Mapping[str, Any]) -> None:
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


def truncate_log(path: Path, step: int) -> str | None:
    """Drop the lines of steps from ``step`` on (and a half-written last one): those run again.

    Returns a warning if other lines are not steps; the log with them is kept beside the new one.
    Raises ``TrainError`` if it is not a file.
    """
    if not os.path.lexists(path):
        return None
    try:
        # a byte that is not UTF-8 becomes half a surrogate pair, which is not in any step
        text = read_bytes(path).decode("utf-8", "surrogateescape")
    except Unreadable as error:
        raise TrainError(
            str(path), got=error.got, want="the log of the run", fix="move it away"
        ) from None
    kept, wrong = [], 0
    for line in text.splitlines(keepends=True):
        at = _step_of(line)
        if at is None:
            wrong += line.endswith("\n")
        elif at < step:
            kept.append(line)
    aside = path.with_name(f"{path.name}.unreadable")
    if wrong:
        path.rename(aside)
    write_file(path, "".join(kept).encode())
    return f"{wrong} lines of {path} are not steps: it was kept as {aside.name}" if wrong else None


def _step_of(line: str) -> int | None:
    try:
        line.encode()  # strict: fails on half a surrogate pair
        record = json_value(line, finite=False)
    except (Unreadable, UnicodeEncodeError):
        return None
    at = record.get("step") if isinstance(record, dict) else None
    return at if type(at) is int and line.endswith("\n") else None


def append_log(path: Path, record: Mapping[str, Any]) -> None:
    """One line of JSON, on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
