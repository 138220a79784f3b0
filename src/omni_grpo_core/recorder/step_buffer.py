"""What has been recorded of the current step, within bounds, until it is written.

No failure of the recorder may reach the trainer: it is logged once, noted in the header of the
trace, and the call continues.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.recorder.plain import Plain
from omni_grpo_core.recorder.tensors import Described, arrived, copied, local
from omni_grpo_core.trace.calls import Call, GenerateCall, TensorSeen
from omni_grpo_core.trace.digest import digest_of
from omni_grpo_core.types import Stage, StageRecord

_LOG = logging.getLogger("omni_grpo_core.recorder")

_STAGES: Mapping[str, Stage] = {
    "processor": "batch",
    "generate": "completion",
    "forward": "logits",
    "reward": "reward",
}
_DIED_IN = "_omni_grpo_core_stage"
_READ_UP_TO = 1 << 16
"""Bytes of a tensor without digests that are compared with what was kept before."""
_MOST_WARNINGS = 100
_LONGEST_WARNING = 600


@dataclass(frozen=True, slots=True)
class Bounds:
    """``tensor_bytes``: a larger tensor is only described. ``step_bytes``: total for the tensors of
    one step, beyond which even small ones are only described. ``calls``: per step; later ones are
    only counted."""

    tensor_bytes: int = 4 << 20
    step_bytes: int = 256 << 20
    calls: int = 512


@dataclass(slots=True)
class Outcome:
    """The outcome of a watched call. ``result``: ``None`` where it raised ``error``. ``warnings``:
    those issued while it ran."""

    result: Any = None
    error: str | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


Draft = Call | Callable[[], Call]
"""A call as it is added: one that needs values still on a device is made when the step ends."""


@dataclass(slots=True)
class Seen:
    """What is kept of a call's tensors: those small enough, in ``large`` the description of the
    others, and the digests of all that hold floating-point numbers."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    large: dict[str, Described] = field(default_factory=dict)
    digests: dict[str, Tensor] = field(default_factory=dict)

    def described(self) -> dict[str, TensorSeen]:
        return {name: one.seen() for name, one in self.large.items()}


