"""``omni-grpo doctor``: exit codes, JSON and words, on recordings written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from omni_grpo_core.observed import TemplateCall
from omni_grpo_core.trace.store import save_trace
from omni_grpo_core.types import Sample, StageRecord, Trace

RunCli = Callable[..., tuple[int, str, str]]
HEALTHY = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"


def template(text: str) -> StageRecord:
    messages = ({"role": "user", "content": "How many?"},)
    call = TemplateCall(messages, {"add_generation_prompt": True}, (text,), False)
    return StageRecord("text", call, (), 0.0)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    save_trace(Trace({}, (template(HEALTHY),)), tmp_path / "run" / "step-000000")
    return tmp_path / "run"


def test_a_healthy_recording_is_exit_0(recording: Path, run_cli: RunCli) -> None:
    code, out, _ = run_cli("doctor", recording, "--json")
    told = json.loads(out)
    assert code == 0
    assert told["healthy"] is True
    assert told["first"] is None
    assert told["steps"] == 1
    assert told["seen"] == ["conversation", "text"]


def test_one_step_alone_can_be_read(recording: Path, run_cli: RunCli) -> None:
    code, out, _ = run_cli("doctor", recording / "step-000000")
    assert code == 0
    assert "HEALTHY" in out


def test_ranks_are_read_each(recording: Path, run_cli: RunCli) -> None:
    for rank in ("rank-0", "rank-1"):
        save_trace(Trace({}, (template(HEALTHY),)), recording / "many" / rank / "step-000000")
    code, out, _ = run_cli("doctor", recording / "many", "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 2


@pytest.mark.parametrize("what", ["nothing", "empty", "cut", "altered", "foreign", "good path"])
def test_what_is_no_recording_is_exit_2_and_says_what_is_wrong(
    what: str, recording: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    step = recording / "step-000000"
    wanted = {
        "nothing": "no such folder",
        "empty": "a folder without any",
        "cut": "JSON",
        "altered": "checksum",
        "foreign": "JSON of something else",
        "good path": "omni-grpo check",
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
