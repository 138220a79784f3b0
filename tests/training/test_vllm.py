"""The real vLLM on the tiny checkpoint: ``tox -e vllm``.

One engine, in this process, serves all tests; what ends or hangs runs in a process of its own.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from math import sqrt
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import pytest
from adapted_policy import adapted
from train_runs import log, short

from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.engines.proof import prove
from omni_grpo_core.engines.server import ServedBackend
from omni_grpo_core.engines.sides import GROUP, Sampled, Sides
from omni_grpo_core.engines.vllm_backend import EngineSettings, VllmBackend
from omni_grpo_core.engines.weights import fingerprint, is_adapter, write_checkpoint
from omni_grpo_core.faults.boundary import BOUNDARY, Boundary, BoundaryFault, report
from omni_grpo_core.losses import RolloutCorrection
from omni_grpo_core.pipeline.inputs import Inputs, prepare
from omni_grpo_core.pipeline.settings import Settings, load_settings
from omni_grpo_core.tiny import checkpoint_dir, data_file
from omni_grpo_core.tolerances import ENGINE
from omni_grpo_core.training.config import LoraConfig, OptimizerConfig, TrainConfig, VllmConfig
from omni_grpo_core.training.loop import StepView, train
from omni_grpo_core.training.trainable import adapter_off, merged_weights
from omni_grpo_core.types import Sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: tox -e vllm"),
    # vLLM's and its libraries' own
    pytest.mark.filterwarnings("default"),
]
LANE = ENGINE["float32"]
TOKENS = 24


class Kept(VllmBackend):
    """Outlives the runs that use it: starting takes longer than most tests."""

    def close(self) -> None:
        """Ended with the session."""


@pytest.fixture(scope="module")
def backend() -> Iterator[VllmBackend]:
    kept = Kept(EngineSettings(max_model_len=1024))
    yield kept
    VllmBackend.close(kept)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(checkpoint_dir())


@pytest.fixture(scope="module")
def settings() -> Settings:
    return replace(load_settings(checkpoint_dir()), temperature=1.5, max_new_tokens=TOKENS)


@pytest.fixture(scope="module")
def samples() -> tuple[Sample, ...]:
    return load_samples(data_file())


@pytest.fixture(scope="module")
def fresh(backend: VllmBackend, policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's weights, as a folder."""
    folder = tmp_path_factory.mktemp("weights")
    write_checkpoint(policy, policy.model.state_dict(), folder)
    return folder


@pytest.fixture
def loaded(backend: VllmBackend, fresh: Path) -> VllmBackend:
    backend.load(fresh)
    return backend


def sampled(sides: Sides, inputs: Inputs, length: int = TOKENS) -> Sampled:
    answers = sides.ask(inputs, 0, sides.settings.temperature, length)
    read = [answer.prompt_ids for answer in answers]
    assert read == [tuple(row.input_ids.tolist()) for row in inputs.batch.rows]
    return sides.read(inputs, answers, sides.settings.temperature, length)


def test_all_shipped_rows_in_one_call(
    loaded: VllmBackend, policy: Policy, settings: Settings, samples: tuple[Sample, ...]
) -> None:
    """Interleaved, separate and silent clips, pictures, sounds and text beside each other: ids
    equal, and 176 completions within 1e-4 nats (1e-5 measured)."""
    inputs = prepare(policy, samples, settings)
    modes = {row.audio_in_video for row in inputs.batch.rows}
    assert modes == {"interleaved", "separate", "off"}
    found = sampled(Sides(policy, loaded, settings, LANE), inputs, 48)
    assert len(found.gap) == GROUP * len(samples) >= 64
    assert float(found.gap.abs().max()) <= 1e-4
    reasons = {one.finish_reason for one in found.rolled.completions}
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("mode", ["interleaved", "separate", "off"])
@pytest.mark.parametrize("fps", [2.0, 4.0, 8.0])
def test_clips_in_each_mode_and_at_each_rate(
    loaded: VllmBackend,
    policy: Policy,
    settings: Settings,
    samples: tuple[Sample, ...],
    mode: Any,
    fps: float,
) -> None:
    """Clips of one to three seconds: a temporal patch lasts .25 to 1 s, and vLLM by itself
    interleaves all as if it were 1."""
    other = replace(settings, audio_in_video=mode, media=replace(settings.media, fps=fps))
    clips = [s for s in samples if s.media and all(m.modality == "video" for m in s.media)]
    heard = [s for s in clips if "clip-1" not in s.media[0].path] or clips
    inputs = prepare(policy, [heard[i] for i in (0, 1, -2, -1)], other)
    found = sampled(Sides(policy, loaded, other, LANE), inputs)
    assert float(found.gap.abs().max()) <= 1e-4


