"""A run with the fast step writes the plain run's log."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import pytest
from packaging.version import Version
from train_runs import log, short

from omni_grpo_core import tiny
from omni_grpo_core.fast import rollout
from omni_grpo_core.fast.compiled import Compiled, watched
from omni_grpo_core.losses import LossConfig, LossType
from omni_grpo_core.tolerances import HALF
from omni_grpo_core.training.config import Fast, GuardConfig, LoraConfig
from omni_grpo_core.training.fingerprint import fingerprint
from omni_grpo_core.training.loop import train

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version("4.57"), reason="no attention functions"
)

# in float32 transformers' compiled experts are a loop on the CPU, which no graph captures
EXPERTS = pytest.mark.filterwarnings("ignore:tokens are decoded without a CUDA graph:UserWarning")
FAMILIES = ["qwen2.5", pytest.param("qwen3", marks=EXPERTS)]
CURVE = 2e-3
"""Of a logged number after some AdamW steps: they divide by the root of a second moment, so that a
gradient of 1e-7 of the largest, which is rounding, still moves its weight by the learning rate."""


def curves(out: Path, **changes: Any) -> list[dict[str, Any]]:
    result = train(short(out, save_every=0, **changes))
    assert result.status == "finished", result.findings
    return log(out)


def assert_same_curves(found: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    assert len(found) == len(want)
    for step, (one, other) in enumerate(zip(found, want, strict=True)):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, float) and not name.startswith("reward"):
                assert one[name] == pytest.approx(value, rel=CURVE, abs=CURVE), (step, name)
            else:  # what is sampled, and so what it earns, is the same
                assert one[name] == value, (step, name)


def test_a_short_run_is_the_plain_one(tmp_path: Path) -> None:
    want, found = (curves(tmp_path / fast, fast=fast, steps=1) for fast in ("off", "on"))
    assert want[0]["grad_norm"] > 0
    assert_same_curves(found, want)


def test_the_state_of_a_run_with_the_other_step_is_its_own(tmp_path: Path) -> None:
    """Where the fast step cannot run the advice is to switch it off; the state was refused then."""
    assert len({fingerprint(short(tmp_path, fast=fast)) for fast in get_args(Fast)}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("then", ["on", "off"])
def test_a_run_goes_on_with_the_other_step(tmp_path: Path, then: Fast) -> None:
    first: Fast = "off" if then == "on" else "on"
    want = curves(tmp_path / "whole", fast=first, steps=2)
    train(short(tmp_path / "run", fast=first, steps=1))
    assert_same_curves(curves(tmp_path / "run", fast=then, steps=2), want)


def test_nothing_watches_what_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard's hook on the text model kept a 7B's training from its graph and its compiled
    layers: 75 ms a token instead of 6, without a word."""
    decode = rollout._Decoding.__call__
    seen: list[bool] = []

    def looked(self: rollout._Decoding, compiled: Compiled) -> None:
        seen.append(watched(self.policy))
        decode(self, compiled)

    monkeypatch.setattr(rollout._Decoding, "__call__", looked)
    curves(tmp_path, fast="on", steps=1, gradient_checkpointing=True, lora=LoraConfig(rank=4))
    assert seen == [False]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": LoraConfig(rank=4), "gradient_checkpointing": True},
        {
            "loss": LossConfig(loss_type="gspo", beta=0.04),
            "iterations": 2,
            "freeze": ("video", "audio"),
            "micro_batch_size": 2,
        },
    ],
    ids=["all weights", "lora", "reference, two iterations"],
)
def test_curves_coincide(tmp_path: Path, seed: int, changes: dict[str, Any]) -> None:
    want, found = (
        curves(tmp_path / fast, fast=fast, steps=8, seed=seed, **changes) for fast in ("off", "on")
    )
    assert_same_curves(found, want)


@pytest.mark.slow
@pytest.mark.parametrize("kind", get_args(LossType))
def test_a_run_of_every_loss_is_the_plain_one(tmp_path: Path, kind: LossType) -> None:
    """With a reference, two updates on a rollout and groups that the plain step splits."""
    length = 8 if kind == "dr_grpo" else None
    loss = LossConfig(loss_type=kind, beta=0.04, max_completion_length=length)
    changes: dict[str, Any] = {"loss": loss, "iterations": 2, "micro_batch_size": 2, "steps": 2}
    want, found = (curves(tmp_path / fast, fast=fast, **changes) for fast in ("off", "on"))
    assert_same_curves(found, want)


@pytest.mark.slow
def test_a_changed_run_is_not_the_plain_one(tmp_path: Path) -> None:
    """The comparison sees a temperature that is a tenth of a percent off."""
    config = short(tmp_path / "a", save_every=0, steps=1)
    warmer = replace(config.settings, temperature=config.settings.temperature * 1.01)
    want, found = curves(tmp_path / "a", steps=1), curves(tmp_path / "b", steps=1, settings=warmer)
    with pytest.raises(AssertionError):
        assert_same_curves(found, want)


@pytest.mark.gpu
@pytest.mark.tiny
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fast", ["off", "on"])
def test_a_run_with_full_determinism_is_the_same_again(
    tmp_path: Path, family: tiny.FamilyName, fast: str
) -> None:
    """In bfloat16, towers learning too: no operation of either step is without such a kernel."""
    given = {
        "checkpoint": str(tiny.checkpoint_dir(family)), "device": "cuda", "steps": 3, "fast": fast,
        "precision": "bfloat16", "gradient_checkpointing": True, "full_determinism": True,
        # rounding makes routers choose other experts
        "guard": GuardConfig(preflight=False, patience=99, garbage=1.0, drift=9.0),
    }  # fmt: skip
    first, second = (curves(tmp_path / name, **given) for name in ("first", "second"))
    assert first == second


@pytest.mark.gpu
@pytest.mark.tiny
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"lora": LoraConfig(rank=4)}], ids=["all", "lora"])
def test_a_run_on_a_device_is_compiled_and_the_plain_one(
    tmp_path: Path, family: tiny.FamilyName, changes: dict[str, Any]
) -> None:
    """In float32. A compiler or a graph that fails warns, and warnings are errors here. By this
    seed no router of Qwen3-Omni is within 2e-4 of choosing other experts; by the first one a token
    is within 1e-5, and on a GPU its logprob jumped by 0.7 between sampling and scoring."""
    given = {
        "checkpoint": str(tiny.checkpoint_dir(family)),
        "device": "cuda",
        "steps": 2,
        "seed": 3,
        **changes,
    }
    want, found = (curves(tmp_path / fast, fast=fast, **given) for fast in ("off", "on"))
    assert_same_curves(found, want)


@pytest.mark.gpu
@pytest.mark.tiny
@pytest.mark.parametrize("changes", [{}, {"lora": LoraConfig(rank=4)}], ids=["all", "lora"])
def test_a_compiled_run_in_half_precision_scores_what_it_sampled(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Under autocast, whose casts the compiled layers and the kernel take part in."""
    found = curves(tmp_path, fast="on", device="cuda", precision="bfloat16", steps=2, **changes)
    assert all(line["drift"] <= HALF.mean and line["drift_max"] <= HALF.worst for line in found)
