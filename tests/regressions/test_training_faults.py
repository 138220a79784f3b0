"""Faults of the catalogue injected into a training run on the shipped checkpoint: the guard stops
it at step 0, before a token is sampled, and its first finding is the broken stage and why.
"""

from __future__ import annotations

import json
import re
import shlex
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from omni_grpo_core import tiny
from omni_grpo_core.pipeline import inputs, stages
from omni_grpo_core.pipeline.ablation import blanked
from omni_grpo_core.pipeline.settings import load_settings
from omni_grpo_core.trace.store import load_trace
from omni_grpo_core.training.config import GuardConfig, RewardEntry, TrainConfig
from omni_grpo_core.training.guard import Finding
from omni_grpo_core.training.loop import TrainResult, train
from omni_grpo_core.types import AUDIO_SAMPLING_RATE, Batch, Embeddings, Row, Stage


def config(out: Path) -> TrainConfig:
    """One step of two groups of two, with the checkpoint's settings and the guard's defaults."""
    settings = replace(load_settings(tiny.checkpoint_dir()), group_size=2, max_new_tokens=56)
    return TrainConfig(
        checkpoint=str(tiny.checkpoint_dir()),
        data=str(tiny.data_file()),
        out=str(out),
        settings=settings,
        rewards={"accuracy": RewardEntry(), "format": RewardEntry()},
        steps=1,
        batch_size=4,
        micro_batch_size=4,
        guard=GuardConfig(),
        trackers=(),
    )


# --------------------------------------------------------------------------- the faults


