"""The memory estimate of a training run compared with a device, at two sizes and in many settings.

"Right" is within a tenth, which is what the estimate claims: blocks are rounded up, and a layer's
bytes are counted by a formula.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from memory_runs import base, cases, clear, make_checkpoint, make_rows, measured

from omni_grpo_core.training.config import TrainConfig
from omni_grpo_core.training.memory import estimate, thinker_shapes
from omni_grpo_core.training.prompt_estimate import PromptSize

pytestmark = pytest.mark.gpu

NOWHERE = Path("nowhere")
MIDDLE = [name for name, _ in cases("middle", base("middle", NOWHERE, NOWHERE, NOWHERE))]
LARGE = ["lora, fast", "stochastic, fast", "master, fast", "stochastic, fast, offloaded"]
NAMES = [("middle", name) for name in MIDDLE] + [("7b", name) for name in LARGE]


@pytest.fixture(scope="module")
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Made once for all settings of a size and deleted after them: one for each filled a disk."""
    folder = tmp_path_factory.mktemp("size") / "checkpoint"
    make_checkpoint(request.param, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def another_process() -> Iterator[None]:
    yield
    clear()


@pytest.mark.parametrize(
    ("checkpoint", "name"), NAMES, indirect=["checkpoint"], ids=lambda value: value, scope="module"
)
def test_a_run_takes_what_was_estimated(
    tmp_path: Path, request: pytest.FixtureRequest, checkpoint: Path, name: str
) -> None:
    size = request.node.callspec.params["checkpoint"]
    config = dict(cases(size, base(size, checkpoint, make_rows(tmp_path), tmp_path / "out")))[name]
    if "adamw_8bit" in config.optimizer.name:
        pytest.importorskip("torchao")
    if not fits(config):
        pytest.skip("the device is too small for it")
    row = measured(name, config)
    assert row["failed"] is None
    assert abs(row["estimated_peak"] / row["peak"] - 1) <= 0.1, row


def fits(config: TrainConfig) -> bool:
    shapes = thinker_shapes(Path(config.checkpoint))
    found = estimate(config, shapes, PromptSize(vision=3200, text=300), world=1)
    return bool(found.peak < 0.97 * torch.cuda.mem_get_info()[0])
