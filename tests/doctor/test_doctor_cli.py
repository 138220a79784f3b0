"""``omni-grpo doctor``: exit codes, JSON and text, on hand-written recordings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from doctor_recordings import steps_with

from omni_grpo_core.trace.calls import TemplateCall
from omni_grpo_core.trace.store import save_trace
from omni_grpo_core.types import Sample, StageRecord, Trace

RunCli = Callable[..., tuple[int, str, str]]
HEALTHY = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"


def template(text: str) -> StageRecord[TemplateCall]:
    messages = ({"role": "user", "content": "How many?"},)
    call = TemplateCall(messages, {"add_generation_prompt": True}, (text,), False)
    return StageRecord("text", call, (), 0.0)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    save_trace(Trace({}, (template(HEALTHY),)), tmp_path / "run" / "step-000000")
    return tmp_path / "run"


def test_a_healthy_recording_is_exit_0(recording: Path, run_cli: RunCli) -> None:
    code, out, _ = run_cli("doctor", recording, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["healthy"] is True
    assert report["exit"] == 0
    assert report["headline"] is None
    assert report["steps"] == 1
    assert report["coverage"]["text"] == {"state": "sound"}
    assert report["coverage"]["gradient"] == {
        "state": "unseen",
        "why": "no optimizer step was recorded",
    }


def test_one_step_alone_can_be_read(recording: Path, run_cli: RunCli) -> None:
    code, out, _ = run_cli("doctor", recording / "step-000000")
    assert code == 0
    assert "HEALTHY" in out


def test_every_rank_is_read(recording: Path, run_cli: RunCli) -> None:
    for rank in ("rank-0", "rank-1"):
        save_trace(Trace({}, (template(HEALTHY),)), recording / "many" / rank / "step-000000")
    code, out, _ = run_cli("doctor", recording / "many", "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 2


@pytest.mark.parametrize("what", ["nothing", "empty", "cut", "altered", "foreign", "check trace"])
def test_anything_but_a_recording_is_exit_2_with_the_reason(
    what: str, recording: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    step = recording / "step-000000"
    wanted = {
        "nothing": "no such folder",
        "empty": "a folder without any",
        "cut": "JSON",
        "altered": "checksum",
        "foreign": "JSON that is not a trace",
        "check trace": "omni-grpo check",
    }[what]
    text = (step / "trace.json").read_text()
    target = recording
    if what == "nothing":
        target = tmp_path / "nowhere"
    elif what == "empty":
        target = tmp_path / "empty"
        target.mkdir()
    elif what == "cut":
        (step / "trace.json").write_text(text[: len(text) // 2])
    elif what == "altered":
        (step / "trace.json").write_text(text.replace("How many?", "How much?"))
    elif what == "foreign":
        (step / "trace.json").write_text('{"model": "gpt2"}')
    else:
        sample = Sample("a", "q", "judge", (), "<answer>Yes</answer>", (), "rows.json:1")
        target = tmp_path / "check"
        save_trace(Trace({}, (StageRecord("sample", (sample,), (), 0.0),)), target)
    code, out, err = run_cli("doctor", target, "--json")
    assert code == 2
    assert wanted in err
    assert json.loads(out)["error"]["stage"] == "trace"


def test_without_a_recording_it_says_what_to_type(run_cli: RunCli) -> None:
    code, _, err = run_cli("doctor")
    assert code == 2
    assert "omni-grpo doctor TRACE" in err


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A step of the clean loop with two faults."""
    (step,) = steps_with("conv.media-twice", "pos.flag-scoring")
    save_trace(step.trace, tmp_path / "broken" / "step-000000")
    return tmp_path / "broken"


def test_a_broken_recording_is_exit_1_and_says_what_to_change(
    broken: Path, run_cli: RunCli
) -> None:
    code, out, _ = run_cli("doctor", broken)
    words = " ".join(out.replace("│", " ").split())
    assert code == 1
    assert "✗ conversation" in words
    assert "✗ positions" in words
    assert "✓ text" in words
    assert "2 sounds for 1 track" in words
    assert "drop one" in words
    assert "pass use_audio_in_video to the scoring forward" in words
    assert "BROKEN" in words


def test_without_causes_json_still_names_the_stages(broken: Path, run_cli: RunCli) -> None:
    code, out, _ = run_cli("doctor", broken, "--json", "--no-causes")
    report = json.loads(out)
    assert code == 1
    assert report["headline"]["stage"] == "positions", "sampling and scoring disagree"
    assert [finding["stage"] for finding in report["findings"]] == ["conversation", "positions"]
    assert all(finding["causes"] == [] for finding in report["findings"])
    code, out, _ = run_cli("doctor", broken, "--json")
    causes = [finding["causes"][0]["cause"] for finding in json.loads(out)["findings"]]
    assert causes == ["conv.media-twice", "pos.flag-scoring"]


def test_a_missing_checkpoint_is_exit_2(broken: Path, run_cli: RunCli) -> None:
    code, _, err = run_cli("doctor", broken, "--checkpoint", broken)
    assert code == 2
    assert "config.json" in err
