"""A run that the proof of agreement stopped leaves a trace, and the doctor says of it what the run
said: the same stage and cause, and row by row what was seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from omni_grpo_core.doctor.registry import CAUSES
from omni_grpo_core.faults.boundary import BOUNDARY, CONFIG, BoundaryFault
from omni_grpo_core.faults.boundary_trial import stopped_run
from omni_grpo_core.pipeline.hints import BY_ENGINE
from omni_grpo_core.trace.store import save_trace
from omni_grpo_core.training.guard import Finding, save_bundle
from omni_grpo_core.training.loop import TrainResult
from omni_grpo_core.types import StageRecord, Trace

RunCli = Callable[..., tuple[int, str, str]]
# the others take a second or two each
QUICK = "engine.expanded-twice"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stopped")


def stopped(fault: BoundaryFault, folder: Path) -> TrainResult:
    return stopped_run([fault], replace(CONFIG, **fault.needs), folder / fault.id)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(one, id=one.id, marks=() if one.id == QUICK else pytest.mark.slow)
        for one in BOUNDARY
    ],
)
def test_the_doctor_says_what_the_proof_said(
    fault: BoundaryFault, folder: Path, run_cli: RunCli
) -> None:
    result = stopped(fault, folder)
    assert (result.status, result.step) == ("stopped", 0)
    assert not (folder / fault.id / "run" / "log.jsonl").exists(), "no step was taken"
    assert result.bundle is not None
    page = folder / f"{fault.id}.html"
    code, out, _ = run_cli("doctor", result.bundle, "--json", "--html", page)
    found = json.loads(out)
    assert (code, found["exit"]) == (1, 1)
    assert found["headline"]["stage"] == result.findings[0].stage == fault.stage
    (finding,) = found["findings"]
    names = [one.name for one in result.findings]
    assert {one["fact"] for one in finding["evidence"]} == {*names} == {*fault.found}
    assert found["headline"]["sentence"].startswith(f"the check {names[0]!r} fails: ")
    assert {one["cause"] for one in finding["causes"]} <= {fault.id, *fault.also}
    # what nothing reproduces is left over, and is not called proved
    assert all(one["proved"] == (fault.id != "engine.weights-stale") for one in finding["causes"])
    rows = [one for one in finding["evidence"] if one["row"] is not None]
    assert rows
    for one in rows:
        assert one["values"]["sample"] in one["sentence"]
        assert one["values"].keys() & {"ids", "trainer", "rank"}, one
    assert names[0] in page.read_text(encoding="utf-8").replace("&#39;", "'")


def test_terminal_and_page_show_both_sides_of_a_row(folder: Path, run_cli: RunCli) -> None:
    bundle = folder / QUICK / "run" / "stopped" / "step-000000"
    if not bundle.exists():  # this test alone
        stopped(next(one for one in BOUNDARY if one.id == QUICK), folder)
    page = folder / "page.html"
    code, out, _ = run_cli("doctor", bundle, "--html", page)
    assert code == 1
    words = " ".join(out.replace("│", " ").split())
    # 8 video and 26 audio placeholders, each run with its first expanded again: 2 x 8 - 1
    assert "the engine reads 15 video, 26 audio, the trainer 8 video, 26 audio" in words
    assert "engine.expanded-twice (proved)" in words
    assert "send it the rendered text" in words
    assert "nothing replayed" not in words
    html = page.read_text(encoding="utf-8")
    assert "row 0, rows.json:1, as the trainer reads it: 145 tokens, 8 video, 26 audio" in html
    assert "row 0, rows.json:1, as the engine reads it: 152 tokens, 15 video, 26 audio" in html


def test_every_check_of_the_proof_has_a_cause_and_says_why_it_matters() -> None:
    for (stage, name), advice in BY_ENGINE.items():
        assert all(advice.partition(": ")), (stage, name)
    assert all({one.id, *one.also} & CAUSES for one in BOUNDARY)


def test_findings_of_the_guard_are_read_though_nothing_of_their_stage_was_kept(
    tmp_path: Path, run_cli: RunCli
) -> None:
    """The trace of a stopped step has no logits: what was found there was lost."""
    findings = [
        Finding("sampling and scoring disagree", "logits", "0.5 nats"),
        Finding("not a number", "gradient", "gradient is inf"),
    ]
    trace = Trace({}, (StageRecord("reward", {}, (), 0.0),))
    places = [save_bundle(tmp_path / "step-000003", trace, 3, findings) for _ in range(2)]
    assert [place.name for place in places] == ["step-000003", "step-000003-2"]
    code, out, _ = run_cli("doctor", places[1])
    words = " ".join(out.replace("│", " ").split())
    assert code == 1
    assert (
        "the check 'sampling and scoring disagree' fails: 0.5 nats; the cause is unknown" in words
    )
    assert "then gradient" in words
    assert "sampling and scoring differ in temperature" in words  # what to do about this one


def test_a_trace_that_checked_nothing_is_no_verdict(tmp_path: Path, run_cli: RunCli) -> None:
    save_trace(Trace({}, (StageRecord("reward", {}, (), 0.0),)), tmp_path / "step")
    code, _, error = run_cli("doctor", tmp_path / "step")
    assert code == 2
    assert "the trace of a run that was stopped" in error
