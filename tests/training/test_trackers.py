"""What a run writes for users to see: TensorBoard's event file, the JSONL, the progress."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from ranks import codes, together
from rich.console import Console
from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]
from train_runs import log, short

from omni_grpo_core import tiny
from omni_grpo_core.training.config import TrainConfig
from omni_grpo_core.training.loop import StepView, train
from omni_grpo_core.training.progress import display


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[StepView]]:
    """Two steps with TensorBoard, the second one by a resumed process."""
    out = tmp_path_factory.mktemp("tracked") / "run"
    views: list[StepView] = []
    train(short(out, steps=1, trackers=("tensorboard",)), on_step=views.append)
    AcceleratorState._reset_state(reset_partial_state=True)
    train(short(out, steps=2, trackers=("tensorboard",)), on_step=views.append)
    return out, views


def test_tensorboard_has_what_the_jsonl_has(run: tuple[Path, list[StepView]]) -> None:
    out, _ = run
    events = event_accumulator.EventAccumulator(str(out / "tracker"))
    events.Reload()
    lines = log(out)
    assert [line["step"] for line in lines] == [0, 1]
    for name in ("reward", "loss", "grad_norm", "entropy", "lr", "reward/early_letters"):
        found = events.Scalars(name)
        assert [scalar.step for scalar in found] == [0, 1], name
        # TensorBoard stores float32
        assert [scalar.value for scalar in found] == pytest.approx(
            [line[name] for line in lines], rel=1e-6
        )


def _train(config: TrainConfig, rank: int) -> None:
    train(config)


def test_processes_that_track_write_their_model(tmp_path: Path) -> None:
    """By default each run of several processes ended without its model: with its trackers
    Accelerate ends the process group, over which the weights are gathered."""
    out = tmp_path / "run"
    config = short(out, steps=1, save_every=0, trackers=("tensorboard",))
    ended = together(2, partial(_train, config), tmp_path)
    assert codes(ended) == [0, 0], ended
    assert (out / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("live", [False, True])
def test_progress_shows_reward_health_and_samples(
    run: tuple[Path, list[StepView]], live: bool
) -> None:
    out, views = run
    screen = io.StringIO()
    console = Console(file=screen, width=160, force_terminal=live)
    with display(2, console, live=live) as on_step:
        for view in views:
            on_step(view)
    shown = screen.getvalue()
    last = log(out)[-1]
    assert f"reward {last['reward']:.3f}" in shown
    assert f"length {last['completion_length']:.3g}" in shown
    if live:
        assert "2/2" in shown
        assert views[-1].rolled.completions[0].text[:4] in shown


def test_a_tracker_that_is_not_installed_is_refused_rather_than_ignored(
    tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    """Accelerate silently drops it, and the run appears nowhere."""
    code, err = _refused(tmp_path, run_cli, "comet_ml")
    assert code == 2
    assert "trackers: found 'comet_ml', which is not installed" in err
    code, err = _refused(tmp_path, run_cli, "tensorbord")
    assert code == 2
    assert "trackers: found 'tensorbord', wanted" in err


def _refused(tmp_path: Path, run_cli: Any, tracker: str) -> tuple[int, str]:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"checkpoint: {tiny.checkpoint_dir()}\ndata: {tiny.data_file()}\nout: run\n"
        f"rewards: {{accuracy: {{}}}}\ntrackers: [{tracker}]\n"
    )
    code, _, err = run_cli("train", path)
    return code, err
