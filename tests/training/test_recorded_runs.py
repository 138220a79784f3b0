"""A recorded run with the fast step: the run is what it was, and the doctor sees what it sees of
the plain one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from packaging.version import Version
from train_runs import log, short

from omni_grpo_core import tiny
from omni_grpo_core.core import forward, towers
from omni_grpo_core.core.forward import first_positions
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.core.towers import Features
from omni_grpo_core.fast import prompts, scoring
from omni_grpo_core.losses.advantages import group_advantages
from omni_grpo_core.pipeline.settings import load_settings
from omni_grpo_core.recorder.record import record
from omni_grpo_core.training import loop
from omni_grpo_core.training.config import as_values
from omni_grpo_core.training.micro_batches import make_micro_batches
from omni_grpo_core.training.step import Scorer
from omni_grpo_core.types import Batch, Modality

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        Version(version("transformers")) < Version("4.57"), reason="no attention functions"
    ),
]

RunCli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def another_process() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Ran(NamedTuple):
    log: list[dict[str, Any]]
    ids: list[tuple[int, ...]]
    weights: bytes


def run(out: Path, fast: str, recording: Path | None = None, **changes: Any) -> Ran:
    """Two steps, with completions long enough to end."""
    ids: list[tuple[int, ...]] = []

    def keep(view: Any) -> None:
        ids.extend(completion.token_ids for completion in view.rolled.completions)

    def watch(policy: Policy) -> Any:
        return record(str(recording), model=policy.model, processor=policy.processor)

    config = short(out, **{"fast": fast, "save_every": 0, "steps": 2, **changes})
    settings = load_settings(Path(config.checkpoint))
    settings = replace(settings, group_size=4, max_new_tokens=90, temperature=1.3)
    config = replace(config, settings=settings, guard=replace(config.guard, drift=99.0))
    watching: dict[str, Any] = {} if recording is None else {"watch": watch}
    assert loop.train(config, on_step=keep, **watching).status == "finished"
    AcceleratorState._reset_state(reset_partial_state=True)
    return Ran(log(out), ids, (out / "model" / "model.safetensors").read_bytes())


def judged(
    run_cli: RunCli,
    folder: Path,
    plant: Callable[[pytest.MonkeyPatch], None] = lambda patch: None,
    **changes: Any,
) -> dict[str, dict[str, Any]]:
    """The doctor on the plain and on the fast run. What is planted is gone when it looks: it runs
    the same functions to compare with."""
    found = {}
    for name, fast in (("plain", "off"), ("fast", "on")):
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            run(folder / f"{name}-run", fast, folder / name, **changes)
        code, out, err = run_cli("doctor", folder / name, "--json")
        assert code in (0, 1), err
        found[name] = json.loads(out)
    return found


def facts(found: dict[str, Any]) -> list[Any]:
    return [
        (one["stage"], one["severity"], [e["fact"] for e in one["evidence"]])
        for one in found["findings"]
    ]


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
def test_it_is_bit_equal_and_seen_whole(tmp_path: Path, run_cli: RunCli, family: Any) -> None:
    changes: dict[str, Any] = {"checkpoint": str(tiny.checkpoint_dir(family))}
    recorded = run(tmp_path / "recorded", "on", tmp_path / "recording", **changes)
    assert recorded == run(tmp_path / "bare", "on", **changes)
    found = judged(run_cli, tmp_path, **changes)
    assert found["fast"]["coverage"] == found["plain"]["coverage"]
    assert facts(found["fast"]) == facts(found["plain"])
    assert found["fast"]["healthy"]
    # no reward asks for a format; what Qwen3-Omni adds inside the text model is not recorded
    unjudged = {"parsed"} if family == "qwen2.5" else {"parsed", "logits"}
    states = {stage: one["state"] for stage, one in found["fast"]["coverage"].items()}
    assert len(states) == 13
    assert {stage for stage, state in states.items() if state != "sound"} == unjudged
    assert {states[stage] for stage in unjudged} == {"unjudged"}


def test_the_command_records(tmp_path: Path, run_cli: RunCli) -> None:
    config = short(tmp_path / "run", fast="on", save_every=0, steps=1)
    (tmp_path / "run.yaml").write_text(json.dumps(as_values(config)))
    code, _, err = run_cli("train", tmp_path / "run.yaml", "--record", 1)
    assert code == 0, err
    code, out, err = run_cli("doctor", tmp_path / "run" / "recording", "--json")
    assert json.loads(out)["coverage"]["loss"] == {"state": "sound"}, err


# --------------------------------------------------------------------------- planted mistakes


def _positions_late(patch: pytest.MonkeyPatch) -> None:
    """Scoring continues the prompt one position later than sampling did."""
    for module in (forward, scoring):
        patch.setattr(module, "first_positions", lambda *given: first_positions(*given) + 1)


def _features_blank(patch: pytest.MonkeyPatch) -> None:
    real = towers.features

    def blank(policy: Policy, batch: Batch) -> dict[Modality, Features]:
        found = real(policy, batch)
        return {m: replace(one, tokens=torch.zeros_like(one.tokens)) for m, one in found.items()}

    for module in (forward, prompts):
        patch.setattr(module, "features", blank)


def _another_temperature(patch: pytest.MonkeyPatch) -> None:
    real = Scorer.__init__

    def cooler(scorer: Scorer, policy: Policy, temperature: float, *rest: Any) -> None:
        real(scorer, policy, temperature / 2, *rest)

    patch.setattr(Scorer, "__init__", cooler)


def _advantages_negated(patch: pytest.MonkeyPatch) -> None:
    def negated(*given: Any) -> Any:
        found = group_advantages(*given)
        return replace(found, values=-found.values)

    patch.setattr(loop, "group_advantages", negated)


def _eos_left_out(patch: pytest.MonkeyPatch) -> None:
    """The token that ends a completion is not in the loss."""

    def shorter(*given: Any, **rest: Any) -> Any:
        return tuple(
            replace(micro, in_loss=micro.in_loss & micro.mask.roll(-1, 1))
            for micro in make_micro_batches(*given, **rest)
        )

    patch.setattr(loop, "make_micro_batches", shorter)


PLANTED: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "positions off by one in scoring": (_positions_late, "positions"),
    "features of media are zero": (_features_blank, "embeddings"),
    "scored at another temperature": (_another_temperature, "completion"),
    "advantages negated": (_advantages_negated, "advantage"),
    "the end of a completion is not in the loss": (_eos_left_out, "loss"),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_named_as_in_the_plain_run(
    tmp_path: Path, run_cli: RunCli, mistake: str
) -> None:
    plant, stage = PLANTED[mistake]
    found = judged(run_cli, tmp_path, plant)
    assert facts(found["fast"]) == facts(found["plain"])
    assert found["fast"]["headline"] == found["plain"]["headline"]
    assert stage in {one["stage"] for one in found["fast"]["findings"]}
