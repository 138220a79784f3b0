"""One, two and four processes over gloo: the same completions, loss and gradient; what shows only
beyond two; and what is left when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import die_before_change
from ranks import DDP, FSDP, Ended, codes, together
from same_completions import update
from torch import Tensor
from train_runs import log, short

from omni_grpo_core import tiny
from omni_grpo_core.losses import LossConfig
from omni_grpo_core.training import liveness
from omni_grpo_core.training.config import LoraConfig, TrainConfig
from omni_grpo_core.training.liveness import Liveness
from omni_grpo_core.training.loop import StepView, train

KINDS = {"ddp": DDP, "fsdp": FSDP}
LORA: Mapping[str, Any] = {
    "lora": LoraConfig(rank=2), "gradient_checkpointing": True, "loss": LossConfig(beta=0.05),
}  # fmt: skip
WITHIN = 1e-4
"""Of the gradient's norm, and of logged numbers: float32 sums of up to sixteen completions in
another order, each off by some 1e-7 of its parts, which cancel down to a hundredth of them."""


def run(out: Path, config: TrainConfig, rank: int) -> None:
    """Train, and keep what this process sampled."""

    def keep(view: StepView) -> None:
        path = out / f"sampled-{view.record['step']}-{rank}.json"
        path.write_text(
            json.dumps([[c.group_id, c.index, c.token_ids] for c in view.rolled.completions])
        )

    assert train(config, on_step=keep).status == "finished"


def on(world: int, out: Path, kind: Mapping[str, str] = DDP, **changes: Any) -> Path:
    config = short(out / "run", **{"steps": 1, **changes})
    ended = together(world, partial(run, out, config), out, kind)
    assert codes(ended) == [0] * world, ended
    return out


def sampled(out: Path) -> list[list[Any]]:
    """Of the first step, by all processes, in order."""
    found = [json.loads(path.read_text()) for path in out.glob("sampled-0-*.json")]
    return sorted(row for rows in found for row in rows)


def gradients(out: Path) -> dict[int, Tensor]:
    """Of the first step: AdamW's first moments after it are a tenth of them."""
    state = out / "run" / "state" / "000001"
    files = sorted(state.glob("part-*"), key=lambda path: int(path.name.split("-")[1]))
    parts = [torch.load(path, weights_only=True)["optimizer"]["state"] for path in files]
    return {key: torch.cat([part[key]["exp_avg"] for part in parts]) * 10 for key in parts[0]}


def assert_one(found: Path, want: Path) -> None:
    """The runs are the same."""
    assert sampled(found) == sampled(want)
    for line, other in zip(log(found / "run"), log(want / "run"), strict=True):
        for name in ("reward", "loss", "grad_norm", "entropy", "completion_length"):
            assert line[name] == pytest.approx(other[name], rel=WITHIN, abs=WITHIN), name
    ours, theirs = gradients(found), gradients(want)
    norm = torch.stack([one.norm() for one in theirs.values()]).norm()
    assert norm > 0.1
    # FSDP gives a gradient of 0 to what no row went through
    for key, one in ours.items():
        assert (one - theirs.get(key, 0)).abs().max() <= WITHIN * norm


def groups(size: int, count: int, micro: int, **changes: Any) -> dict[str, Any]:
    settings = replace(short(Path()).settings, group_size=size)
    return {
        "settings": settings, "batch_size": size * count, "micro_batch_size": micro, **changes
    }  # fmt: skip


# --------------------------------------------------------------------------- one run


SPREAD: Mapping[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one group over two and four": ((2, 4), groups(8, 1, 4)),
    "three groups, each over two": ((2,), groups(4, 3, 2)),
    # 1, 2, 2 and 2 completions, one at a time: the first process has nothing left at last
    "seven completions over four": ((4,), groups(7, 1, 1)),
    "lora, packed rows": ((2, 4), groups(8, 1, 8, fast="on", **LORA)),
    "towers learn, packed rows": ((2,), groups(8, 2, 8, fast="on")),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPREAD)
def test_processes_that_share_groups_are_one(tmp_path: Path, name: str, kind: str) -> None:
    worlds, changes = SPREAD[name]
    want = on(1, tmp_path / "one", **changes)
    for world in worlds:
        assert_one(on(world, tmp_path / str(world), KINDS[kind], **changes), want)