@dataclass(slots=True)
class StepBuffer:
    """The current step. ``records``: (call, seconds), in the order in which they were added.
    ``halves``: the types to which a trainer may cast what a processor returns. ``at_end``: called
    when they are taken."""

    bounds: Bounds
    plain: Plain
    halves: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    records: list[tuple[Draft, float]] = field(default_factory=list)
    troubles: dict[str, None] = field(default_factory=dict)
    left_out: int = 0
    at_end: Callable[[], None] | None = None
    _warnings: dict[str, None] = field(default_factory=dict)
    _listening: list[dict[str, None]] = field(default_factory=list)
    _bytes: int = 0
    _kept: dict[Any, Tensor | Described] = field(default_factory=dict)
    _reported: set[str] = field(default_factory=set)

    def add(self, value: Draft, seconds: float = 0.0) -> None:
        """Keep one value of :mod:`omni_grpo_core.trace.calls`."""
        if len(self.records) >= self.bounds.calls:
            self.left_out += 1
            return
        self.records.append((value, seconds))

    def take(self) -> tuple[tuple[StageRecord[Call], ...], dict[str, str]]:
        """Everything kept since the last call, and for the header what was not; the buffer is then
        empty."""
        if self.at_end is not None:
            self.at_end()
        with self.guarded("values on a device"):
            arrived()
        taken = []
        for draft, seconds in self.records:
            with self.guarded("the end of the step"):
                value = draft if isinstance(draft, Call) else draft()
                taken.append(StageRecord(value.stage, value, (), seconds))
        missing = {}
        if self.left_out:
            missing["calls_left_out"] = str(self.left_out)
        if self.troubles:
            missing["not_recorded"] = "; ".join(self.troubles)
        self.records.clear()
        self._kept.clear()
        self._warnings.clear()
        self.troubles.clear()
        self.left_out = self._bytes = 0
        return tuple(taken), missing

    def sampled(self) -> tuple[str, ...]:
        """What ``generate`` gave so far in this step, as text."""
        arrived()
        made = [draft if isinstance(draft, Call) else draft() for draft, _ in self.records]
        texts = [one.decoded.values() for one in made if isinstance(one, GenerateCall)]
        return tuple(text for kinds in texts for kind in kinds for text in kind)

    # ------------------------------------------------------------------ tensors

    def fits(self, tensor: Tensor) -> bool:
        size = tensor.numel() * tensor.element_size()
        return (
            size <= self.bounds.tensor_bytes and self._bytes + size <= self.bounds.step_bytes
        ) and tensor.device.type != "meta"

    def keep(self, name: str, tensor: Any, seen: Seen) -> Tensor | None:
        """A copy of ``tensor`` or, where it is too large, ``None`` with its description in
        ``seen``: either the same for equal content on the CPU."""
        if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            return None
        content = _content(tensor, seen.digests.get(name))
        kept = None if content is None else self._kept.get(content)
        if kept is None:
            kept = self._copy(tensor)
            if content is not None:
                self._kept[content] = kept
        if isinstance(kept, Tensor):
            return kept
        seen.large[name] = kept
        return None

    def _copy(self, tensor: Tensor) -> Tensor | Described:
        if tensor.is_complex() or not self.fits(tensor):
            return Described.of(tensor)
        self._bytes += tensor.numel() * tensor.element_size()
        return copied(tensor)

    def see(self, values: Mapping[str, Any], seen: Seen, *, casts: bool = False) -> dict[str, Any]:
        """Adds the tensors among ``values`` to ``seen`` and returns the others as plain values.
        ``casts``: add the digests of float32 tensors as half-precision too."""
        tensors = {key: v for key, v in values.items() if isinstance(v, Tensor)}
        for key, tensor in tensors.items():
            digest_into(seen.digests, key, tensor, self.halves if casts else ())
            kept = self.keep(key, tensor, seen)
            if kept is not None:
                seen.tensors[key] = kept
        return self.plain.mapping({key: v for key, v in values.items() if key not in tensors})

    def own(self, value: Any) -> Any:
        """A value noted by hand: tensors copied, secrets redacted."""
        return replace(value, **{f.name: self._own(getattr(value, f.name)) for f in fields(value)})

    def _own(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return copied(value)
        if is_dataclass(value) and not isinstance(value, type):
            return self.own(value)
        if isinstance(value, Mapping) and any(map(_is_kept, value.values())):
            return {str(key): self._own(held) for key, held in value.items()}
        if isinstance(value, tuple | list) and any(map(_is_kept, value)):
            return tuple(map(self._own, value))
        return self.plain.value(value)

    # ------------------------------------------------------------------ warnings, troubles

    def warn(self, text: str) -> None:
        """Keep a warning."""
        text = self.plain.text(text)[:_LONGEST_WARNING]
        for heard in (self._warnings, *self._listening):
            if len(heard) < _MOST_WARNINGS:
                heard[text] = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Those of the step so far, each once."""
        return tuple(self._warnings)

    def listen(self) -> dict[str, None]:
        """A dict that collects warnings as its keys, until :meth:`unlisten`."""
        heard: dict[str, None] = {}
        self._listening.append(heard)
        return heard

    def unlisten(self, heard: dict[str, None]) -> tuple[str, ...]:
        # by identity: two empty dicts are equal
        self._listening[:] = [other for other in self._listening if other is not heard]
        return tuple(heard)

    @contextmanager
    def watching(self, at: str, note: Callable[[Outcome], None]) -> Iterator[Outcome]:
        """Around the trainer's own call, whose result goes into the outcome; ``note`` then receives
        the outcome, whether the call returned or raised."""
        outcome, heard, started = Outcome(), self.listen(), clock()
        try:
            yield outcome
        except BaseException as raised:
            outcome.error = self.plain.error(raised)
            died_in(raised, _STAGES[at])
            raise
        finally:
            outcome.seconds, outcome.warnings = clock() - started, self.unlisten(heard)
            with self.guarded(at):
                note(outcome)

    def guarded(self, at: str) -> AbstractContextManager[None]:
        """Around everything the recorder itself does: a failure is noted, not raised, and no graph
        is made."""
        return _Guard(self, at)

    def trouble(self, at: str, error: Exception) -> None:
        text = f"{at}: {self.plain.error(error)}"
        self.troubles[text] = None
        if text not in self._reported:
            self._reported.add(text)
            _LOG.warning("not recorded: %s", text, exc_info=error)


class _Guard:
    """A class, because it is entered three times for every token: a generator costs more than most
    of what it guards."""

    __slots__ = ("_at", "_buffer", "_grad")

    def __init__(self, buffer: StepBuffer, at: str) -> None:
        self._buffer, self._at = buffer, at

    def __enter__(self) -> None:
        self._grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        torch._C._set_grad_enabled(self._grad)
        if not isinstance(error, Exception):
            return False
        self._buffer.trouble(self._at, error)
        return True  # the recorder's failure must not become the trainer's


def died_in(error: BaseException, stage: Stage) -> None:
    """Note on ``error`` the stage that it was raised in; the innermost call is the first to."""
    if stage_of(error) is None:
        error.__dict__[_DIED_IN] = stage


def stage_of(error: BaseException) -> Stage | None:
    """The stage of the recorded call that raised ``error``; ``None``: raised outside any."""
    stage: Stage | None = error.__dict__.get(_DIED_IN)
    return stage


def digest_into(
    digests: dict[str, Tensor], name: str, tensor: Tensor, casts: Sequence[torch.dtype] = ()
) -> None:
    """Add the digests of a floating-point tensor, computed where it is; of its casts from float32
    as well."""
    if not tensor.is_floating_point() or tensor.is_meta or tensor.layout != torch.strided:
        return
    own = local(tensor)
    digests[name] = copied(digest_of(name, own))
    for kind in casts if own.dtype == torch.float32 else ():
        short = str(kind).removeprefix("torch.")
        digests[f"{name}@{short}"] = copied(digest_of(name, own.to(kind)))


def _content(tensor: Tensor, digests: Tensor | None) -> Any:
    """Equal for tensors of equal content; ``None`` where reading it would wait for a device or
    cost more than another copy. ``digests``: of the tensor, if it has any."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return None
    if digests is None and tensor.nbytes <= _READ_UP_TO and not tensor.is_floating_point():
        digests = tensor.detach().contiguous()
    if digests is None or hasattr(tensor, "to_local"):
        return None
    return tensor.dtype, tuple(tensor.shape), digests.numpy().tobytes()


def _is_kept(value: Any) -> bool:
    return isinstance(value, Tensor) or is_dataclass(value)


def clock() -> float:
    return time.perf_counter()
