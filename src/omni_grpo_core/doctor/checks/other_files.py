"""Which file a medium really is, where it is not the one that its row names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from omni_grpo_core.doctor.evidence import Case, Evidence
from omni_grpo_core.doctor.replay import media as replay_media
from omni_grpo_core.doctor.shown_media import Shown

_MOST_BESIDE = 16
"""Files of a folder that are read to find out which one was passed."""


def near(item: Shown, every: Sequence[Shown]) -> list[Shown]:
    """Those of the same row first."""
    return sorted(every, key=lambda other: other.row != item.row)


def others(item: Shown, every: Iterable[Shown]) -> Iterator[Shown]:
    """Items of other files, each file once."""
    seen: set[object] = set()
    for other in every:
        if other.ref.path != item.ref.path and other.ref not in seen:
            seen.add(other.ref)
            yield other


def beside(item: Shown, case: Case) -> Iterator[Shown]:
    """The other files of its folder, the first of them by name."""
    path = Path(item.ref.path)
    found = sorted(other for other in path.parent.iterdir() if other.suffix == path.suffix)
    for other in found[:_MOST_BESIDE]:
        ref = replace(item.ref, path=str(other))
        yield Shown(item.row, item.number, item.given, ref, replay_media.read_file(ref, case))


def swapped(
    item: Shown, twin: Shown, every: Sequence[Shown], known: Mapping[str, Any]
) -> Iterator[Evidence]:
    if twin.ref.path in item.asked:
        return
    other = PurePath(twin.ref.path).name
    of = f" of row {twin.row}" if twin in every else ""
    if of and twin.row == item.row:
        of = ", its own at another place,"
    yield Evidence(
        "media",
        "media-swapped",
        f"row {item.row} gets {other}{of} where {known['file']} should be",
        row=item.row,
        values={**known, "shown": other},
    )