def test_positions_of_interleaved_rows_are_wrong_in_vllm_itself(
    loaded: VllmBackend, policy: Policy, settings: Settings, samples: tuple[Sample, ...]
) -> None:
    """What the worker extension is for. Fails when a version of vLLM has it right: then remove the
    extension for that version."""
    inputs = prepare(policy, samples[:3], settings)
    kept: list[Any] = []

    def own(worker: Any) -> None:
        model = worker.model_runner.get_model()
        kept.append(model.__dict__.pop("get_mrope_input_positions"))

    def corrected(worker: Any) -> None:
        worker.model_runner.get_model().get_mrope_input_positions = kept.pop()

    loaded.llm.collective_rpc(own)
    loaded.llm.reset_prefix_cache()
    try:
        found = sampled(Sides(policy, loaded, settings, LANE), inputs)
    finally:
        loaded.llm.collective_rpc(corrected)
        loaded.llm.reset_prefix_cache()
    assert float(found.gap.abs().max()) > 3e-4  # 0.3 measured


ROWS = (0, 3, 17, 19, 21)


def test_the_proof_agrees_with_the_real_engine(
    loaded: VllmBackend, policy: Policy, settings: Settings, samples: tuple[Sample, ...]
) -> None:
    inputs = prepare(policy, [samples[i] for i in ROWS], settings)
    proof = prove(Sides(policy, loaded, settings, LANE), inputs, 0)
    assert [c for record in proof.records for c in record.checks if not c.ok] == []
    assert proof.numbers["engine/gap_max"] <= 1e-4


def proved(
    backend: VllmBackend,
    policy: Policy,
    settings: Settings,
    samples: tuple[Sample, ...],
    folder: Path,
    plant: Callable[[Boundary], object] = lambda boundary: None,
) -> set[tuple[str, str]]:
    """The checks that fail, with their stages."""
    inputs = prepare(policy, [samples[i] for i in ROWS], settings)
    others = {"the adapter is applied in the engine": lambda: adapter_off(policy.model)}
    write_checkpoint(policy, merged_weights(policy.model), folder)
    boundary = Boundary(backend, policy)
    boundary.load(folder)
    plant(boundary)
    boundary.load(folder)
    try:
        proof = prove(Sides(policy, boundary, settings, LANE, others), inputs, 0)
    finally:
        backend.more = {}
        backend.llm.collective_rpc(report, args=("processed_logprobs",))
    return {(r.stage, c.name) for r in proof.records for c in r.checks if not c.ok}


@pytest.mark.parametrize("lora", [True, False], ids=["adapters", "plain"])
@pytest.mark.parametrize("fault", BOUNDARY, ids=lambda fault: fault.id)
def test_each_fault_is_named_at_its_stage_in_the_real_engine(
    backend: VllmBackend,
    fault: BoundaryFault,
    lora: bool,
    settings: Settings,
    samples: tuple[Sample, ...],
    tmp_path: Path,
) -> None:
    policy = adapted(0.1) if lora else load_policy(checkpoint_dir())
    found = proved(backend, policy, settings, samples, tmp_path, fault.inject)
    there = lora or fault.id != "engine.adapter-off"
    assert found == ({(fault.stage, name) for name in fault.found} if there else set())


