"""The object that the ``omni_golden`` fixture passes to a test."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING

import pytest

from omni_grpo_core.errors import ConfigError, OmniGrpoError
from omni_grpo_core.golden.environment import environment
from omni_grpo_core.golden.store import EXACT_STAGES, file_name
from omni_grpo_core.golden.syrupy_ext import MISSING, GoldenExtension, Stored
from omni_grpo_core.golden.text import compare_goldens, parse_golden
from omni_grpo_core.trace.integers import Decode
from omni_grpo_core.types import Trace

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion

BASE = "cpu-fp32"
"""The platform whose goldens have no platform in their name."""


class OmniGolden:
    """Compares values with their goldens in ``golden/<case>/<stage>.txt`` under pytest's root; with
    ``--snapshot-update`` it writes those that are missing or beyond tolerance."""

    def __init__(
        self,
        snapshot: SnapshotAssertion,
        case: str,
        test: str = "",
        cases: MutableMapping[str, str] | None = None,
    ) -> None:
        """``case``: the default, made from the name of ``test``, a node id. ``cases``: the test
        that uses each default case in this run."""
        self._snapshot = snapshot.use_extension(GoldenExtension)
        self._case = case
        self._test = test
        self._cases = {} if cases is None else cases
        self._seen: set[str] = set()

    def check(
        self,
        value: object,
        stage: str = "value",
        *,
        case: str | None = None,
        header: Mapping[str, str] | None = None,
        decode: Decode | None = None,
        platform: str = BASE,
    ) -> None:
        """Fail the test and report what changed unless ``value`` matches its golden.

        ``case`` defaults to the test's name. ``header`` is added to the versions in every golden;
        ``decode`` turns token ids into text, special tokens included. ``platform``: where the
        value was computed, a :func:`~omni_grpo_core.golden.environment.platform_key`; any but the
        CPU in float32 has its own golden, ``<stage>@<platform>.txt``.
        """
        case = case or self._default_case()
        lines = self._differences(value, stage, case, header or {}, decode, platform)
        if lines:
            pytest.fail("\n".join(lines), pytrace=False)

    def check_trace(
        self,
        trace: Trace,
        *,
        case: str | None = None,
        decode: Decode | None = None,
        platform: str = BASE,
    ) -> None:
        """Check every stage of ``trace`` in order; the stage reported first diverged first.

        Stages that no device computes share one golden between all platforms.
        """
        lines: list[str] = []
        name = case or self._default_case()
        for record in trace.stages:
            key = BASE if record.stage in EXACT_STAGES else platform
            lines += self._differences(record.value, record.stage, name, trace.header, decode, key)
        if lines:
            pytest.fail("\n".join(lines), pytrace=False)

    def _default_case(self) -> str:
        """Refused if shared: tests of one name in two files would overwrite each other's golden."""
        owner = self._cases.setdefault(self._case, self._test)
        if owner != self._test:
            raise ConfigError(
                f"golden {self._case!r} of {self._test}",
                got=f"{owner}, whose golden already has that name",
                want="one test per golden",
                fix="rename the test, or pass case=",
            )
        return self._case

    def _differences(
        self,
        value: object,
        stage: str,
        case: str,
        header: Mapping[str, str],
        decode: Decode | None,
        platform: str,
    ) -> list[str]:
        name = f"{case}/{file_name(stage, platform, BASE).removesuffix('.txt')}"
        if name in self._seen:
            raise ConfigError(
                f"golden {name!r}",
                got="a second value with that name in one test",
                want="one",
                fix="give each its own stage or case",
            )
        self._seen.add(name)
        head = {**environment(), **header} | ({} if platform == BASE else {"platform": platform})
        stored = Stored(stage, value, head, decode)
        if self._snapshot(name=name) == stored:
            return []
        result = self._snapshot.executions[self._snapshot.num_executions - 1]
        if isinstance(result.exception, OmniGrpoError):
            return [f"golden {name}: {result.exception}"]
        if result.exception is not None:
            raise result.exception
        if result.recalled_data is None:
            return [f"golden {name}: {MISSING}"]
        # not the extension's own lines: with decode, ids are shown with their text
        was, now = (parse_golden(str(x)) for x in (result.recalled_data, result.asserted_data))
        found = compare_goldens(was, now, GoldenExtension.tolerances, decode).differences
        sentences = [d.sentence for d in found if d.verdict == "differs"]
        return [f"golden {name} differs:", *(f"  {sentence}" for sentence in sentences)]
