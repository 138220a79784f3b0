from __future__ import annotations

import errno
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from ranks import codes, together
from train_runs import log, moments, saved, short

from omni_grpo_core.core.family import published_name
from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.errors import ConfigError, TrainError
from omni_grpo_core.losses import LossConfig
from omni_grpo_core.trace.store import load_trace, value_at
from omni_grpo_core.training.checkpointing import export, truncate_log
from omni_grpo_core.training.config import LoraConfig, OptimizerConfig, TrainConfig
from omni_grpo_core.training.loop import StepView, train
from omni_grpo_core.types import Rollout


class PowerCut(Exception):
    """Simulates a power failure."""


def cut(view: StepView) -> None:
    if view.record["step"] == 1:
        raise PowerCut


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without an interruption."""
    out = tmp_path_factory.mktemp("straight") / "run"
    result = train(short(out), trace_steps=1)
    assert (result.status, result.step, result.model) == ("finished", 3, out / "model")
    return out


def test_a_run_logs_every_step_and_leaves_a_checkpoint_that_loads(
    straight: Path, policy: Policy
) -> None:
    lines = log(straight)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["grad_norm"] > 0 and 0 < line["reward"] < 1 for line in lines)
    # sampling and scoring use the same policy: float32 sums in another order
    assert all(line["drift_max"] < 1e-5 for line in lines)
    trained = load_policy(straight / "model")
    assert not torch.equal(trained.model.lm_head.weight, policy.model.lm_head.weight)
    assert trained.eos_token_ids == policy.eos_token_ids


def test_the_first_steps_are_traces(straight: Path) -> None:
    assert [folder.name for folder in (straight / "trace").iterdir()] == ["step-000000"]
    trace = load_trace(straight / "trace" / "step-000000")
    assert len(value_at(trace, "completion", Rollout).completions) == 8
    assert value_at(trace, "advantage", torch.Tensor).shape == (8,)
    assert value_at(trace, "loss", dict)["step"] == 0


def test_an_interrupted_run_resumes_as_if_it_had_not_been(straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(PowerCut):
        train(short(out), on_step=cut)
    assert len(log(out)) == 2, "step 1 was logged but not saved"
    (out / "state" / ".000002.partial").mkdir()  # what a killed writer leaves
    assert train(short(out)).status == "finished"
    assert log(out) == log(straight)
    ours, theirs = (load_policy(run / "model").model.state_dict() for run in (out, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sorted(p.name for p in (out / "state").iterdir()) == ["000002", "000003"]


def test_an_interrupted_run_with_offloaded_gradients_is_the_same_one(
    straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = short(out, offload_gradients=True)
    with pytest.raises(PowerCut):
        train(config, on_step=cut)
    assert train(config).status == "finished"
    assert log(out) == log(straight)
    for part in (lambda run: saved(run, 3)["weights"], lambda run: moments(run, 3)):
        ours, theirs = part(out), part(straight)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_offloaded_gradients_are_not_recorded(tmp_path: Path) -> None:
    """A recorder reads gradients after each backward pass, where there are none."""
    config = short(tmp_path / "run", offload_gradients=True)
    with pytest.raises(ConfigError, match="offload_gradients: found true in a run that is recorde"):
        train(config, watch=lambda policy: nullcontext())
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_run_again(straight: Path) -> None:
    before = log(straight)
    assert train(short(straight)).status == "finished"
    assert log(straight) == before


def test_the_state_of_other_settings_is_refused(straight: Path) -> None:
    with pytest.raises(
        TrainError, match=r"other settings \(optimizer: lr was 0.001, is 0.002; seed was 0, is 1\)"
    ):
        train(short(straight, seed=1, optimizer=OptimizerConfig(lr=2e-3)))


def test_a_run_that_was_out_of_memory_goes_on_with_less(straight: Path, tmp_path: Path) -> None:
    """Its error says to lower micro_batch_size and to set gradient_checkpointing; with either its
    own state was refused."""
    out = tmp_path / "run"
    train(short(out, steps=2))
    less = short(out, micro_batch_size=2, gradient_checkpointing=True)
    assert train(less).status == "finished"
    ours, theirs = log(out)[2], log(straight)[2]
    # sums of two completions instead of four, in float32
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_an_export_to_a_full_disk_keeps_the_earlier_one(policy: Policy, tmp_path: Path) -> None:
    class Full:
        def save_pretrained(self, folder: Path, **options: Any) -> None:
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "earlier").touch()
    with pytest.raises(TrainError, match=r"No space left on device \(\d+ MiB free\), wanted"):
        export(replace(policy, model=Full()), tmp_path / "model", {})
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "earlier"]


def test_a_half_written_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    truncate_log(path, 1)
    assert path.read_text() == '{"step": 0}\n'


def test_more_groups_than_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size: found 25 groups of 22 samples"):
        train(short(tmp_path / "run", batch_size=100))


def test_the_policy_with_the_adapter_off_is_the_reference(tmp_path: Path, policy: Policy) -> None:
    """KL to the reference is 0 before the first update and positive afterwards; only the adapter
    has changed, and the exported checkpoint has it merged in."""
    out = tmp_path / "run"
    config = short(
        out,
        steps=2,
        lora=LoraConfig(rank=2),
        loss=LossConfig(beta=0.1),
        gradient_checkpointing=True,
        optimizer=OptimizerConfig(lr=1e-2),
    )
    assert train(config).status == "finished"
    first, second = log(out)
    assert first["kl"] == 0.0
    assert second["kl"] > 1e-6
    found = load_policy(out / "model").model.state_dict()
    start = policy.model.state_dict()
    moved = {published_name(n) for n, w in start.items() if not torch.equal(found[n], w)}
    assert moved
    assert all(name.startswith("model.layers.") and "_proj" in name for name in moved)


def test_frozen_towers_stay_and_bfloat16_trains(tmp_path: Path, policy: Policy) -> None:
    out = tmp_path / "run"
    config = short(
        out, steps=1, precision="bfloat16", freeze=("image", "video", "audio"),
        loss=LossConfig(beta=0.1),
    )  # fmt: skip
    assert train(config).status == "finished"
    assert log(out)[0]["grad_norm"] > 0
    found = load_policy(out / "model").model.state_dict()
    start = policy.model.state_dict()
    moved = {n for n, w in start.items() if not torch.equal(found[n], w)}
    [frozen] = [n for n in start if published_name(n) == "visual.patch_embed.proj.weight"]
    # frozen weights are stored in bfloat16, which rounds them; trainable ones are not rounded
    assert torch.equal(found[frozen].bfloat16(), start[frozen].bfloat16())
    assert "lm_head.weight" in moved


def _rank(config: TrainConfig, rank: int) -> None:
    assert train(config).status == "finished"
    assert AcceleratorState().num_processes == 2


def _interrupted(config: TrainConfig, whom: tuple[int, ...], rank: int) -> None:
    """Ctrl-C after the second step's log line, before its state is saved."""

    def interrupt(view: StepView) -> None:
        if view.record["step"] == 1 and rank in whom:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        train(config, on_step=interrupt)
    except KeyboardInterrupt:
        os._exit(130)
    except TrainError as error:
        os._exit(2 if f"process {1 - rank} of 2" in str(error) else 3)


