"""What the ``omni_golden`` fixture hands to a test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytest

from omni_grpo_core.errors import ConfigError, OmniGrpoError
from omni_grpo_core.golden.environment import environment
from omni_grpo_core.golden.syrupy_ext import MISSING, GoldenExtension, Stored
from omni_grpo_core.trace.integers import Decode
from omni_grpo_core.types import Trace

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion


class OmniGolden:
    """Compares values with their goldens in ``golden/<case>/<stage>.txt`` under pytest's root;
    with ``--snapshot-update`` writes those that are missing or beyond tolerance."""

    def __init__(self, snapshot: SnapshotAssertion, case: str) -> None:
        self._snapshot = snapshot.use_extension(GoldenExtension)
        self._case = case
        self._seen: set[str] = set()

    def check(
        self,
        value: object,
        stage: str = "value",
        *,
        case: str | None = None,
        header: Mapping[str, str] | None = None,
        decode: Decode | None = None,
    ) -> None:
        """Fail the test, saying what changed, unless ``value`` is as its golden has it.

        ``case`` is by default the test's name. ``header`` is added to the versions that stand in
        every golden; ``decode`` turns token ids into text, special tokens kept.
        """
        lines = self._differences(value, stage, case or self._case, header or {}, decode)
        if lines:
            pytest.fail("\n".join(lines), pytrace=False)

    def check_trace(
        self, trace: Trace, *, case: str | None = None, decode: Decode | None = None
    ) -> None:
        """Every stage of ``trace``, in order; the stage that is named first diverged first."""
        lines: list[str] = []
        for record in trace.stages:
            lines += self._differences(
                record.value, record.stage, case or self._case, trace.header, decode
            )
        if lines:
            pytest.fail("\n".join(lines), pytrace=False)

    def _differences(
        self,
        value: object,
        stage: str,
        case: str,
        header: Mapping[str, str],
        decode: Decode | None,
    ) -> list[str]:
        name = f"{case}/{stage}"
        if name in self._seen:
            raise ConfigError(
                f"golden {name!r}",
                got="a second value of that name in one test",
                want="one",
                fix="give each its own stage or case",
            )
        self._seen.add(name)
        stored = Stored(stage, value, {**environment(), **header}, decode)
        if self._snapshot(name=name) == stored:
            return []
        result = self._snapshot.executions[self._snapshot.num_executions - 1]
        if isinstance(result.exception, OmniGrpoError):
            return [f"golden {name}: {result.exception}"]
        if result.exception is not None:
            raise result.exception
        if result.recalled_data is None:
            return [f"golden {name}: {MISSING}"]
        differences = self._snapshot.extension.diff_lines(
            str(result.asserted_data), result.recalled_data
        )
        return [f"golden {name} differs:", *(f"  {line}" for line in differences)]