def some_rows(folder: Path, modalities: tuple[str, ...]) -> dict[str, Any]:
    """The first shipped rows of these kinds."""
    source = tiny.data_file()
    rows = json.loads(source.read_text())
    of_kind = {kind: iter([r for r in rows if r["data_type"] == kind]) for kind in modalities}
    path = folder / "rows.json"
    path.write_text(json.dumps([next(of_kind[kind]) for kind in modalities]))
    return {"data": str(path), "root": str(source.parent)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fast", ["off", "on"])
def test_processes_without_media_take_part(tmp_path: Path, kind: str, fast: str) -> None:
    """Four groups on four processes, two of them with text only: their towers get no gradient."""
    rows = some_rows(tmp_path, ("text", "text", "video", "audio"))
    changes = groups(4, 4, 4, fast=fast, **rows)
    assert_one(on(4, tmp_path / "four", KINDS[kind], **changes), on(1, tmp_path / "one", **changes))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fast", ["off", "on"])
def test_a_process_whose_completion_ends_at_once_takes_part(
    tmp_path: Path, kind: str, fast: str
) -> None:
    """At temperature 30 and seed 381 the second of four completions is the end token."""
    changes = groups(4, 1, 4, seed=381, fast=fast)
    changes["settings"] = replace(changes["settings"], temperature=30.0)
    four = on(4, tmp_path / "four", KINDS[kind], **changes)
    assert [len(ids) for _, _, ids in sampled(four)][1] == 1
    assert_one(four, on(1, tmp_path / "one", **changes))


# --------------------------------------------------------------------------- half precision


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("changes", [{}, LORA], ids=["all weights", "lora"])
def test_fsdp_trains_in_bfloat16_whatever_the_launcher_says(
    tmp_path: Path, changes: Mapping[str, Any], launcher: str
) -> None:
    """It always failed, since what the scorer returned was cast: "logprobs: found torch.bfloat16".
    Sampling and scoring see the same rounded weights."""
    kind = {**FSDP, "ACCELERATE_MIXED_PRECISION": launcher}
    out = on(2, tmp_path / "two", kind, precision="bfloat16", steps=2, **changes)
    for line in log(out / "run"):
        assert line["drift_max"] < 0.3
        assert line["grad_norm"] > 0
    parts = [torch.load(p, weights_only=True) for p in out.glob("run/state/000002/part-*")]
    assert len(parts) == 2
    kinds = {weight.dtype for part in parts for weight in part["weights"].values()}
    assert kinds == {torch.float32}, "an update of 1e-6 of a weight is lost in bfloat16"


def _update(config: TrainConfig, rank: int) -> None:
    update(config)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, LORA], ids=["all weights", "lora"])
def test_in_bfloat16_an_update_is_the_same(tmp_path: Path, changes: Mapping[str, Any]) -> None:
    """On the same completions; 1 %: three digits of each product."""
    found = {}
    for name, world, kind in (("one", 1, DDP), ("ddp", 2, DDP), ("fsdp", 2, FSDP)):
        out = tmp_path / name
        config = short(out, precision="bfloat16", **{**groups(8, 2, 8), **changes})
        ended = together(world, partial(_update, config), out, kind)
        assert codes(ended) == [0] * world, ended
        found[name] = json.loads((out / "update.json").read_text())
    assert found["one"]["grad_norm"] > 0.1
    for name in ("ddp", "fsdp"):
        assert found[name] == pytest.approx(found["one"], rel=0.01, abs=1e-4), name


@pytest.mark.slow
def test_a_layer_class_that_the_model_has_not_is_named(tmp_path: Path) -> None:
    kind = {**FSDP, "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer"}
    work = partial(run, tmp_path, short(tmp_path / "run"))
    for one in together(2, work, tmp_path, kind):
        assert "fsdp_transformer_layer_cls_to_wrap: Qwen2_5OmniDecoderLayer" in one.output


# --------------------------------------------------------------------------- saved, killed, resumed


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, LORA], ids=["all weights", "lora"])
def test_a_state_holds_what_learns_once(tmp_path: Path, changes: Mapping[str, Any]) -> None:
    """Float32 weights and two moments; of LoRA those of the adapters, not of the base."""
    out = on(2, tmp_path, FSDP, **changes)
    state = out / "run" / "state" / "000001"
    parts = [torch.load(path, weights_only=True) for path in state.glob("part-*")]
    numbers = sum(weight.numel() for part in parts for weight in part["weights"].values())
    names = set(parts[0]["weights"])
    assert all("lora_" in name for name in names) == bool(changes)
    size = sum(path.stat().st_size for path in state.glob("part-*"))
    # names, shapes and alignment: some hundred bytes for each of a few hundred tensors
    assert 12 * numbers < size < 12 * numbers + 2000 * 3 * len(names)


