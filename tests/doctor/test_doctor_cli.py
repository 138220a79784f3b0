"""``omni-grpo doctor``: exit codes, JSON and text, on hand-written recordings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from doctor_recordings import processed, steps_with
from small_recordings import rewarded

from omni_grpo_core.doctor.diagnose import diagnose
from omni_grpo_core.doctor.evidence import Case, Evidence, Look
from omni_grpo_core.trace.calls import Call, TemplateCall
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
    assert report["headline"]["sentence"] == "healthy: nothing is wrong in 1 stage"
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


def words(out: str) -> str:
    return " ".join(out.replace("│", " ").split())


def save(folder: Path, *values: Call, **header: str) -> Path:
    records = tuple(StageRecord(value.stage, value, (), 0.0) for value in values)
    save_trace(Trace(header, records), folder / "step-000000")
    return folder


def test_a_run_that_raised_says_so_first(tmp_path: Path, run_cli: RunCli) -> None:
    error = "ValueError: no grids"
    call = processed("How many?", error=error)
    code, out, _ = run_cli("doctor", save(tmp_path / "run", call, raised=error))
    assert code == 1
    verdict = words(out[out.index("BROKEN") :])
    assert f"raised the run raised {error}, in stage batch" in verdict
    assert "HEALTHY" not in out


def test_an_empty_trace_is_never_healthy(tmp_path: Path, run_cli: RunCli) -> None:
    """Only the exception was recorded; and nothing at all."""
    code, out, _ = run_cli("doctor", save(tmp_path / "dead", raised="OSError: no GPU"))
    assert code == 1
    assert "the run raised OSError: no GPU, before anything was called" in words(out)
    assert "HEALTHY" not in out
    code, out, err = run_cli("doctor", save(tmp_path / "empty"))
    assert code == 2
    assert "a step without any call" in err
    assert "HEALTHY" not in out


def looking_with(monkeypatch: pytest.MonkeyPatch, *looks: Look) -> None:
    monkeypatch.setattr(f"{diagnose.__module__}.diagnose", partial(diagnose, looks=looks))


def test_where_every_look_fails_nothing_is_judged(
    tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was HEALTHY: a look that fails finds nothing."""

    def failing(case: Case) -> Iterator[Evidence]:
        raise IndexError("no row 7")

    looking_with(monkeypatch, failing)
    folder = save(tmp_path / "run", template(HEALTHY).value)
    code, out, err = run_cli("doctor", folder)
    assert code == 2
    assert "nothing could be judged: failing failed on this recording (IndexError: no row 7)" in err
    assert "HEALTHY" not in out


def test_all_rewards_zero_without_a_cause_is_the_verdict(tmp_path: Path, run_cli: RunCli) -> None:
    folder = save(tmp_path / "run", template(HEALTHY).value, rewarded((0.0,) * 4, name="accuracy"))
    code, out, _ = run_cli("doctor", folder)
    assert code == 1
    assert "all rewards are 0: accuracy, for each of 4 completions" in words(out)
    assert "because nothing seen explains it" in words(out)
    assert "HEALTHY" not in out
    code, out, _ = run_cli("doctor", folder, "--allow", "symptom/rewards-zero")
    assert code == 0
    # the function is known to pay for something: the policy may not be good enough yet
    golds = {"gold": {"alone": 1.0}, "empty": {"alone": 0.0}}
    call = rewarded((0.0,) * 4, name="accuracy", probe=golds)
    folder = save(tmp_path / "run2", template(HEALTHY).value, call)
    code, out, _ = run_cli("doctor", folder)
    assert code == 0
    assert "? NOTHING LEARNED" in out
    assert "HEALTHY" not in out
    code, out, _ = run_cli("doctor", folder, "--json")
    assert (code, json.loads(out)["healthy"]) == (0, False)


def test_a_family_without_a_reference_is_judged_by_all_that_needs_none(
    recording: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    """It was exit 2, found model_type 'qwen2_5_vl', for every healthy VLM-R1 and TRL run."""
    model = tmp_path / "vl"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    call = processed("How many?")
    save(tmp_path / "run2", template(HEALTHY).value, call, checkpoint=str(model))
    for given in ((), ("--checkpoint", model)):
        code, out, _ = run_cli("doctor", tmp_path / "run2", "--json", *given)
        report = json.loads(out)
        assert code == 0
        assert report["coverage"]["text"] == {"state": "sound"}
        assert report["coverage"]["batch"]["state"] == "unjudged"
        assert "no reference: " in report["coverage"]["batch"]["why"]
        assert "qwen2_5_vl" in report["coverage"]["batch"]["why"]


def test_what_is_allowed_does_not_count_and_is_shown(broken: Path, run_cli: RunCli) -> None:
    allow = ("--allow", "conv.media-twice", "--allow", "gen.no-eos")
    code, out, _ = run_cli("doctor", broken, *allow)
    assert code == 1, "the other finding is still there"
    assert "conv.media-twice (conversation): --allow" in words(out)
    assert "allowed, but not found gen.no-eos" in words(out)
    assert "✗ conversation" not in out
    code, out, _ = run_cli(
        "doctor", broken, *allow, "--allow", "pos.flag-scoring", "--no-causes", "--json"
    )
    report = json.loads(out)
    assert code == 0
    assert {one["cause"] for one in report["allowed"]} == {"conv.media-twice", "pos.flag-scoring"}
    assert [one["cause"] for one in report["unused"]] == ["gen.no-eos"]


def test_a_cause_that_does_not_exist_is_exit_2_with_the_nearest(
    recording: Path, run_cli: RunCli
) -> None:
    code, _, err = run_cli("doctor", recording, "--allow", "gen.topkk")
    assert code == 2
    assert "gen.topk" in err


def test_strict_makes_another_recipe_an_error(
    recording: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differing(case: Case) -> Iterator[Evidence]:
        yield Evidence("completion", "truncated-sampling", "top_k=50", severity="differs")

    looking_with(monkeypatch, differing)
    code, out, _ = run_cli("doctor", recording)
    assert code == 0
    assert "! completion: recipe differs" in words(out)
    assert "✓ HEALTHY" in out
    assert run_cli("doctor", recording, "--strict")[0] == 1


def test_a_missing_checkpoint_is_exit_2(broken: Path, run_cli: RunCli) -> None:
    code, _, err = run_cli("doctor", broken, "--checkpoint", broken)
    assert code == 2
    assert "config.json" in err
