"""``golden init``: what it refuses, what it makes, and that its suite can be used from then on."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_project import contents, git
from rich.console import Console
from safetensors.torch import load_file, save_file

from omni_grpo_core import tiny
from omni_grpo_core.errors import ConfigError, TraceError
from omni_grpo_core.golden.new_suite import NewCase, Sources, suite_text
from omni_grpo_core.golden.review import accept
from omni_grpo_core.golden.starting import Approval, Plan, plan_suite, start_suite
from omni_grpo_core.golden.suite import Suite, load_suite
from omni_grpo_core.golden.text import read_text
from omni_grpo_core.report.terminal.started import print_started

Run = Callable[..., tuple[int, str, str]]
CASE = NewCase("text-judge-short", (0,), "text, judge, short", "the only one, ≈ 90 tokens")
ASKED = ("--data", tiny.data_file(), "--checkpoint", tiny.checkpoint_dir())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, not under git."""
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def written(folder: Path, sources: Sources, base: str = "cpu-fp32") -> Suite:
    """A suite.yaml in the folder, read back."""
    folder.mkdir(parents=True)
    text = suite_text(folder, sources, base, [CASE])
    (folder / "suite.yaml").write_text(text, encoding="utf-8")
    return load_suite(folder)


# --------------------------------------------------------------------------- suite.yaml


@pytest.mark.parametrize(
    "name",
    [
        "rows.json", "a b.json", "it's \"quoted\" #1: x.json", "two\nlines.json", "tab\t.json",
        "ü – 行🙂.json", "- [x", "true", "null", "1e5", "~", "&a", "*b", "!c", "%d",
        "@e", "{f", "?", "# g", "h: i", "shipped",
    ],
)  # fmt: skip
def test_a_path_of_any_name_is_read_back(name: str, tmp_path: Path) -> None:
    there = tmp_path / "elsewhere" / name
    sources = Sources(there, there, root=there, processor=there)
    suite = written(tmp_path / "golden", sources)
    for value in (suite.data, suite.checkpoint, suite.root, suite.processor):
        assert os.path.normpath(suite.path(str(value))) == str(there)
    assert suite.cases["text-judge-short"].rows == (0,)


def test_a_path_that_no_yaml_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not UTF-8"):
        Sources(tmp_path / "\udcff.json", tmp_path)


def test_what_is_not_given_stands_there_as_a_comment(tmp_path: Path) -> None:
    suite = written(tmp_path / "golden", Sources(tmp_path / "rows.json", tmp_path / "model"))
    assert (suite.root, suite.processor, suite.device, suite.dtype) == (None, None, "cpu", None)
    asked = Sources(tmp_path / "a", tmp_path / "b", device="cuda", dtype="float32")
    suite = written(tmp_path / "other", asked, base="cuda-sm90-fp32")
    assert (suite.device, suite.dtype, suite.base) == ("cuda", "float32", "cuda-sm90-fp32")


def test_settings_go_into_the_suite(tmp_path: Path) -> None:
    """A model that has not learnt the answer's tags yet passes no check without them."""
    (tmp_path / "mine.yaml").write_text("{min_format: 0, media: {max_pixels: 7056, fps: 4.0}}")
    sources = Sources(tmp_path / "rows.json", tmp_path / "model", config=tmp_path / "mine.yaml")
    suite = written(tmp_path / "golden", sources)
    assert suite.settings == {"min_format": 0, "media": {"max_pixels": 7056, "fps": 4.0}}


def test_a_link_to_a_model_stays_a_link(tmp_path: Path) -> None:
    """Models are kept under links that are moved to the next version."""
    (tmp_path / "model-1").mkdir()
    (tmp_path / "model").symlink_to("model-1")
    suite = written(tmp_path / "golden", Sources(tmp_path / "rows.json", tmp_path / "model"))
    assert suite.checkpoint == "../model"


