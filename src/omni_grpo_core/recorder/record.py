"""``record``: a trainer's steps as traces, one folder each.

Everything is restored when the block ends, after the last requested step, or when the trainer
raises; a step cut short by an exception is kept too, as it is the one to look at.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.recorder.adapters.swift import SwiftRequests
from omni_grpo_core.recorder.hooks import Patches, WarningsWatch
from omni_grpo_core.recorder.plain import Plain
from omni_grpo_core.recorder.step_buffer import Bounds, StepBuffer, stage_of
from omni_grpo_core.recorder.thinker import (
    Found,
    find,
    half_types,
    marks,
    placeholders,
    rope_sections,
)
from omni_grpo_core.recorder.watch_model import ModelWatch
from omni_grpo_core.recorder.watch_own import OwnWatch
from omni_grpo_core.recorder.watch_processor import ProcessorWatch
from omni_grpo_core.recorder.watch_rewards import RewardWatch
from omni_grpo_core.recorder.watch_step import StepWatch
from omni_grpo_core.rewards.call import RewardFunction
from omni_grpo_core.trace.calls import CALLS, Call
from omni_grpo_core.trace.store import save_trace
from omni_grpo_core.types import Trace

_BEGUN = time.time()
"""Of this process."""
_LOG = logging.getLogger("omni_grpo_core.recorder")
_LIBRARIES = (
    "omni-grpo-core",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "qwen-omni-utils",
)


def record(
    folder: str | Path,
    *,
    model: Any,
    processor: Any,
    reward_funcs: Sequence[RewardFunction] = (),
    steps: int = 3,
    probe_rewards: bool = True,
    settings: Mapping[str, Any] | None = None,
    max_tensor_bytes: int = Bounds().tensor_bytes,
    max_step_bytes: int = Bounds().step_bytes,
) -> Recorder:
    """Watch a trainer for ``steps`` optimizer steps::

        with record("trace/", model=model, processor=processor, reward_funcs=rewards):
            trainer.train()

    ``model``: the trainer's, wrapped or not. ``reward_funcs``: the trainer's own list; its
    functions are replaced in place while recording. A loop that keeps them elsewhere calls
    ``Recorder.reward_funcs`` instead. ``probe_rewards``: call each function that is safe to call
    on completions with known scores, see :mod:`~omni_grpo_core.recorder.probe`.
    ``settings``: accumulation, group size … under the trainer's names.

    Not seen: a processor called in a data loader's worker processes (use ``num_workers=0`` while
    recording), a rollout in another engine, and what runs inside a compiled graph.

    Each step becomes ``folder/step-000000`` …, below ``rank-N`` with several ranks. It is there
    when the optimizer's step returns, and outlives a process that is killed then, but not a machine
    that fails in the seconds after: the disk is not waited for. A folder that
    already holds steps is left alone: a job that is started again records beside it, into
    ``folder-1``, ``folder-2`` …, and logs where. A block that raises leaves a last step, be it
    without any call, whose header has ``raised`` and, where a recorded call raised it, that call's
    stage as ``raised_in``.
    ``max_tensor_bytes``: larger tensors are described, not kept; ``max_step_bytes``: the limit
    for all tensors of one step.

    Raises:
        ConfigError: ``model`` has no thinker, or ``steps`` is below 1.

    Once recording has begun, nothing is raised: what cannot be recorded is logged and noted in the
    trace's header.
    """
    bounds = Bounds(tensor_bytes=max_tensor_bytes, step_bytes=max_step_bytes)
    return Recorder(
        Path(folder), model, processor, reward_funcs, steps, probe_rewards, settings or {}, bounds
    )


class Watch(Protocol):
    """Watches one kind of call between ``start`` and ``stop``; whatever it replaces through
    ``patches`` is restored for it."""

    def start(self, patches: Patches) -> None: ...

    def stop(self) -> None: ...


class Recorder:
    """Records while its block runs, or from :meth:`start` to :meth:`stop`.

    ``settings``: a mapping stored with every step; entries may be added at any time. ``buffer``:
    the current step, for watches that adapters add. ``trainer``: what is recorded, in one line, if
    an adapter recognised it.
    """

    def __init__(
        self,
        folder: Path,
        model: Any,
        processor: Any,
        reward_funcs: Sequence[RewardFunction],
        steps: int,
        probe_rewards: bool,
        settings: Mapping[str, Any],
        bounds: Bounds,
    ) -> None:
        if steps < 1:
            raise ConfigError(
                "steps", got=str(steps), want="1 or more", fix="set steps to the number to record"
            )
        self.settings: dict[str, Any] = dict(settings)
        self.trainer = ""
        self._root, self._steps = folder, steps
        self._written = 0
        self._patches = Patches()
        found = find(model)
        self.buffer = StepBuffer(bounds, Plain(), half_types(found.thinker))
        self._header = {
            **_header(found, processor),
            "rope_sections": rope_sections(found.text_model),
            "placeholders": placeholders(found.thinker),
            "marks": marks(processor),
        }
        model_watch = ModelWatch(found, processor, self.buffer)
        rewards = RewardWatch(reward_funcs, self.buffer, probing=probe_rewards)
        self._reward_funcs = rewards.functions
        # emptied at the end, which releases the trainer's objects
        self._watches: list[Watch] = [
            WarningsWatch(self.buffer),
            ProcessorWatch(processor, self.buffer),
            SwiftRequests(processor, self.buffer),
            model_watch,
            OwnWatch(found, processor, self.buffer, model_watch.gradients),
            rewards,
            StepWatch(found, self.buffer, self.settings, self.end_step),
        ]
        self._on = False

    @property
    def reward_funcs(self) -> tuple[RewardFunction, ...]:
        """The watched reward functions, for a loop that calls them by hand."""
        return self._reward_funcs

    @property
    def recording(self) -> bool:
        """Whether there are steps still to come."""
        return self._on

    def watch(self, watch: Watch) -> None:
        """Watch one more kind of call; call before :meth:`start`."""
        self._watches.append(watch)

    def start(self) -> Recorder:
        """Begin, in a folder without steps."""
        asked, self._root = self._root, _unused(self._root)
        if self.trainer:
            self._header["trainer"] = self.buffer.plain.text(self.trainer)
        if self.trainer or self._root != asked:
            # a warning, as people see no other of a library's lines
            _LOG.warning("%s", _begun(self._header.get("trainer", ""), asked, self._root))
        self._on = True
        try:
            for watch in self._watches:
                watch.start(self._patches)
        except BaseException:
            self.stop()
            raise
        return self

    def note(self, value: Call) -> None:
        """Add what cannot be observed: a value of :mod:`omni_grpo_core.trace.calls`.

        Raises :class:`~omni_grpo_core.errors.ConfigError` for anything else.
        """
        if not isinstance(value, Call):
            raise ConfigError(
                "note",
                got=f"a {type(value).__name__}",
                want=f"one of {', '.join(kind.__name__ for kind in CALLS)}",
                fix="build one from omni_grpo_core.trace.calls",
            )
        if self._on:
            with self.buffer.guarded("note"):
                self.buffer.add(self.buffer.own(value))

    def end_step(self) -> None:
        """Write the step. Called automatically after a torch optimizer's step."""
        if self._on and self.buffer.records:
            self._write(complete=True)
            if self._written >= self._steps:
                self.stop()

    def stop(self, error: BaseException | None = None) -> None:
        """Restore everything; a partial step is kept, with ``error`` if that is what ended it."""
        if not self._on:
            return
        self._on = False
        crashed = error is not None and not _is_exit(error)
        if error is not None and crashed:
            self._header["raised"] = self.buffer.plain.error(error)
            if (stage := stage_of(error)) is not None:
                self._header["raised_in"] = stage
        while self._watches:
            self._watches.pop().stop()
        self._patches.undo()
        # what ended the run is said even where nothing was called
        if (self.buffer.records or crashed) and self._written < self._steps:
            self._write(complete=False)
        self.buffer.take()

    def __enter__(self) -> Recorder:
        return self.start()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.stop(error)

    def _write(self, *, complete: bool) -> None:
        calls, missing = self.buffer.take()
        header = {**self._header, "step": str(self._written), "complete": str(complete), **missing}
        folder = _place(self._root) / f"step-{self._written:06d}"
        try:
            # a disk that is waited for would cost more than all the rest
            save_trace(Trace(header, calls), folder, durable=False)
        except Exception as error:
            # a full disk, or our own bug: neither may end the user's training
            _LOG.warning("recording stopped: %s", error)
            self._written = self._steps
            self.stop()
            return
        self._written += 1


