"""Training whose completions come from an engine with weights of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from train_runs import log, short

from omni_grpo_core.engines.requests import Answer, EngineLost, Request, Sampling
from omni_grpo_core.engines.transformers_backend import TransformersBackend
from omni_grpo_core.engines.weights import fingerprint
from omni_grpo_core.errors import CheckpointError
from omni_grpo_core.losses import RolloutCorrection
from omni_grpo_core.trace.store import load_trace
from omni_grpo_core.training.config import TrainConfig
from omni_grpo_core.training.loop import train

pytestmark = pytest.mark.slow


class Flaky(TransformersBackend):
    """Is lost in the middle of the calls of ``generate`` that ``lost`` numbers."""

    def __init__(self, *lost: int) -> None:
        super().__init__()
        self.lost, self.calls, self.loads = set(lost), 0, 0

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        self.calls += 1
        answers = super().generate(requests, sampling)
        if self.calls in self.lost:
            raise EngineLost("engine", got="killed", want="answers", fix="none")
        return answers

    def load(self, folder: Path) -> str:
        self.loads += 1
        return super().load(folder)


def run(out: Path, backend: TransformersBackend, **changes: Any) -> list[dict[str, Any]]:
    result = train(short(out, **changes), backend=backend)
    assert result.status == "finished", result.findings
    return log(out)


def test_the_log_says_how_far_engine_and_trainer_are_apart(tmp_path: Path) -> None:
    backend = Flaky()
    lines = run(tmp_path / "run", backend, correction=RolloutCorrection())
    assert backend.loads == 3  # the weights of each step
    # proved before the first step, with the first weights that learned something, every fifty steps
    assert [line.get("engine/gap_max", 0) < 1e-4 for line in lines] == [True, True, True]
    assert ["engine/gap_max" in line for line in lines] == [True, True, False]
    for line in lines:
        # own kernels, on other batches: float32 sums in another order
        assert line["drift_max"] < 1e-4
        assert line["correction"] == pytest.approx(1, abs=1e-4)
        assert abs(line["mismatch_kl"]) < 1e-4


def test_an_engine_that_is_lost_once_is_begun_again_and_the_run_is_the_same(
    tmp_path: Path,
) -> None:
    """The proof makes five calls: the sample, the hot one, and one for each modality of the rows.
    Whatever number of them is lost, and so in the rollouts behind: nothing changes."""
    straight = run(tmp_path / "straight", Flaky())
    for number in (1, 5):
        broken = Flaky(number)
        assert run(tmp_path / f"broken-{number}", broken) == straight
        assert broken.loads == 4  # once more


def test_an_engine_that_stays_lost_ends_the_run_before_its_step_and_a_resume_is_equal(
    tmp_path: Path,
) -> None:
    straight = run(tmp_path / "straight", Flaky())
    whole = Flaky()
    run(tmp_path / "count", whole)
    backend = Flaky(whole.calls, whole.calls + 1)  # the last rollout, and its repetition
    with pytest.raises(EngineLost, match="killed"):
        run(tmp_path / "run", backend)
    assert [line["step"] for line in log(tmp_path / "run")] == [0, 1]
    resumed = run(tmp_path / "run", Flaky())
    # a resumed run is proved again: the log of its first step has the proof's numbers
    plain = [{k: v for k, v in line.items() if "engine/" not in k} for line in resumed]
    assert plain == [{k: v for k, v in line.items() if "engine/" not in k} for line in straight]


class Unmoved(TransformersBackend):
    """Says that it has the new weights, and keeps those of the checkpoint."""

    def load(self, folder: Path) -> str:
        return super().load(folder) if self._policy is None else fingerprint(folder)


def test_weights_that_are_never_taken_over_are_found_with_the_first_that_learned(
    tmp_path: Path,
) -> None:
    """At the start they are the trainer's own: the proof that holds then was the only one for fifty
    steps."""
    result = train(short(tmp_path / "run"), backend=Unmoved())
    assert (result.status, result.step) == ("stopped", 1)
    assert [(one.stage, one.name) for one in result.findings] == [
        ("policy", "the engine has the trainer's weights")
    ]


class Stale(TransformersBackend):
    """Keeps the weights that it had first."""

    def load(self, folder: Path) -> str:
        if self._policy is None:
            self.first = super().load(folder)
        return self.first


def test_weights_that_stay_behind_are_never_sampled_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="fingerprint"):
        run(tmp_path / "run", Stale())
    assert [line["step"] for line in log(tmp_path / "run")] == [0]


class Deaf(TransformersBackend):
    """Reads every prompt as if there were no sound in it."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        silent = [
            replace(one, media=replace(one.media, audios=tuple(
                replace(audio, samples=audio.samples * 0) for audio in one.media.audios
            )))
            for one in requests
        ]  # fmt: skip
        return super().generate(silent, sampling)


def test_a_run_stops_before_its_first_step_with_a_trace(tmp_path: Path) -> None:
    """Ids are equal, so only the logprobs and what moves them tell."""
    config: TrainConfig = short(tmp_path / "run")
    result = train(config, backend=Deaf())
    assert (result.status, result.step) == ("stopped", 0)
    assert [(one.stage, one.name) for one in result.findings] == [
        ("media", "audio reaches the engine")
    ]
    assert result.bundle is not None
    trace = load_trace(result.bundle)
    assert [record.stage for record in trace.stages if not record.ok] == ["media"]
    assert not (tmp_path / "run" / "log.jsonl").exists()
