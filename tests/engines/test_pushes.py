"""What reaches an engine between two rollouts, and in which order: all weights, or adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapted_policy import adapted

from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.engines.engine import SeparateEngine
from omni_grpo_core.engines.proof import Proof
from omni_grpo_core.engines.requests import Answer, Drawn, Request, Sampling
from omni_grpo_core.engines.transformers_backend import TransformersBackend
from omni_grpo_core.engines.weights import Adapter, fingerprint, is_adapter
from omni_grpo_core.errors import BatchError, ConfigError
from omni_grpo_core.pipeline.inputs import Inputs, prepare
from omni_grpo_core.pipeline.settings import Settings, load_settings
from omni_grpo_core.tiny import FamilyName, checkpoint_dir, data_file
from omni_grpo_core.tolerances import ENGINE
from omni_grpo_core.training.check_engine import check_engine
from omni_grpo_core.training.config import LoraConfig, TrainConfig, VllmConfig
from omni_grpo_core.training.trainable import adapter_off, adapter_weights, merged_weights


class Sleeper:
    """An engine that gives up its memory when it is told to: nothing works until it is woken."""

    name = "sleeper"

    def __init__(self, prompt_ids: tuple[int, ...]) -> None:
        self.prompt_ids = prompt_ids
        self.calls: list[str] = []
        self.asleep = False

    def _called(self, what: str) -> None:
        assert not self.asleep, f"{what} while asleep"
        self.calls.append(what)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        self._called("generate")
        drawn = Drawn((sampling.eos_ids[0],), (-1.0,), "stop")
        return [Answer(self.prompt_ids, (drawn,) * sampling.group_size) for _ in requests]

    def load(self, folder: Path) -> str:
        self._called(f"load {folder.name}")
        return fingerprint(folder)

    def sleep(self) -> None:
        self._called("sleep")
        self.asleep = True

    def wake(self) -> None:
        self.asleep = False
        self.calls.append("wake")

    def restart(self) -> None:
        self.asleep = False

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def policy() -> Policy:
    return load_policy(checkpoint_dir())


@pytest.fixture(scope="module")
def settings() -> Settings:
    return replace(load_settings(checkpoint_dir()), temperature=1.5, max_new_tokens=24)


def inputs_of(policy: Policy, settings: Settings, *rows: int) -> Inputs:
    samples = load_samples(data_file())
    return prepare(policy, [samples[row] for row in rows], settings)


def engine_of(
    policy: Policy, settings: Settings, backend: TransformersBackend | Sleeper, lora: bool
) -> SeparateEngine:
    adapter = Adapter(4, 32, ("q_proj",), lambda: adapter_weights(policy.model)) if lora else None
    return SeparateEngine(
        policy,
        backend,
        settings,
        ENGINE["float32"],
        lambda: merged_weights(policy.model),
        adapter=adapter,
        others={"the adapter is applied in the engine": lambda: adapter_off(policy.model)},
    )


@pytest.mark.parametrize(
    ("lora", "first", "second"),
    [
        (False, ["load checkpoint"], ["load checkpoint"]),
        (True, ["load checkpoint", "load adapter"], ["load adapter"]),
    ],
)
def test_an_engine_is_woken_loaded_asked_and_put_to_sleep(
    policy: Policy, settings: Settings, lora: bool, first: list[str], second: list[str]
) -> None:
    inputs = inputs_of(policy, settings, 21)
    backend = Sleeper(tuple(inputs.batch.rows[0].input_ids.tolist()))
    engine = engine_of(policy, settings, backend, lora)
    for _ in range(2):
        engine.push()
        engine.rollout(inputs, group_size=2, max_new_tokens=1, temperature=1.0, seed=0)
    asked = ["generate", "sleep"]
    engine.close()
    assert backend.calls == ["wake", *first, *asked, "wake", *second, *asked, "close"]


def test_a_rollout_on_other_ids_is_none(policy: Policy, settings: Settings) -> None:
    """A proof looks at eight rows; the rows behind them may be read otherwise."""
    inputs = inputs_of(policy, settings, 21)
    own = inputs.batch.rows[0].input_ids.tolist()
    engine = engine_of(policy, settings, Sleeper((*own, own[-1])), False)
    with pytest.raises(BatchError, match="the engine reads the batch's text") as raised:
        engine.rollout(inputs, group_size=2, max_new_tokens=1, temperature=1.0, seed=0)
    engine.close()
    assert "samples.json:22" in raised.value.got


class Deaf(TransformersBackend):
    """Reads adapters and does not use them."""

    def load(self, folder: Path) -> str:
        return fingerprint(folder) if is_adapter(folder) else super().load(folder)


@pytest.mark.slow
def test_adapters_by_themselves_are_the_merged_policy(settings: Settings) -> None:
    """Also after they moved; an engine that leaves them out is told by name."""
    policy = adapted(0.1)
    inputs = inputs_of(policy, settings, 0, 17, 21)

    def proved(engine: SeparateEngine, seed: int) -> Proof:
        with adapter_off(policy.model):
            engine.push()  # the weights without adapters, as a run with vllm: lora: adapter sends
        found = engine.prove(inputs, 0, seed)
        assert found is not None
        return found

    engine, deaf = (
        engine_of(policy, settings, backend(), True) for backend in (TransformersBackend, Deaf)
    )
    assert proved(engine, 0).ok
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-0.5)
    assert proved(engine, 1).ok
    engine.close()
    records = proved(deaf, 0).records
    deaf.close()
    assert [(r.stage, c.name) for r in records for c in r.checks if not c.ok] == [
        ("policy", "the adapter is applied in the engine")
    ]


@pytest.mark.parametrize(
    ("family", "rank", "world", "item"),
    [
        ("qwen2.5", None, 1, "vllm: lora"),
        ("qwen2.5", 513, 1, "lora: rank"),
        ("qwen3", 4, 1, "vllm: lora"),
        ("qwen2.5", 4, 2, "rollout"),
    ],
)
def test_what_the_engine_does_not_take_is_refused(
    family: FamilyName,
    rank: int | None,
    world: int,
    item: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("omni_grpo_core.training.check_engine.require", lambda *_: None)
    config = TrainConfig(
        checkpoint=str(checkpoint_dir(family)),
        data="",
        out="",
        rollout="vllm",
        vllm=VllmConfig(lora="adapter"),
        lora=None if rank is None else LoraConfig(rank=rank),
    )
    with pytest.raises(ConfigError) as raised:
        check_engine(config, world)
    assert raised.value.item == item
    with pytest.raises(ConfigError, match="vllm: found settings of an engine with rollout: own"):
        check_engine(replace(config, rollout="own"), world)
