"""Whatever a trainer wraps around the thinker, its calls are seen and nothing changes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import toy_thinker
from plain_loop import PlainLoop

from omni_grpo_core import record
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall, StepSeen, calls_of
from omni_grpo_core.trace.store import load_trace
from omni_grpo_core.types import Sample


def test_peft(
    tmp_path: Path, policy: Policy, samples: tuple[Sample, ...], settings: Settings
) -> None:
    from peft import LoraConfig, get_peft_model

    def wrap(model: Any) -> Any:
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))

    loop = PlainLoop(policy, samples[0], settings, wrap=wrap)
    _, batch = loop.prepare()
    with record(tmp_path, model=loop.model, processor=loop.processor, steps=1) as recorder:
        loop.note = recorder.note
        with loop.model.disable_adapter(), torch.no_grad():
            loop.model(**batch, use_audio_in_video=True)
        loop.step()
    trace = load_trace(tmp_path / "step-000000")
    reference, scored = calls_of(trace, ForwardCall)
    [generated], [step] = calls_of(trace, GenerateCall), calls_of(trace, StepSeen)
    assert generated.modes.wrappers == ("PeftModel", "LoraModel")
    assert (reference.modes.adapter, scored.modes.adapter) == ("off", "on")
    assert (reference.modes.grad_enabled, scored.modes.grad_enabled) == (False, True)
    assert step.trainable == step.held
    assert set(step.trainable) == {"adapter"}
    assert step.changed == {"adapter": True}


def use_submodel_func(model: torch.nn.Module) -> None:
    """As ms-swift does, before anything is recorded: the functions of the thinker's class become
    methods of the model around it, and their calls look nothing up on the thinker."""

    def redirected(function: Any) -> Any:
        @functools.wraps(function)
        def instead(self: Any, *args: Any, **keywords: Any) -> Any:
            return function(self.thinker, *args, **keywords)

        return MethodType(instead, model)

    for name in ("generate", "forward"):
        setattr(model, name, redirected(getattr(model.thinker, name).__func__))


def test_methods_of_the_thinker_set_on_a_model_around_it(tmp_path: Path) -> None:
    """The thinker's hooks saw one-token decoding steps and no scoring forward, generate not at
    all: a run whose every sound was zeroed was healthy."""
    outer = torch.nn.Module()
    outer.thinker = toy_thinker.make()
    use_submodel_func(outer)
    before = vars(outer)["generate"]
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.1)
    with record(tmp_path, model=outer, processor=toy_thinker.ToyProcessor()):
        toy_thinker.step(outer, optimizer)
    trace = load_trace(tmp_path / "step-000000")
    [generated], [scored] = calls_of(trace, GenerateCall), calls_of(trace, ForwardCall)
    assert generated.sequences is not None
    assert scored.logprobs is not None
    assert scored.own
    assert scored.inputs["input_ids"].tolist() == generated.sequences.tolist()
    assert vars(outer)["generate"] is before


class Whole(torch.nn.Module):
    """A model around the thinker, whose call is the thinker's as ms-swift sets it."""

    def __init__(self) -> None:
        super().__init__()
        self.thinker = toy_thinker.make()
        use_submodel_func(self)


class Calls(torch.nn.Module):
    """Calls the forward of what it wraps, not the module, as PEFT does."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **keywords: Any) -> Any:
        return self.model.forward(**keywords)


def test_a_reference_and_a_wrapper_of_such_a_model(tmp_path: Path) -> None:
    """A reference's scores were not seen, and the policy said to be its own reference; under PEFT
    no score was."""
    trained, reference = Calls(Whole()), Whole()
    before = vars(Whole).get("__call__"), torch.nn.Module.__call__
    ids = torch.tensor([[1, 2, 3]])
    with record(tmp_path, model=trained, processor=toy_thinker.ToyProcessor()) as recorder:
        trained(input_ids=ids)
        reference(input_ids=ids)
        recorder.end_step()
    assert (vars(Whole).get("__call__"), torch.nn.Module.__call__) == before
    own, other = calls_of(load_trace(tmp_path / "step-000000"), ForwardCall)
    assert (own.own, other.own) == (True, False)
    assert own.logprobs is not None
    assert other.logprobs is not None
    assert torch.equal(own.logprobs, other.logprobs)


def test_ddp(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        model = torch.nn.parallel.DistributedDataParallel(toy_thinker.make())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with record(tmp_path / "trace", model=model, processor=toy_thinker.ToyProcessor()):
            loss = toy_thinker.step(model, optimizer)
    finally:
        torch.distributed.destroy_process_group()
    trace = load_trace(tmp_path / "trace" / "step-000000")
    [generated], [scored] = calls_of(trace, GenerateCall), calls_of(trace, ForwardCall)
    assert generated.modes.wrappers == scored.modes.wrappers == ("DistributedDataParallel",)
    assert calls_of(trace, StepSeen)[0].losses == (loss,)


_RANK = """
import json, os, sys
from contextlib import nullcontext
from pathlib import Path
import torch
import torch.distributed.fsdp
import toy_thinker
from omni_grpo_core import record
kind, folder, rank = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
    world_size=int(os.environ["WORLD_SIZE"]))