def test_weights_that_amplify_rounding_are_named_as_such(
    backend: VllmBackend, settings: Settings, samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    """A logprob is 1.5e-4 off, as far as this machine rounds, and with black frames none is."""
    found = proved(backend, adapted(0.3), settings, samples, tmp_path)
    assert found <= {("logits", "the engine scores as the trainer does")}


def colder(out: Path, **changes: Any) -> TrainConfig:
    """vLLM takes no temperature above 2."""
    config = short(out, **changes)
    return replace(config, settings=replace(config.settings, temperature=2.0))


def test_grpo_through_vllm_learns_as_the_plain_run_does(
    backend: VllmBackend, tmp_path: Path
) -> None:
    """Mean reward of the last four of fourteen steps: from .35 to .66, .85 and .60 over three
    seeds of the plain run. Both kinds are samples of one distribution: their means lie within two
    standard errors of the difference."""

    def last(seed: int, engine: VllmBackend | None) -> float:
        out = tmp_path / f"{seed}-{engine is None}"
        config = colder(
            out,
            steps=14,
            batch_size=32,
            micro_batch_size=16,
            seed=seed,
            save_every=0,
            optimizer=OptimizerConfig(lr=4e-3),
            correction=RolloutCorrection() if engine else None,
        )
        result = train(config, backend=engine)
        assert result.status == "finished", result.findings
        lines = log(out)
        if engine is not None:
            assert lines[0]["engine/gap_max"] <= 1e-4
            assert all(line["drift_max"] <= 1e-3 for line in lines)
            assert all(abs(line["correction"] - 1) <= 1e-3 for line in lines)
        return fmean(line["reward"] for line in lines[-4:])

    plain = [last(seed, None) for seed in range(3)]
    through = [last(seed, backend) for seed in range(3)]
    error = sqrt((variance(plain) + variance(through)) / 3)
    assert min(plain + through) > 0.38
    assert abs(fmean(plain) - fmean(through)) <= 2 * error, (plain, through)


def test_an_engine_in_a_process_of_its_own_is_begun_again(tmp_path: Path) -> None:
    """vLLM is killed between two rollouts of a run; the log is that of a run without it."""
    killed: list[int] = []

    def kill(view: StepView) -> None:
        assert served.pid is not None
        if not killed:
            killed.append(served.pid)
            os.kill(served.pid, signal.SIGKILL)

    served = ServedBackend(settings={"max_model_len": 1024})
    said: list[str] = []
    result = train(colder(tmp_path / "run"), backend=served, on_step=kill, warn=said.append)
    assert result.status == "finished"
    assert len(killed) == 1
    assert "exit code -9" in said[-1]


class Forgetful(ServedBackend):
    """Serves several runs; where ``deaf``, adapters are read and not applied."""

    deaf = False

    def load(self, folder: Path) -> str:
        return fingerprint(folder) if self.deaf and is_adapter(folder) else super().load(folder)

    def close(self) -> None:
        """Ended by the test."""


def test_adapters_are_sent_by_themselves(tmp_path: Path) -> None:
    """vLLM applies them itself, as new ones each step; base weights are sent once. One that leaves
    them out is told at the second step: before the first update adapters are nothing."""
    served = Forgetful(settings={"max_model_len": 1024, "lora_rank": 4})
    config = colder(
        tmp_path / "run",
        rollout="vllm",
        lora=LoraConfig(rank=4),
        vllm=VllmConfig(lora="adapter", prove_every=1),
        optimizer=OptimizerConfig(lr=1e-2),
    )
    try:
        result = train(config, backend=served)
        assert result.status == "finished", result.findings
        lines = log(tmp_path / "run")
        assert all(line["engine/gap_max"] <= 1e-4 for line in lines)
        assert all(line["drift_max"] <= 1e-4 for line in lines)
        served.deaf = True
        result = train(replace(config, out=str(tmp_path / "deaf")), backend=served)
    finally:
        ServedBackend.close(served)
    assert (result.status, result.step) == ("stopped", 1)
    assert [(one.stage, one.name) for one in result.findings] == [
        ("policy", "the adapter is applied in the engine")
    ]


class Standin:
    """In place of vLLM's ``LLM``: what a CPU does not offer."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self) -> None:
        self.calls.append("wake")


def test_sleep_is_left_out_where_vllm_does_not_offer_it() -> None:
    """Nor is an engine woken that has not been started yet. Where it is offered, weights are kept
    in the machine's memory (level 1)."""
    backend, llm = VllmBackend(), Standin()
    for offered, calls in ((False, []), (True, ["sleep 1", "wake"])):
        backend._sleeps, backend._llm = offered, None
        backend.sleep()
        backend.wake()
        backend._llm = llm
        backend.sleep()
        backend.wake()
        assert llm.calls == calls
