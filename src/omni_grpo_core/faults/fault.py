"""What a fault of the catalogue is, and how one is written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from omni_grpo_core.faults.installed import is_among, transformers_version
from omni_grpo_core.faults.loop import WildLoop
from omni_grpo_core.types import Stage

Injection = Callable[[WildLoop], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that real pipelines get wrong.

    ``id``: what a diagnosis calls it. ``stage``: what must be blamed. ``story``: what happened, for
    a person. ``source``: where it was met. ``inject``: puts it into a clean loop, and takes it out.
    ``needs``: settings of the loop (fields of ``LoopConfig``) without which it does no harm.
    ``stops``: the step raises, so nothing later is seen. ``steps``: optimizer steps until it shows.
    ``versions``: the transformers releases that have it, a PEP 440 specifier, for a fault that is
    the library's own; ``""``: any.
    """

    id: str
    stage: Stage
    story: str
    source: str
    inject: Injection = field(repr=False)
    needs: Mapping[str, Any] = field(default_factory=dict)
    stops: bool = False
    steps: int = 1
    versions: str = ""

    @property
    def absent(self) -> str | None:
        """Why it cannot be put in here; ``None`` where it can."""
        if is_among(self.versions):
            return None
        found = f"transformers {transformers_version()} does not have this fault"
        return f"not injectable: {found}, {self.versions} does"


_STAGE_OF: Mapping[str, Stage] = {
    "conv": "conversation",
    "text": "text",
    "media": "media",
    "batch": "batch",
    "policy": "policy",
    "embed": "embeddings",
    "pos": "positions",
    "logits": "logits",
    "gen": "completion",
    "reward": "reward",
    "adv": "advantage",
    "loss": "loss",
    "step": "gradient",
}


class Shelf:
    """The faults of one area, in the order in which they are written down."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []

    def add(
        self,
        id: str,
        story: str,
        source: str,
        *,
        needs: Mapping[str, Any] | None = None,
        stops: bool = False,
        steps: int = 1,
        versions: str = "",
    ) -> Callable[[Injection], Injection]:
        """Decorates the function that puts the fault in; the id's first part names the stage."""

        def put(inject: Injection) -> Injection:
            stage = _STAGE_OF[id.partition(".")[0]]
            found = Fault(id, stage, story, source, inject, needs or {}, stops, steps, versions)
            self.faults.append(found)
            return inject

        return put
