"""The incident's settings, as the examples have them, on the shipped checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_launch import launch
from train_runs import log

from omni_grpo_core import tiny
from omni_grpo_core.training.config import LoraConfig
from omni_grpo_core.training.load_config import load_train_config
from omni_grpo_core.training.placement import share_of

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def example(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((EXAMPLES / name).read_text())
    return found


def placed(folder: Path, **changes: Any) -> dict[str, Any]:
    """With the shipped clips whose sound is their own, twice, as there have to be 24 rows."""
    source = tiny.data_file()
    rows = json.loads(source.read_text())
    rows = [r for r in rows if r["data_type"] == "video" and isinstance(r["path"], str)]
    (folder / "rows.json").write_text(json.dumps(rows * 2))
    paths = {"checkpoint": str(tiny.checkpoint_dir()), "data": str(folder / "rows.json")}
    given = {**paths, "root": str(source.parent), "device": "cpu", "trackers": []}
    return {**example("incident_4gpu.yaml"), **given, **changes}


def test_the_incidents_numbers_are_understood(tmp_path: Path) -> None:
    """48 completions: 4 GPUs, one a device, 12 accumulated."""
    (tmp_path / "run.json").write_text(json.dumps(placed(tmp_path)))
    config, warnings = load_train_config(tmp_path / "run.json")
    settings = config.settings
    assert (config.batch_size, settings.group_size, config.prompts) == (4 * 1 * 12, 2, 24)
    assert (settings.max_prompt_length, settings.max_new_tokens) == (2048, 1024)
    assert settings.audio_in_video == "interleaved"
    assert tuple(config.rewards) == ("format", "accuracy", "people_focus")
    assert config.lora == LoraConfig(rank=16, alpha=32)
    assert len(warnings) == 1, "two completions a group"
    shares = [share_of(config.prompts, 2, 4, rank) for rank in range(4)]
    assert [len(share.prompts) for share in shares] == [6] * 4
    assert {share.completions for share in shares} == {range(2)}


@pytest.mark.slow
@pytest.mark.parametrize("all_weights", [False, True], ids=["lora", "all weights"])
def test_four_processes_run_it(tmp_path: Path, all_weights: bool) -> None:
    """Two steps, of fewer groups, as there are fewer clips, and shorter answers."""
    kind = example("accelerate_4gpu.yaml")
    guard = {"preflight": False, "garbage": 1.0, "patience": 99}
    values = placed(tmp_path, batch_size=16, save_every=1, guard=guard)
    values["settings"] |= {"max_new_tokens": 8, "max_prompt_length": 400}
    values["lora"] = None if all_weights else {"rank": 2}
    run = launch(tmp_path, values, 2, kind)
    assert len(list((run / "state" / "000002").glob("part-*-of-4.bin"))) == 4
    assert [line["step"] for line in log(run)] == [0, 1]
