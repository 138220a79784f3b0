"""The fixture ``omni_parity``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from omni_grpo_core import tiny
from omni_grpo_core.errors import OmniGrpoError
from omni_grpo_core.parity.compare import compare_paths
from omni_grpo_core.parity.given import row_reader
from omni_grpo_core.parity.paths import UsersPath
from omni_grpo_core.parity.results import ParityReport
from omni_grpo_core.parity.run import Task, run_path
from omni_grpo_core.pipeline.settings import load_settings


@dataclass(frozen=True, slots=True)
class OmniParity:
    """``checkpoint``: of ``--omni-checkpoint``; the shipped one otherwise. Only its processor is
    used."""

    checkpoint: Path | None = None

    def __call__(
        self,
        a: str | UsersPath,
        b: str | UsersPath,
        *,
        data: str | Path | None = None,
        checkpoint: str | Path | None = None,
        root: str | Path | None = None,
        config: str | Path | None = None,
        limit: int | None = None,
        known: Sequence[str] = (),
    ) -> ParityReport:
        """Compare two paths on the rows of ``data`` (the shipped ones without), and fail the test
        where they differ or cannot be compared. A path is a name (``"ours"``, ``"transformers"``,
        ``"module:function"``) or a function of ``(messages, processor)``. ``known``: causes that
        are no failure; rows with no other cause pass."""
        folder = Path(checkpoint or self.checkpoint or tiny.checkpoint_dir())
        task = Task(
            folder,
            Path(data or tiny.data_file()),
            load_settings(folder, None if config is None else Path(config)),
            root=None if root is None else Path(root),
            limit=limit,
        )
        try:
            setup, samples = task.setup(), task.samples()
            one, other = (run_path(path, setup, samples) for path in (a, b))
        except OmniGrpoError as error:
            pytest.fail(str(error), pytrace=False)
        report = compare_paths(one, other, setup, row_reader(setup, samples))
        lines = [line for line in report.lines() if line.partition(":")[0] not in known]
        if lines:
            lines.insert(0, f"{report.a} and {report.b} differ")
            pytest.fail("\n  ".join(lines), pytrace=False)
        return report