def silent(load: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given, **options: blanked(load(*given, **options), "audio")


def blank(load: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given, **options: blanked(blanked(load(*given, **options), "video"), "image")


def no_generation_prompt(render: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*given: Any) -> Any:
        prompt = render(*given)
        return replace(prompt, text=prompt.text.removesuffix("<|im_start|>assistant\n"))

    return wrong


def padded_right(collate: Callable[..., Batch]) -> Callable[..., Batch]:
    def wrong(rows: Sequence[Row], pad_token_id: int) -> Batch:
        batch = collate(rows, pad_token_id)
        return replace(
            batch,
            input_ids=_each_rolled(batch.input_ids, batch.pads),
            attention_mask=_each_rolled(batch.attention_mask, batch.pads),
        )

    return wrong


def _each_rolled(rows: torch.Tensor, pads: Sequence[int]) -> torch.Tensor:
    return torch.stack([row.roll(-pad) for row, pad in zip(rows, pads, strict=True)])


def rate_ignored(process: Callable[..., Row]) -> Callable[..., Row]:
    """The processor's default of 2 frames per second, whatever was sampled."""

    def wrong(*given: Any, **options: Any) -> Row:
        row = process(*given, **options)
        tensors = dict(row.tensors)
        if "video_second_per_grid" in tensors:
            tensors["video_second_per_grid"] = torch.ones_like(tensors["video_second_per_grid"])
        return replace(row, tensors=tensors)

    return wrong


def not_injected(embed: Callable[..., Embeddings]) -> Callable[..., Embeddings]:
    def wrong(policy: Any, batch: Batch) -> Embeddings:
        made = embed(policy, batch)
        return replace(made, inputs_embeds=policy.model.get_input_embeddings()(batch.input_ids))

    return wrong


@dataclass(frozen=True)
class Fault:
    """``broken(step)`` replaces ``step`` wherever the pipeline calls it."""

    step: str
    broken: Callable[[Callable[..., Any]], Callable[..., Any]]
    stage: Stage
    finding: str
    cause: str


FAULTS = {
    "media.silent": Fault(
        "load_media", silent, "media", "sounds not silent", "2 silent.*every sound is silent"
    ),
    "media.blank": Fault(
        "load_media",
        blank,
        "media",
        "pictures not blank",
        "2 blank.*every picture is a single colour",
    ),
    "text.no-generation-prompt": Fault(
        "render", no_generation_prompt, "text", "generation prompt", "add_generation_prompt"
    ),
    "batch.right-padding": Fault(
        "collate", padded_right, "batch", "left padding", "padded on the right"
    ),
    "media.fps-ignored": Fault(
        "process_row", rate_ignored, "batch", "sampled frame rate passed on", "frame rate"
    ),
    "embed.not-injected": Fault(
        "embed", not_injected, "embeddings", "placeholders hold tower features", "never sees"
    ),
}


def assert_stopped(result: TrainResult, out: Path) -> None:
    assert (result.status, result.step) == ("stopped", 0)
    assert result.bundle is not None
    report = json.loads((result.bundle / "report.json").read_text())
    assert [Finding(**finding) for finding in report["findings"]] == list(result.findings)
    assert not (out / "log.jsonl").exists(), "no step was taken"
    assert not (out / "model").exists()


def test_without_a_fault_nothing_is_found(tmp_path: Path) -> None:
    assert train(config(tmp_path / "run")).status == "finished"


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_it_is_stopped_at_step_0_and_named(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (inputs, stages):
        if (right := getattr(module, fault.step, None)) is not None:
            monkeypatch.setattr(module, fault.step, fault.broken(right))
    sampled: list[object] = []
    monkeypatch.setattr(
        "omni_grpo_core.training.run.rollout", lambda *given, **options: sampled.append(given)
    )
    out = tmp_path / "run"
    result = train(config(out))
    assert_stopped(result, out)
    assert sampled == [], "nothing is sampled from a pipeline that is known to be broken"
    assert {finding.stage for finding in result.findings[:1]} == {fault.stage}
    named = next(finding for finding in result.findings if finding.name == fault.finding)
    assert named.stage == fault.stage
    assert re.search(fault.cause, named.detail), named.detail
    assert result.bundle is not None
    kept = load_trace(result.bundle)
    assert fault.finding in {check.name for check in kept[fault.stage].checks if not check.ok}


# --------------------------------------------------------------------------- by the command


def silent_recordings(folder: Path) -> Path:
    """Two questions on recordings of one second of digital silence."""
    rows = []
    for name in ("a.wav", "b.wav"):
        with wave.open(str(folder / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(AUDIO_SAMPLING_RATE)
            file.writeframes(bytes(2 * AUDIO_SAMPLING_RATE))
        rows.append(
            {
                "problem": f"How high is the tone of {name}?",
                "problem_type": "multiple choice",
                "options": ["A. low", "B. high"],
                "solution": "<answer>A</answer>",
                "data_type": "audio",
                "path": name,
            }
        )
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def test_silent_files_stop_the_command_with_exit_code_1_and_the_reason(
    tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    settings = {"group_size": 2, "max_new_tokens": 56}
    run = {
        "checkpoint": str(tiny.checkpoint_dir()),
        "data": str(silent_recordings(tmp_path)),
        "out": "run",
        "rewards": {"accuracy": {}, "format": {}},
        "settings": settings,
        "scale": "none",
        "batch_size": 4,
        "micro_batch_size": 4,
        "trackers": [],
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    code, out, err = run_cli("train", path, "--json")
    assert code == 1
    result = json.loads(out)
    assert (result["status"], result["step"]) == ("stopped", 0)
    assert result["findings"][0]["name"] == "sounds not silent"
    assert "stopped at step 0: media: sounds not silent: 2 silent; every sound is silent" in err
    assert f"trace and report: {result['bundle']}" in err
    assert (Path(result["bundle"]) / "report.json").is_file()
    # the command that it names shows the same
    command = f"omni-grpo doctor {shlex.quote(result['bundle'])}"
    assert command in err
    code, out, _ = run_cli(*shlex.split(command)[1:], "--json")
    assert code == 1
    headline = json.loads(out)["headline"]
    assert headline["stage"] == "media"
    assert "the check 'sounds not silent' fails: 2 silent" in headline["sentence"]
