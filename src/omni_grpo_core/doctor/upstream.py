"""Where causes come from: the issue or change of another project, and the releases that have it.

Only what was read or tried there. Most causes are mistakes of the user's own code, and are not
listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from omni_grpo_core.doctor.evidence import Explanation

_HUB = "https://github.com/huggingface"


@dataclass(frozen=True, slots=True)
class Source:
    """``links``: to issues and changes. ``versions``: as in :class:`Explanation`."""

    links: tuple[str, ...] = ()
    versions: str = ""


SOURCES: Mapping[str, Source] = {
    # the layer that drops the cache came with this change
    "gen.checkpointing-train": Source(
        (f"{_HUB}/transformers/pull/38913",), "transformers>=4.53,<5.24"
    ),
    "pos.stale-deltas": Source(
        (f"{_HUB}/trl/issues/5088", f"{_HUB}/transformers/pull/44873"),
    ),
    "batch.double-expansion": Source((f"{_HUB}/trl/issues/6294",)),
    "loss.normaliser": Source((f"{_HUB}/trl/issues/3021",)),
    "step.reentrant-checkpointing": Source((f"{_HUB}/trl/issues/2671",)),
    "text.list-of-lists": Source(versions="transformers>=4.52,<5"),
    "media.library-decoder": Source(versions="transformers>=4.57"),
    "batch.track-owners": Source(versions="transformers>=5.23"),
}


def sourced(explanation: Explanation) -> Explanation:
    """``explanation`` with the source of its cause, where one is known."""
    known = SOURCES.get(explanation.cause, Source())
    return replace(
        explanation,
        links=explanation.links or known.links,
        versions=explanation.versions or known.versions,
    )
