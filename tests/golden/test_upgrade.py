"""An upgrade that is tried first: the verdict, the behaviour, and a run from end to end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from test_beside import NEWER, pack_wheel, wheels

from omni_grpo_core import tiny
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.golden.behaviour import (
    Behaviour,
    ModalityBehaviour,
    behaviour,
    behaviour_changes,
    merged,
)
from omni_grpo_core.golden.bisect import change_of
from omni_grpo_core.golden.calibrate import run_golden
from omni_grpo_core.golden.results import VERDICTS
from omni_grpo_core.golden.suite import load_suite, shipped_goldens
from omni_grpo_core.golden.upgrade import Task, try_upgrade, work_folder
from omni_grpo_core.golden.upgrade_report import UpgradeReport, judge
from omni_grpo_core.io.resumable import Steps
from omni_grpo_core.pipeline.ablation import ModalityProof

__all__ = ["wheels"]  # a fixture

Cli = Callable[..., tuple[int, str, str]]
SEEN = ModalityBehaviour(4, "reaches", 1.0, 0.25, 0.75)
GOOD = Behaviour(8, 1.0, 1.0, 0.0, 0.0, 30.0, {"video": SEEN})


def case(verdict: str, *stages: tuple[str, str, str], name: str = "one") -> dict[str, Any]:
    """``stages``: name, verdict, origin."""
    found = [
        {"stage": stage, "verdict": its, "origin": origin, "golden": f"{name}/{stage}.txt"}
        for stage, its, origin in stages
    ]
    first = next((s["stage"] for s in found if s["origin"] == "added"), None)
    return {"case": name, "verdict": verdict, "first": first, "stages": found, "versions": {}}


def report(*cases: dict[str, Any]) -> dict[str, Any]:
    worst = max((one["verdict"] for one in cases), key=VERDICTS.index)
    first = next((one["first"] for one in cases if one["first"]), None)
    return {"verdict": worst, "first": first, "cases": [*cases]}


DRIFTED = case("benign-drift", ("logits", "benign-drift", "added"))
TURNED = case("harmful", ("batch", "harmful", "added"), ("logits", "harmful", "inherited"))
FINE = case("within", ("logits", "within", "none"))
WORSE = replace(GOOD, accuracy=0.5)
LOST = replace(GOOD, modalities={"video": replace(SEEN, judgement="lost")})


@pytest.mark.parametrize(
    ("cases", "after", "verdict", "why"),
    [
        ([FINE, FINE], GOOD, "safe", "2 cases, all exact or within tolerance"),
        ([case("exact")], GOOD, "safe", "1 case, all exact"),
        ([FINE, DRIFTED], GOOD, "drift", "tolerance in 1 of 2 cases, first in logits"),
        ([DRIFTED, TURNED], GOOD, "harmful", "1 of 2 cases beyond drift (harmful), first in"),
        ([case("schema")], GOOD, "harmful", "1 case beyond drift (schema); accuracy, form"),
        ([case("degenerate")], GOOD, "harmful", "beyond drift (degenerate)"),
        ([FINE], WORSE, "harmful", "but right answers fell from 100.0% to 50.0%"),
        ([DRIFTED], LOST, "harmful", "but video no longer reaches the model"),
        ([FINE], replace(GOOD, degenerate=0.5), "harmful", "degenerate completions rose"),
        ([FINE], replace(GOOD, well_formed=0.5), "harmful", "well-formed completions fell"),
        ([FINE], replace(GOOD, cap_rate=0.5), "harmful", "cut off at the limit rose"),
        # one more token in a completion that is as right as before is what drift does
        ([DRIFTED], replace(GOOD, mean_length=31.0), "drift", "floats moved"),
    ],
)
def test_the_verdict(cases: list[dict[str, Any]], after: Behaviour, verdict: str, why: str) -> None:
    found = judge([change_of("library", report(*cases))], GOOD, after)
    assert found[0] == verdict
    assert why in found[1]


def test_a_suite_that_does_not_run_is_harmful() -> None:
    failed = replace(change_of("library", report(FINE)), failed="exit code 3: ImportError: x")
    assert judge([failed], GOOD, None) == (
        "harmful",
        "the suite does not run: exit code 3: ImportError: x",
    )


@pytest.mark.parametrize(
    ("cases", "after", "verdict", "why"),
    [
        ([FINE], GOOD, "safe", "1 case, all exact or within tolerance; accuracy, form and"),
        (
            [TURNED],
            GOOD,
            "drift",
            "unchanged; different in 1 case (harmful), first in batch",
        ),
        ([case("schema")], GOOD, "drift", "different in 1 case (schema)"),
        (
            [TURNED],
            WORSE,
            "harmful",
            "right answers fell from 100.0% to 50.0%; different in 1 case",
        ),
        ([TURNED], LOST, "harmful", "video no longer reaches the model; "),
        ([FINE, case("degenerate")], GOOD, "harmful", "different in 1 of 2 cases (degenerate)"),
    ],
)
def test_a_new_checkpoint_is_judged_by_its_behaviour(
    cases: list[dict[str, Any]], after: Behaviour, verdict: str, why: str
) -> None:
    """It is meant to write other completions: a better one was called harmful."""
    found = judge([change_of("checkpoint", report(*cases))], GOOD, after)
    assert found[0] == verdict
    assert why in found[1]
    better = judge([change_of("checkpoint", report(TURNED))], WORSE, GOOD)
    assert better[0] == "drift"
    assert better[1].startswith("right answers rose from 50.0% to 100.0%; ")


def test_libraries_that_do_harm_are_not_excused_by_a_new_checkpoint() -> None:
    both = [change_of(what, report(TURNED)) for what in ("library", "checkpoint", "both")]
    verdict, why = judge(both, GOOD, GOOD)
    assert verdict == "harmful"
    assert "the new libraries alone: 1 case beyond drift (harmful), first in batch" in why
    both[0] = change_of("library", report(FINE))
    assert judge(both, GOOD, GOOD)[0] == "drift"


def test_what_gets_worse_and_what_gets_better() -> None:
    assert behaviour_changes(GOOD, GOOD) == ()
    worse = behaviour_changes(GOOD, replace(LOST, accuracy=0.5))
    assert [(one.sentence, one.worse) for one in worse] == [
        ("right answers fell from 100.0% to 50.0%", True),
        ("video no longer reaches the model", True),
    ]
    assert not any(one.worse for one in behaviour_changes(replace(LOST, accuracy=0.5), GOOD))


def test_a_change_names_what_each_stage_added_or_inherited() -> None:
    """A stage's verdict was that of the last case, not the worst."""
    stage = ("batch", "schema", "added")
    found = change_of("library", report(case("schema", stage), TURNED, DRIFTED))
    assert found.added == {"batch": "schema", "logits": "benign-drift"}
    assert found.inherited == {}
    assert change_of("library", report(TURNED)).inherited == {"logits": "harmful"}