@pytest.mark.slow
@pytest.mark.parametrize("before", [1, 2], ids=["two", "one"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, before: int) -> None:
    """Each process takes its rows from the parts that have them."""
    straight = on(1, tmp_path / "straight", steps=2)
    out = tmp_path / "out"
    on(before, out, FSDP if before > 1 else DDP)
    on(3 - before, out, FSDP if before == 1 else DDP, steps=2)
    for line, other in zip(log(out / "run"), log(straight / "run"), strict=True):
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def _killed(out: Path, config: TrainConfig, victim: int, number: int | None, rank: int) -> None:
    seen = die_before_change(number if rank == victim else None)
    run(out, config, rank)
    (out / f"changes-{rank}").write_text(str(seen()))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, LORA], ids=["all weights", "lora"])
def test_killed_while_saving_a_run_goes_on_where_it_was(
    tmp_path: Path, changes: Mapping[str, Any]
) -> None:
    """At any change to the disk, on either process: never half a state, and the same curve."""

    def launch(name: str, victim: int = 0, number: int | None = None) -> list[Ended]:
        out = tmp_path / name
        config = short(out / "run", **{"steps": 3, **changes})
        work = partial(_killed, out, config, victim, number)
        return together(2, work, out, FSDP)

    assert codes(launch("straight")) == [0, 0]
    want = log(tmp_path / "straight" / "run")
    for victim in (0, 1):
        count = int((tmp_path / "straight" / f"changes-{victim}").read_text())
        for number in (count // 3, count // 2):
            name = f"killed-{victim}-{number}"
            ended = launch(name, victim, number)
            assert codes(ended)[victim] == -signal.SIGKILL
            assert f"process {victim} of 2" in ended[1 - victim].output
            assert codes(launch(name)) == [0, 0]
            assert log(tmp_path / name / "run") == want


# --------------------------------------------------------------------------- one dies


def _dies(config: TrainConfig, victim: int, rank: int) -> None:
    def die(view: StepView) -> None:
        if rank == victim and view.record["step"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    train(config, on_step=die)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_others_of_four_stop_and_say_who_it_was(tmp_path: Path, victim: int, kind: str) -> None:
    work = partial(_dies, short(tmp_path / "run", **groups(8, 1, 4)), victim)
    ended = together(4, work, tmp_path, KINDS[kind])
    assert codes(ended) == [-signal.SIGKILL if rank == victim else 1 for rank in range(4)]
    for rank, one in enumerate(ended):
        assert (f"found process {victim} of 4" in one.output) == (rank != victim), one.output


def _gather(rank: int, strings: Any) -> list[str]:
    gathered: list[Any] = [None] * 3
    torch.distributed.all_gather_object(gathered, strings)
    return [one for part in gathered for one in part]


def _waits_for_ever(victim: int, how: str, rank: int) -> None:
    """As in a collective of NCCL, which no exception interrupts."""
    liveness.GRACE = 0.2
    torch.distributed.init_process_group("gloo")
    with Liveness(rank, 3, partial(_gather, rank)):
        if rank == victim and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == victim:
            raise KeyError("a mistake of its own")
        threading.Event().wait()


@pytest.mark.parametrize(
    ("victim", "how"),
    [(1, "killed"), *(pytest.param(*one, marks=pytest.mark.slow)
                      for one in ((0, "killed"), (0, "raised"), (2, "raised")))],
)  # fmt: skip
def test_processes_that_cannot_end_in_order_are_ended(
    tmp_path: Path, victim: int, how: str
) -> None:
    ended = together(3, partial(_waits_for_ever, victim, how), tmp_path)
    last = -signal.SIGKILL if how == "killed" else 1
    assert codes(ended) == [last if rank == victim else 2 for rank in range(3)]
    for rank, one in enumerate(ended):
        if rank != victim:
            assert f"error: loss: processes of the run: found process {victim} of 3" in one.output
