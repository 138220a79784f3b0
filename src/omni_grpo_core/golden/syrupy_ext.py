"""Goldens as syrupy snapshots: ``assert Stored("batch", batch) == snapshot(name="case/batch")``.

Files are in the top-level ``golden/<case>/<stage>.txt``, not next to the tests. Syrupy decides when
to write (``--snapshot-update``); this extension defines what, where, and what counts as equal: two
goldens within tolerance are equal, so an update leaves them alone. One file is one snapshot,
written at once and atomically, so any number of workers and runs may write concurrently.

Syrupy never removes a golden that no test used: a run on one machine must not prune what another
machine made.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from syrupy.data import Snapshot, SnapshotCollection, SnapshotCollections
from syrupy.extensions.base import AbstractSyrupyExtension

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.golden.text import compare_goldens, format_golden, parse_golden, read_text
from omni_grpo_core.io.atomic import write_file
from omni_grpo_core.tolerances import Tolerances
from omni_grpo_core.trace.integers import Decode

if TYPE_CHECKING:
    from syrupy.location import PyTestLocation
    from syrupy.types import (
        PropertyFilter,
        PropertyMatcher,
        SerializableData,
        SerializedData,
        SnapshotIndex,
    )

FOLDER = "golden"
_SAFE = re.compile(r"[\w@=+.-]+")
MISSING = "no golden yet; create it with --snapshot-update and review it"


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A value with its golden's stage, header and decoder; see
    :func:`~omni_grpo_core.golden.text.format_golden`."""

    stage: str
    value: object
    header: Mapping[str, str] = field(default_factory=dict)
    decode: Decode | None = None


class GoldenExtension(AbstractSyrupyExtension):
    """Reads, writes and compares golden text."""

    file_extension = "txt"
    write_immediately = True
    tolerances: ClassVar[Tolerances] = Tolerances()

    def serialize(
        self,
        data: SerializableData,
        *,
        exclude: PropertyFilter | None = None,
        include: PropertyFilter | None = None,
        matcher: PropertyMatcher | None = None,
    ) -> SerializedData:
        stored = data if isinstance(data, Stored) else Stored("value", data)
        return format_golden(stored.stage, stored.value, stored.header, stored.decode)

    def matches(
        self, *, serialized_data: SerializableData, snapshot_data: SerializableData
    ) -> bool:
        was, now = parse_golden(snapshot_data), parse_golden(serialized_data)
        return compare_goldens(was, now, self.tolerances).verdict != "differs"

    def diff_lines(
        self, serialized_data: SerializedData, snapshot_data: SerializedData
    ) -> Iterator[str]:
        if not snapshot_data:
            yield MISSING
            return
        was, now = parse_golden(str(snapshot_data)), parse_golden(str(serialized_data))
        for difference in compare_goldens(was, now, self.tolerances).differences:
            if difference.verdict == "differs":
                yield difference.sentence

    @classmethod
    def get_location(cls, *, test_location: PyTestLocation, index: SnapshotIndex) -> str:
        case, stage = case_and_stage(test_location.snapshot_name, index)
        root = test_location.item.config.rootpath
        return str(root / FOLDER / case / f"{stage}.{cls.file_extension}")

    @classmethod
    def matches_test_location(
        cls, *, test_location: PyTestLocation, snapshot_location: str
    ) -> bool:
        # a golden is named after its case, which several tests may use
        return True

    def discover_snapshots(
        self, *, test_location: PyTestLocation, ignore_extensions: list[str] | None = None
    ) -> SnapshotCollections:
        return SnapshotCollections()

    def read_snapshot_collection(self, *, snapshot_location: str) -> SnapshotCollection:
        collection = SnapshotCollection(location=snapshot_location)
        collection.add(Snapshot(name=Path(snapshot_location).stem))
        return collection

    def read_snapshot_data_from_location(
        self, *, snapshot_location: str, snapshot_name: str, session_id: str
    ) -> SerializedData | None:
        path = Path(snapshot_location)
        if not os.path.lexists(path):
            return None
        text = read_text(path)
        parse_golden(text, snapshot_location)  # here, so that an error names the file
        return text

    @classmethod
    def write_snapshot_collection(
        cls, *, snapshot_collection: SnapshotCollection, name_order: dict[str, int] | None = None
    ) -> None:
        for snapshot in snapshot_collection:
            text = str(snapshot.data)
            write_file(Path(snapshot_collection.location), text.encode("utf-8", "surrogatepass"))

    def delete_snapshots(self, *, snapshot_location: str, snapshot_names: set[str]) -> None:
        """Nothing: see the module's docstring."""


def case_and_stage(test: str, index: SnapshotIndex) -> tuple[str, str]:
    """``case/stage`` as given, else the test's own name and ``value``.

    Raises :class:`~omni_grpo_core.errors.ConfigError` for an invalid file name.

    >>> case_and_stage("test_a", "red-left/batch"), case_and_stage("test_a[x/y]", 1)
    (('red-left', 'batch'), ('test_a-x-y', 'value.1'))
    """
    if isinstance(index, int):
        case = "-".join(re.findall(_SAFE, test)).strip(".")
        return case, f"value.{index}" if index else "value"
    case, _, stage = index.rpartition("/")
    for part in (case, stage):
        if not _SAFE.fullmatch(part) or part.startswith("."):
            raise ConfigError(
                f"golden {index!r}",
                got=f"{part!r}",
                want="case/stage, each of letters, digits and _@=+.-",
                fix="rename it",
            )
    return case, stage