def test_goldens_to_review_are_told_from_those_that_differed_before() -> None:
    missing = case("schema", ("text", "schema", "none"), name="new")
    missing["stages"][0]["golden"] = ""
    before = report(case("harmful", ("text", "harmful", "added"), name="old"), missing, FINE)
    after = report(case("harmful", ("text", "harmful", "added"), name="old"), missing, DRIFTED)
    found = UpgradeReport(
        ("transformers==5",), None, "golden", (), (change_of("library", report(DRIFTED)),),
        before, after, GOOD, GOOD, 7, (),
    )  # fmt: skip
    assert [(one.case, one.first) for one in found.already] == [("old", "text")]
    assert [(one.case, one.already) for one in found.review] == [("old", True), ("one", False)]
    assert found.to_json()["verdict"] == "drift"


def test_a_modality_is_lost_if_any_batch_loses_it() -> None:
    seen = ModalityProof("video", 6, 1.0, 0.5, 0.5, 1.0, shift=1.0)
    lost = ModalityProof("video", 2, 0.0, 0.5, 0.0, 0.0, shift=0.0)
    assert merged([seen, lost]) == ModalityBehaviour(8, "lost", 0.75, 0.5, 0.75)
    dim = replace(lost, shift=1e-9)
    assert (dim.judgement, merged([dim, seen]).judgement) == ("not judged", "reaches")


def test_each_row_counts_once_under_each_of_its_settings(policy: Policy) -> None:
    suite = load_suite(shipped_goldens())
    short = replace(suite.cases["image"], settings={"max_new_tokens": 5})
    suite = replace(suite, cases={**suite.cases, "short": short})
    seen: list[str] = []
    # padded has the rows of the other two
    found = behaviour(policy, suite, ["text", "image", "padded", "short"], seen.append)
    assert seen == ["rows 1 to 2 of 3", "rows 3 to 3 of 3"]
    assert (found.rows, found.accuracy, found.well_formed) == (3, 2 / 3, 2 / 3)
    assert (found.degenerate, found.cap_rate) == (0.0, 1 / 3)
    assert {name: one.judgement for name, one in found.modalities.items()} == {"image": "reaches"}
    assert Behaviour.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_another_process_reports_its_progress_and_its_failure(tmp_path: Path) -> None:
    python = tmp_path / "python"
    script = '#!/bin/sh\necho "$OMNI_GRPO_PROGRESS $5"\necho "$0 one" | sed "s/.*python/P/" >&2\n'
    python.write_text(script + 'echo "OMNI_GRPO_PROGRESS text" >&2\necho "ImportError: no x" >&2\n')
    python.chmod(0o755)
    seen: list[str] = []
    assert run_golden(str(python), ["check", "--json"], {}, seen.append) == "1 --json\n"
    assert seen == ["text"]
    python.write_text(python.read_text() + "exit 3\n")
    with pytest.raises(ConfigError, match=r"exit code 3: P one / ImportError: no x"):
        run_golden(str(python), ["check"], {})


