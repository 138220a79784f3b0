"""What the ``omni_golden`` fixture hands to a test."""

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
"""The platform whose goldens carry no name of one."""


class OmniGolden:
    """Compares values with their goldens in ``golden/<case>/<stage>.txt`` under pytest's root;
    with ``--snapshot-update`` writes those that are missing or beyond tolerance."""

    def __init__(
        self,
        snapshot: SnapshotAssertion,
        case: str,
        test: str = "",
        cases: MutableMapping[str, str] | None = None,
    ) -> None:
        """``case``: the default one, made from the name of ``test``, a node id. ``cases``: which
        test of the run took which default case."""
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
        """Fail the test, saying what changed, unless ``value`` is as its golden has it.

        ``case`` is by default the test's name. ``header`` is added to the versions that stand in
        every golden; ``decode`` turns token ids into text, special tokens kept. ``platform``: what
        computed the value, as :func:`~omni_grpo_core.golden.environment.platform_key` says it;
        another than the CPU in float32 has a golden of its own, ``<stage>@<platform>.txt``.
        """
        case = case or self._own()
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
        """Every stage of ``trace``, in order; the stage that is named first diverged first.

        Stages that no device computes have one golden for every ``platform``.
        """
        lines: list[str] = []
        name = case or self._own()
        for record in trace.stages:
            key = BASE if record.stage in EXACT_STAGES else platform
            lines += self._differences(record.value, record.stage, name, trace.header, decode, key)
        if lines:
            pytest.fail("\n".join(lines), pytrace=False)

    def _own(self) -> str:
        """The default case; two tests of one name in two files would write over each other's."""
        owner = self._cases.setdefault(self._case, self._test)
        if owner != self._test:
            raise ConfigError(
                f"golden {self._case!r} of {self._test}",
                got=f"{owner}, whose golden has that name already",
                want="one test a golden",
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
                got="a second value of that name in one test",
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
        # not the extension's own lines: here is a decode, and ids alone tell a reader little
        was, now = (parse_golden(str(x)) for x in (result.recalled_data, result.asserted_data))
        found = compare_goldens(was, now, GoldenExtension.tolerances, decode).differences
        sentences = [d.sentence for d in found if d.verdict == "differs"]
        return [f"golden {name} differs:", *(f"  {sentence}" for sentence in sentences)]
