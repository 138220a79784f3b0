"""Clean training, recorded and diagnosed end to end: healthy under every transformers version."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from omni_grpo_core import tiny
from omni_grpo_core.faults.campaign import perform
from omni_grpo_core.faults.config import LoopConfig
from omni_grpo_core.faults.fault import Fault, cache_is_dropped
from omni_grpo_core.faults.healthy import BY_NAME, breaking, healthy_tasks, run_healthy
from omni_grpo_core.faults.plan import BY_ID, Task
from omni_grpo_core.faults.trial import recorded

RunCli = Callable[..., tuple[int, str, str]]
CHECKPOINTING = LoopConfig(checkpointing=True, max_new_tokens=48)


def diagnosed(
    run_cli: RunCli, folder: Path, config: LoopConfig, faults: Sequence[Fault] = ()
) -> tuple[int, list[str], list[str]]:
    """Exit code, broken stages, and what could not be judged."""
    traces, _ = recorded(faults, config, folder)
    assert len(traces) == 1
    code, out, _ = run_cli("doctor", folder, "--json", "--checkpoint", tiny.checkpoint_dir())
    report = json.loads(out)
    assert report["healthy"] == (code == 0)
    return code, [finding["stage"] for finding in report["findings"]], report["missing"]


@pytest.mark.parametrize("config", [LoopConfig(max_new_tokens=48), CHECKPOINTING])
def test_a_healthy_run_is_called_healthy(
    run_cli: RunCli, tmp_path: Path, config: LoopConfig
) -> None:
    """5.24.0 renamed the cache's keyword, and every healthy run was said to have lost its
    history."""
    assert diagnosed(run_cli, tmp_path / "run", config) == (0, [], [])


def test_the_incident_s_mode_is_healthy_where_the_library_keeps_the_cache(
    run_cli: RunCli, tmp_path: Path
) -> None:
    fault = BY_ID["gen.checkpointing-train"]
    code, stages, _ = diagnosed(run_cli, tmp_path / "run", CHECKPOINTING, [fault])
    assert (code, stages[:1]) == ((1, ["completion"]) if cache_is_dropped() else (0, []))


SAMPLE = (
    "heard_by_numpy",  # two sounds a row; librosa alone takes seconds to import
    "reinforce_plus_plus",  # a copy as reference, the batch's deviation
    "rendered_by_hand",  # no template, each row encoded alone, asynchronous rewards
    "autocast",
)


@pytest.mark.parametrize("name", SAMPLE)
def test_loops_of_other_makes_are_healthy(name: str) -> None:
    """None shares code with the loop that the doctor was built beside."""
    verdict = run_healthy(name, BY_NAME[name].settings[0])
    assert breaking(verdict) == []


def test_enough_of_them() -> None:
    tasks = list(healthy_tasks())
    assert len(BY_NAME) >= 40
    assert len(tasks) == len(set(tasks)) >= 400


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    [Task("healthy", (), setting, name) for name, setting in healthy_tasks()],
    ids=lambda task: f"{task.loop}-{task.config}",
)
def test_every_loop_in_every_setting_is_healthy(task: Task) -> None:
    """On its own: ``pytest -m slow -n 16 tests/doctor/test_healthy_runs.py``."""
    row = perform(task, True)
    if row.absent:
        pytest.skip(row.absent)
    assert row.raised is None
    broken = [blame for blame in row.findings if blame.severity == "breaks"]
    assert (broken, row.unexplained, row.wrong) == ([], (), ())
