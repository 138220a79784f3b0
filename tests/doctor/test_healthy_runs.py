"""A clean training, recorded and diagnosed from end to end: healthy under every transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from omni_grpo_core import tiny
from omni_grpo_core.faults.config import LoopConfig
from omni_grpo_core.faults.fault import Fault, cache_is_dropped
from omni_grpo_core.faults.plan import BY_ID
from omni_grpo_core.faults.trial import recorded

RunCli = Callable[..., tuple[int, str, str]]
CHECKPOINTING = LoopConfig(checkpointing=True, max_new_tokens=48)


def diagnosed(
    run_cli: RunCli, folder: Path, config: LoopConfig, faults: Sequence[Fault] = ()
) -> tuple[int, list[str], list[str]]:
    """Exit code, stages found broken, and what could not be looked at."""
    traces, _ = recorded(faults, config, folder)
    assert len(traces) == 1
    code, out, _ = run_cli("doctor", folder, "--json", "--checkpoint", tiny.checkpoint_dir())
    told = json.loads(out)
    assert told["healthy"] == (code == 0)
    return code, [finding["stage"] for finding in told["findings"]], told["missing"]


@pytest.mark.parametrize("config", [LoopConfig(max_new_tokens=48), CHECKPOINTING])
def test_a_healthy_run_is_called_healthy(
    run_cli: RunCli, tmp_path: Path, config: LoopConfig
) -> None:
    """5.24.0 renamed the cache's keyword, and every healthy run was called one that had lost its
    history."""
    assert diagnosed(run_cli, tmp_path / "run", config) == (0, [], [])


def test_the_incident_s_mode_is_healthy_where_the_library_keeps_the_cache(
    run_cli: RunCli, tmp_path: Path
) -> None:
    fault = BY_ID["gen.checkpointing-train"]
    code, stages, _ = diagnosed(run_cli, tmp_path / "run", CHECKPOINTING, [fault])
    assert (code, stages[:1]) == ((1, ["completion"]) if cache_is_dropped() else (0, []))