def task(folder: Path, **changes: Any) -> Task:
    return replace(Task((), None, folder, load_suite(folder)), **changes)


def test_other_inputs_are_another_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "golden"
    (folder / "words").mkdir(parents=True)
    golden = folder / "words/text.txt"
    golden.write_text("a golden\n")
    key = task(folder).key()
    assert task(folder).key() == key
    (folder / ".pending").mkdir()
    assert task(folder).key() == key
    heavier = make_heavier(tmp_path / "heavier", 1.001)
    others = {task(folder, checkpoint=heavier).key(), task(folder, cases=("text",)).key()}
    make_heavier(tmp_path / "heavier", 1.01)
    others.add(task(folder, checkpoint=heavier).key())
    golden.write_text("another golden\n")
    others.add(task(folder).key())
    assert len(others | {key}) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert work_folder(key) == tmp_path / "omni-grpo/upgrade" / key


def make_heavier(folder: Path, factor: float) -> Path:
    """The shipped checkpoint with one weight times ``factor``."""
    shutil.copytree(tiny.checkpoint_dir(), folder, dirs_exist_ok=True)
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if n.endswith("layers.1.mlp.down_proj.weight"))
    save_file({**weights, name: weights[name] * factor}, file, metadata={"format": "pt"})
    return folder


def test_what_was_finished_is_not_run_again(tmp_path: Path) -> None:
    """Every result is there: no process is started, and the report is whole."""
    folder = shipped_goldens()
    steps = Steps(tmp_path)
    for name in ("before", "after"):
        steps.step(name, lambda: {"behaviour": GOOD.to_json()})
    steps.step("record", lambda: {"files": []})
    for name in ("stored before", "checkpoint", "stored after"):
        steps.step(name, lambda: report(FINE))
    found = try_upgrade(
        task(folder, checkpoint=tiny.checkpoint_dir(), cases=("text",)),
        Steps(tmp_path),
        lambda done, total, text: None,
    )
    assert (found.verdict, found.steps, len(found.resumed)) == ("safe", 6, 6)


@pytest.mark.parametrize(
    ("words", "got"),
    [
        ([], "nothing to try"),
        (["numpy>1"], "what the present environment already has"),
        (["--checkpoint", "nowhere"], "found no folder"),
        (["--checkpoint", "."], "found no config.json"),
        (["audioread==99", "--case", "none"], "no case of that name"),
        (["audioread=99"], "no requirement"),
    ],
)
def test_bad_usage(
    words: list[str], got: str, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, _, stderr = run_cli("upgrade", *words)
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert got in stderr


def test_without_an_index_nothing_is_left(
    wheels: Path, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, _, stderr = run_cli("upgrade", f"audioread=={NEWER}")
    assert code == 2
    assert f"config: audioread=={NEWER}: found" in stderr
    assert not (tmp_path / "cache/omni-grpo").exists()  # uv has a cache of its own there


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "verdict", "why"),
    [
        ("", "safe", "1 case, all exact or within tolerance"),
        ("raise ImportError('gone')\n", "harmful", "the suite does not run: exit code 2"),
    ],
)
def test_a_library_from_end_to_end(
    code: str, verdict: str, why: str, wheels: Path, run_cli: Cli, tmp_path: Path
) -> None:
    pack_wheel(wheels, code)
    page = tmp_path / "page.html"
    ended, out, stderr = run_cli(
        *("upgrade", f"audioread=={NEWER}", "--case", "text", "--json"),
        *("--html", page, "--work", tmp_path / "work"),
    )
    found = json.loads(out)
    assert (ended, found["verdict"]) == (int(verdict != "safe"), verdict), stderr
    assert why in found["why"]
    assert found["pins"] == [f"audioread=={NEWER}"]
    assert verdict.upper() in page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("after", ["before", "record", "checkpoint"])
def test_killed_after_any_step_it_goes_on(after: str, tmp_path: Path) -> None:
    heavier, work = make_heavier(tmp_path / "heavier", 1.001), tmp_path / "work"
    command = [
        *(sys.executable, "-m", "omni_grpo_core", "upgrade", "--checkpoint", str(heavier)),
        *("--case", "text", "--work", str(work), "--json"),
    ]
    path = os.pathsep.join(filter(None, sys.path))
    environ = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, env=environ, start_new_session=True) as process:
        while not (work / f"{after}.json").is_file():
            assert process.poll() is None
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert (done.returncode, found["verdict"]) == (1, "drift"), done.stderr
    assert after in found["resumed"]
    assert f"resumed: {len(found['resumed'])} of 6 steps were done" in done.stderr