def test_paths_hold_where_the_golden_folder_is_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "near").symlink_to("far/away")
    (tmp_path / "rows.json").touch()
    suite = written(tmp_path / "near" / "golden", Sources(tmp_path / "rows.json", tmp_path))
    assert suite.path(suite.data).samefile(tmp_path / "rows.json")


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--accept"], "--reason"),
        (["--accept", "--reason", "ok"], "--reason"),
        (["--accept", "--reason", "first"], "git init"),
        (["--reason", "first"], "no --accept"),
        (["--no-git"], "no --accept"),
        (["--html", "nowhere/page.html"], "nowhere"),
        (["--html", "golden"], "the path of another output"),
        (["--data", "gone.json"], "gone.json"),
        (["--checkpoint", "gone"], "gone"),
        (["--root", "gone"], "gone"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    options: Sequence[str], said: str, here: Path, run_cli: Run
) -> None:
    code, out, err = run_cli("golden", "init", "golden", *ASKED, *options)
    assert (code, out) == (2, "")
    assert said in err
    assert list(here.iterdir()) == []


def test_a_folder_that_holds_anything_is_left_alone(here: Path, run_cli: Run) -> None:
    (here / "golden" / "clip").mkdir(parents=True)
    (here / "golden" / "clip" / "text.txt").write_text("a golden")
    code, _, err = run_cli("golden", "init", "golden", *ASKED)
    assert code == 2
    assert "a folder that is not empty" in err
    assert contents(here) == {"golden/clip/text.txt": b"a golden"}


def test_changes_that_are_not_committed_are_refused_only_with_accept(
    here: Path, run_cli: Run
) -> None:
    (here / "code.py").write_text("x = 1\n")
    git(here, "init", "-q")
    git(here, "add", ".")
    git(here, "commit", "-q", "-m", "start")
    (here / "code.py").write_text("x = 2\n")
    code, _, err = run_cli("golden", "init", "golden", *ASKED, "--accept", "--reason", "first")
    assert code == 2
    assert "a tree that is dirty" in err


def test_a_checkpoint_without_a_suite_no_longer_means_the_shipped_cases(
    here: Path, run_cli: Run
) -> None:
    """In an empty folder ``golden regen --checkpoint MINE`` silently made goldens of the shipped
    clips on somebody's own model."""
    (here / "golden").mkdir()
    code, _, err = run_cli("golden", "regen", "--checkpoint", tiny.checkpoint_dir())
    assert code == 2
    assert "omni-grpo golden init" in err
    assert list((here / "golden").iterdir()) == []


# --------------------------------------------------------------------------- a suite


def test_a_suite_is_made_and_shown_and_its_goldens_wait(here: Path, run_cli: Run) -> None:
    rows = json.loads(tiny.data_file().read_text())
    (here / "rows.json").write_text(json.dumps([rows[20], rows[16]]))
    git(here, "init", "-q")
    (here / "golden").mkdir()  # an empty one may be there
    asked = ("--data", "rows.json", "--root", tiny.data_file().parent)
    code, out, err = run_cli(
        *("golden", "init", "golden", "--checkpoint", tiny.checkpoint_dir(), *asked),
        *("--cases", 1, "--html", "page.html", "--json"),
    )
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert (told["folder"], told["written"], told["accepted"]) == ("golden", True, False)
    assert told["check"]["verdict"] == "pass"
    assert told["kinds"]["taken"] == ["text-multiple-choice-long"]
    assert told["kinds"]["left_out"] == ["image-multiple-choice-short"]
    files = {name: len(data) for name, data in contents(here / "golden").items()}
    del files["suite.yaml"]
    listed = {Path(file): case["bytes"] for case in told["cases"] for file in case["files"]}
    assert {*map(str, listed)} == {f"golden/{name}" for name in files}
    assert {*listed.values()} == {told["bytes"]} == {sum(files.values())}
    assert all(name.startswith(".pending/") for name in files)
    # nothing tells of the folder in which they were made, and it is no change of the tree
    assert ".partial" not in out
    for file in listed:
        assert ".partial" not in read_text(file)
        assert 'tree: "under git without a commit"' in read_text(file)
    page = (here / "page.html").read_text()
    for case in told["cases"]:
        assert page.count(f">{case['name']}</a>") == 1
        assert case["why"] in page
    assert "The bar is yellow and moves up" in page
    assert "1 kind left out" in page
    code, out, _ = run_cli("golden", "review", "--json")
    found = {case["case"] for case in json.loads(out)["pending"]}
    assert found == {*load_suite(here / "golden").cases}