def _is_exit(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and not error.code


def _unused(root: Path) -> Path:
    """``root``, or a numbered folder beside it if a recording is there."""
    places = (root if number == 0 else Path(f"{root}-{number}") for number in itertools.count())
    return next(place for place in places if not _is_used(place))


def _begun(trainer: str, asked: Path, root: Path) -> str:
    """
    >>> _begun("Mine as TRL's GRPOTrainer 1.16.0", Path("trace"), Path("trace-1"))
    "recording Mine as TRL's GRPOTrainer 1.16.0; trace holds a recording: this one goes to trace-1"
    """
    where = (
        f"{asked} holds a recording: this one goes to {root}" if root != asked else f"into {root}"
    )
    return f"recording {trainer}; {where}" if trainer else where


def _is_used(root: Path) -> bool:
    """Of a crash, often only the rank that raised has left steps: the others must not mix theirs
    with them. A step written since this process began is of another rank of the same run."""
    others = root.glob("rank-*/step-*")
    return any(_place(root).glob("step-*")) or any(p.stat().st_mtime < _BEGUN for p in others)


def _place(root: Path) -> Path:
    rank, world = _rank()
    return root / f"rank-{rank}" if world > 1 else root


def _rank() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    # set by torchrun before the trainer creates its process group
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _header(model: Found, processor: Any) -> dict[str, str]:
    thinker, (rank, world) = model.thinker, _rank()
    # a thinker inside the whole model does not know where that is from
    configs = (getattr(module, "config", None) for module in (thinker, model.outer))
    names = (str(getattr(config, "_name_or_path", "") or "") for config in configs)
    weight = next(thinker.parameters())
    return {
        **{name: found for name in _LIBRARIES if (found := _version(name))},
        "python": platform.python_version(),
        "checkpoint": next(filter(None, names), ""),
        "model": type(thinker).__name__,
        "processor": type(processor).__name__,
        "device": str(weight.device.type),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "rank": str(rank),
        "world": str(world),
    }


@functools.cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