@pytest.mark.parametrize(
    ("whom", "ends"), [((0, 1), [130, 130]), ((0,), [130, 2]), ((1,), [2, 130])]
)
def test_ctrl_c_ends_both_processes_and_keeps_what_was_saved(
    tmp_path: Path, whom: tuple[int, ...], ends: list[int]
) -> None:
    """A lost process is named by the other: no hang, and no internal error."""
    out = tmp_path / "run"
    ended = together(2, partial(_interrupted, short(out), whom), tmp_path)
    assert codes(ended) == ends, ended
    assert [path.name for path in (out / "state").glob("0*")] == ["000001"]


def test_two_processes_give_the_loss_and_gradient_of_one(straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert codes(together(2, partial(_rank, short(out)), tmp_path)) == [0, 0]
    shared, alone = log(out), log(straight)
    for name in ("reward", "loss", "grad_norm", "entropy", "completion_length"):
        # float32 sums in another order
        assert [line[name] for line in shared] == pytest.approx(
            [line[name] for line in alone], rel=1e-3, abs=1e-5
        ), name
    scale = alone[0]["grad_norm"]
    ours, theirs = moments(out, 2), moments(straight, 2)
    assert ours.keys() == theirs.keys()
    for key, moment in theirs.items():
        torch.testing.assert_close(ours[key], moment, atol=1e-4 * scale, rtol=0)