def wrapped():
    model = toy_thinker.make()
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp":
        return torch.distributed.fsdp.FullyShardedDataParallel(
            model, use_orig_params=True, device_id=torch.device("cpu"))
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    return torch.distributed.fsdp.fully_shard(model, mesh=mesh)
FSDP = torch.distributed.fsdp.FullyShardedDataParallel
gathered = FSDP.summon_full_params if kind == "fsdp" else nullcontext
def steps(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return [toy_thinker.step(model, optimizer, prompt, gathered) for prompt in ("abc", "bcd")]
plain, model = steps(wrapped()), wrapped()
with record(folder / "trace", model=model, processor=toy_thinker.ToyProcessor(), steps=2):
    watched = steps(model)
(folder / f"losses-{rank}.json").write_text(json.dumps([plain, watched]))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "wrapper"),
    [
        ("ddp", ("DistributedDataParallel",)),
        ("fsdp", ("FullyShardedDataParallel",)),
        ("fsdp2", ()),
    ],
)
def test_two_ranks(tmp_path: Path, kind: str, wrapper: tuple[str, ...]) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "WORLD_SIZE": "2",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, kind, str(tmp_path)],
            env={**environment, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    for rank in range(2):
        plain, watched = json.loads((tmp_path / f"losses-{rank}.json").read_text())
        assert watched == plain
        for number in range(2):
            trace = load_trace(tmp_path / "trace" / f"rank-{rank}" / f"step-00000{number}")
            [generated], [scored] = calls_of(trace, GenerateCall), calls_of(trace, ForwardCall)
            [step] = calls_of(trace, StepSeen)
            assert (trace.header["rank"], trace.header["world"]) == (str(rank), "2")
            assert "not_recorded" not in trace.header
            assert generated.modes.wrappers == scored.modes.wrappers == wrapper
            assert scored.position_ids is not None
            assert step.losses == (plain[number],)
            assert step.changed  # a rank does not always hold a shard of every part
            assert all(step.changed.values())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["whole graph", "compiled before", "in place"])
def test_compile(tmp_path: Path, way: str) -> None:
    def run(folder: Path | None) -> list[float]:
        torch._dynamo.reset()
        model: Any = toy_thinker.make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        # the recorder must leave one graph in one piece
        shell: Any = model
        if way == "in place":
            model.compile(backend="eager", fullgraph=True)
        else:
            shell = torch.compile(model, backend="eager", fullgraph=True)
        if way == "compiled before":
            toy_thinker.step(shell, optimizer)
        if folder is None:
            return [toy_thinker.step(shell, optimizer) for _ in range(2)]
        with record(folder, model=shell, processor=toy_thinker.ToyProcessor(), steps=2):
            return [toy_thinker.step(shell, optimizer) for _ in range(2)]

    assert run(tmp_path / "trace") == run(None)
    for number in range(2):
        trace = load_trace(tmp_path / "trace" / f"step-00000{number}")
        [scored] = calls_of(trace, ForwardCall)
        assert len(calls_of(trace, GenerateCall)) == 1
        assert scored.logprobs is not None
        # the text model is inside the graph, where nothing can be observed
        assert scored.position_ids is None
        assert scored.modes.wrappers == (() if way == "in place" else ("OptimizedModule",))
        assert "not_recorded" not in trace.header
