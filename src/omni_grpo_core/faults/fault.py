"""The type of a catalogue fault, and the decorators that define one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial, wraps
from importlib.metadata import version
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from omni_grpo_core.doctor.evidence import Severity
from omni_grpo_core.faults.seams import Loop
from omni_grpo_core.types import STAGES, Stage

Manager = AbstractContextManager[None]
Injection = Callable[[Loop], Manager]


@dataclass(frozen=True, slots=True)
class Fault:
    """One mistake that real pipelines make.

    ``id``: its name as a cause. ``stage``: the stage that must be blamed. ``story``: what happens,
    for a reader. ``source``: where it was found. ``inject``: adds it to a clean loop, or to what a
    fault of another kind is planted in, and undoes it.
    ``needs``: settings of the loop (fields of ``LoopConfig``) without which it does no harm.
    ``stops``: the step raises, so nothing later is seen. ``steps``: optimizer steps until it shows.
    ``versions``: for a fault of transformers itself, the releases that have it, a PEP 440
    specifier; ``""``: any. ``severity``: as the doctor's: a fault that "differs" is a recipe that
    works. ``silent``: its severity where nothing is noted, if it is another: what contradicts the
    settings may be somebody's recipe where there are none. ``lacking``: loops or shapes of them
    that cannot have it, and why. ``noted``: only notes tell it from a run that is meant so: it is
    wrong in what a loop logs, or beside the rows of its data. ``also``: other causes that are
    equally true of it. ``accepted``: other stages that may be blamed first, and why.
    """

    id: str
    stage: Stage
    story: str
    source: str
    inject: Callable[[Any], Manager] = field(repr=False)
    needs: Mapping[str, Any] = field(default_factory=dict)
    stops: bool = False
    steps: int = 1
    versions: str = ""
    severity: Severity = "breaks"
    silent: Severity | None = None
    lacking: Mapping[str, str] = field(default_factory=dict)
    noted: bool = False
    also: tuple[str, ...] = ()
    accepted: Mapping[Stage, str] = field(default_factory=dict)

    def severity_in(self, noted: bool) -> Severity:
        """In a loop that notes its settings, or in one that does not."""
        return self.severity if noted else self.silent or self.severity

    @property
    def absent(self) -> str | None:
        """Why it cannot be injected here; ``None`` where it can."""
        if is_among(self.versions):
            return None
        found = f"transformers {transformers_version()} does not have this fault"
        return f"not injectable: {found}, {self.versions} does"


_STAGE_OF: Mapping[str, Stage] = {
    **{stage: stage for stage in STAGES},
    "conv": "conversation",
    "embed": "embeddings",
    "pos": "positions",
    "gen": "completion",
    "adv": "advantage",
    "step": "gradient",
}


class FaultRegistry:
    """The faults of one area, in order of definition."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []

    def add(
        self, id: str, source: str, *, stage: Stage | None = None, **more: Any
    ) -> Callable[[Injection], Injection]:
        """Decorates the function that injects the fault. The id's first part gives the stage, the
        docstring the story; ``more``: further fields of :class:`Fault`."""
        found = stage or _STAGE_OF[id.partition(".")[0]]

        def put(inject: Injection) -> Injection:
            story = " ".join((inject.__doc__ or "").split())
            self.faults.append(Fault(id, found, story, source, inject, **more))
            return inject

        return put


def instead_of(seam: str) -> Callable[[Callable[..., Any]], Injection]:
    """Decorates a replacement for the loop's method ``seam``: a function of the loop, the original
    method, and the method's arguments. The result is an injection."""

    def decorate(replacement: Callable[..., Any]) -> Injection:
        @wraps(replacement)
        def inject(loop: Loop) -> Manager:
            return loop.replaced(**{seam: partial(replacement, loop, getattr(loop, seam))})

        return inject

    return decorate


def result_of(seam: str) -> Callable[[Callable[[Loop, Any], Any]], Injection]:
    """Decorates a change to the result of the loop's method ``seam``: a function of the loop and
    that result. The result is an injection."""

    def decorate(change: Callable[[Loop, Any], Any]) -> Injection:
        @instead_of(seam)
        @wraps(change)
        def replacement(loop: Loop, before: Callable[..., Any], *args: Any) -> Any:
            return change(loop, before(*args))

        return replacement

    return decorate


def without(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """``given`` without some names."""
    return {name: value for name, value in given.items() if name not in names}


ONE_PROMPT = {"per-prompt": "a call of the processor, of generate and of the model has one prompt"}
"""Why a fault that confuses or pads the prompts of one call is not in the loop that has one."""

CACHE_DROPPED = ">=4.53,<5.24"
"""The releases whose checkpointing layer drops a block's key-value cache in train mode. From 5.24.0
on it does so only with gradients enabled, which ``generate`` disables."""
CACHE_MISSED = ">=5,<5.16"
"""Those whose ``generate`` cannot continue without it: the second token raises an IndexError.
Tested: 5.0.0, 5.5.0, 5.10.1, 5.12.0, 5.13.0, 5.14.0, 5.14.1, 5.15.0; not 4.57.6 and 5.16.0."""


def transformers_version() -> Version:
    return Version(version("transformers"))


def is_among(versions: str) -> bool:
    """Whether the installed transformers matches a PEP 440 specifier; ``""`` matches all.

    >>> is_among(""), is_among("<4")
    (True, False)
    """
    return SpecifierSet(versions, prereleases=True).contains(transformers_version())


def cache_is_dropped() -> bool:
    """Whether the installed transformers drops the cache while checkpointing."""
    return is_among(CACHE_DROPPED)


def cache_is_repaired() -> bool:
    """Whether the installed transformers is later than those that drop the cache."""
    return transformers_version() >= Version("4.53") and not cache_is_dropped()


def kept() -> str:
    """What a version without the fault does, as text."""
    again = ": repaired in this version" if cache_is_repaired() else ""
    return f"transformers {transformers_version()} keeps the cache while checkpointing{again}"