def broken(folder: Path) -> Path:
    """The shipped checkpoint without its head: it says the same token forever."""
    shutil.copytree(tiny.checkpoint_dir(), folder)
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    weights["lm_head.weight"].zero_()
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("options", [["--json"], pytest.param([], marks=pytest.mark.slow)])
def test_nothing_is_written_for_a_checkpoint_that_fails_its_check(
    options: Sequence[str], here: Path, tmp_path: Path, run_cli: Run
) -> None:
    model = broken(tmp_path / "model")
    asked = ("--data", tiny.data_file(), "--checkpoint", model, "--cases", 1, "--html", "p.html")
    code, out, err = run_cli("golden", "init", "golden", *asked, *options)
    assert (code, err) == (1, "")
    assert "greedy not degenerate" in out
    if options:
        told = json.loads(out)
        assert (told["check"]["verdict"], told["written"]) == ("fail", False)
    assert list(here.iterdir()) == []


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """For one picture, whose file can be taken away."""
    folder = tmp_path_factory.mktemp("rows")
    shutil.copy(tiny.data_file().parent / "clip-12.png", folder)
    rows = json.loads(tiny.data_file().read_text())
    (folder / "rows.json").write_text(json.dumps([rows[16]]))
    return plan_suite(Sources(folder / "rows.json", tiny.checkpoint_dir()), most=1, steps=0)


def test_degenerate_completions_are_marked_and_never_accepted(plan: Plan, tmp_path: Path) -> None:
    """The check sees eight rows; a row that it does not see may be one that the model fails on."""
    model = copy.deepcopy(plan.policy.model)
    torch.nn.init.zeros_(model.lm_head.weight)
    failing = replace(plan, policy=replace(plan.policy, model=model))
    approval = Approval("the first goldens", no_git=True)
    started = start_suite(tmp_path / "golden", failing, approval=approval)
    assert (started.written, started.accepted) == (False, False)
    assert list(tmp_path.iterdir()) == []
    (one,) = started.degenerate
    assert "repeated" in one.degenerate
    shown = io.StringIO()
    print_started(Console(file=shown, width=88), failing, started)
    assert "nothing was written" in shown.getvalue()
    started = start_suite(tmp_path / "golden", failing)
    assert (started.written, len(started.degenerate)) == (True, 1)
    with pytest.raises(ConfigError, match="degenerate"):
        accept(started.folder, (), "the first goldens", load_suite(started.folder), no_git=True)


def test_a_case_in_which_a_stage_fails_is_no_suite(plan: Plan, tmp_path: Path) -> None:
    """Out of memory in the batch of one case: it had goldens of the stages before, and every check
    from then on failed."""
    file = plan.sources.data.parent / "clip-12.png"
    data = file.read_bytes()
    file.write_bytes(data[:100])
    try:
        with pytest.raises(TraceError, match=r"case image-.*, rows \[0\]: media.*clip-12.png"):
            start_suite(tmp_path / "golden", plan)
    finally:
        file.write_bytes(data)
    assert list(tmp_path.iterdir()) == []


def test_an_error_names_the_folder_that_was_asked_for(plan: Plan, tmp_path: Path) -> None:
    """Everything is made in a hidden folder, whose name means nothing to anyone."""
    golden = tmp_path / "golden"
    with pytest.raises(ConfigError, match="not under git") as raised:
        start_suite(golden, plan, approval=Approval("the first goldens"))
    assert str(golden) in str(raised.value)
    assert ".partial" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
