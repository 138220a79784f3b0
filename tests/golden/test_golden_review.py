"""From a change to its acceptance, and everything that accept refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_project import KEY, contents, doubled, git, make_project, project, template

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import ConfigError, TraceError
from omni_grpo_core.golden.checking import check
from omni_grpo_core.golden.pending import pending_changes, regen
from omni_grpo_core.golden.review import accept, reject, stale
from omni_grpo_core.golden.reviewing import ask
from omni_grpo_core.golden.store import read_golden
from omni_grpo_core.golden.suite import Suite, load_suite
from omni_grpo_core.golden.text import with_header

__all__ = ["project", "template"]  # fixtures

REASON = "head scaled on purpose, see the commit"


@pytest.fixture
def moved(policy: Policy) -> Policy:
    return doubled(policy)


@pytest.fixture(scope="module")
def pending_template(
    template: Path, policy: Policy, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("pending") / "one"
    shutil.copytree(template, folder)
    regen(doubled(policy), load_suite(folder / "golden"), folder / "golden", KEY)
    return folder


@pytest.fixture
def pending(pending_template: Path, tmp_path: Path) -> tuple[Path, Suite]:
    """A fresh project in which the doubled head is pending review."""
    shutil.copytree(pending_template, tmp_path / "project")
    golden = tmp_path / "project" / "golden"
    return golden, load_suite(golden)


def test_from_change_to_acceptance(project: tuple[Path, Suite], moved: Policy) -> None:
    golden, suite = project
    before = contents(golden)
    report = check(moved, suite, golden, KEY, names=["words"])
    assert (report.verdict, report.first) == ("benign-drift", "logits")
    assert contents(golden) == before

    (done,) = regen(moved, suite, golden, KEY, names=["words"])
    names = sorted(path.name for path in done.files)
    assert names == ["completion.txt", "logits.txt", "scoring.txt"]
    after = contents(golden)
    assert {name: after[name] for name in before} == before, "regen overwrote a golden"
    change = pending_changes(golden, suite)["words"]
    assert change.verdict == "benign-drift"
    assert set(change.stages) == set(names)

    accepted = accept(golden, ["words"], REASON, suite)
    assert sorted(one.file.name for one in accepted) == names
    header = read_golden(golden / "words" / "logits.txt").header
    assert header["reason"] == REASON
    assert header["accepted"].endswith("by Ann <ann@example.org>")
    assert header["supersedes"].startswith("sha256 ")
    assert (header["tree"], header["platform"]) == ("clean", KEY)
    assert header["commit"] == git(golden, "rev-parse", "HEAD").strip()
    assert check(moved, suite, golden, KEY, names=["words"]).verdict == "exact"
    assert pending_changes(golden, suite) == {}


def test_nothing_is_pending_on_an_unchanged_tree(
    project: tuple[Path, Suite], policy: Policy
) -> None:
    golden, suite = project
    before = contents(golden)
    assert [one.files for one in regen(policy, suite, golden, KEY, names=["words"])] == [()]
    assert contents(golden) == before


def test_a_later_regen_drops_what_no_longer_differs(
    pending: tuple[Path, Suite], policy: Policy
) -> None:
    golden, suite = pending
    regen(policy, suite, golden, KEY, names=["words"])
    assert set(pending_changes(golden, suite)) == {"other"}


def test_reject_leaves_the_goldens(pending: tuple[Path, Suite]) -> None:
    golden, suite = pending
    before = {name: text for name, text in contents(golden).items() if ".pending" not in name}
    reject(golden, ["words"], suite)
    assert set(pending_changes(golden, suite)) == {"other"}
    reject(golden, ["other"], suite)
    assert contents(golden) == before
    with pytest.raises(ConfigError, match="nothing pending"):
        reject(golden, ["words"], suite)


def test_a_review_asks_case_by_case(pending: tuple[Path, Suite]) -> None:
    golden, suite = pending

    def review(*answers: str) -> tuple[int, list[str]]:
        given, lines = iter(answers), list[str]()
        changes = pending_changes(golden, suite)
        left = ask(changes, golden, suite, prompt=lambda _: next(given), echo=lines.append)
        return left, lines

    left, lines = review("a", REASON, "q")
    assert (left, lines[0]) == (1, "other: benign-drift")
    assert set(pending_changes(golden, suite)) == {"words"}
    assert read_golden(golden / "other" / "logits.txt").header["reason"] == REASON
    assert review("s")[0] == 1
    with pytest.raises(ConfigError, match="why the change is right"):
        review("a", "ok")
    assert review("r")[0] == 0
    assert pending_changes(golden, suite) == {}


def refused(
    project: tuple[Path, Suite], match: str, reason: str = REASON, platform: str | None = None
) -> None:
    """Accept fails with this message, and changes nothing."""
    golden, suite = project
    before = contents(golden)
    with pytest.raises(ConfigError, match=match):
        accept(golden, ["words"], reason, suite, platform=platform)
    assert contents(golden) == before


@pytest.mark.parametrize("reason", ["", "   ", "ok", "\n\t", "yes", "WHY", " why "])
def test_no_reason(pending: tuple[Path, Suite], reason: str) -> None:
    refused(pending, "wanted why the change is right", reason)


def test_a_dirty_tree(pending: tuple[Path, Suite]) -> None:
    (pending[0].parent / "code.py").write_text("x = 2\n")
    refused(pending, "a tree that is dirty")


def test_an_untracked_file(pending: tuple[Path, Suite]) -> None:
    (pending[0].parent / "new.py").write_text("x = 2\n")
    refused(pending, "a tree that is dirty")


def test_made_from_a_dirty_tree(project: tuple[Path, Suite], moved: Policy) -> None:
    code = project[0].parent / "code.py"
    code.write_text("x = 2\n")
    regen(moved, project[1], project[0], KEY, names=["words"])
    code.write_text("x = 1\n")
    refused(project, "a tree that is dirty.*regen again")


def test_no_git(pending: tuple[Path, Suite], monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest's folder may itself be inside a git tree, as under tox
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(pending[0].parents[1]))
    shutil.rmtree(pending[0].parent / ".git")
    refused(pending, "a tree that is not under git.*git init")
    git(pending[0].parent, "init", "-q")
    refused(pending, "a tree that is under git without a commit.*; commit the files")


def test_no_git_on_the_path(
    pending: tuple[Path, Suite], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A missing git was reported as a tree outside git: "commit or undo what is changed"."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    refused(pending, "git was not found.*install git")


def test_not_a_number(project: tuple[Path, Suite], moved: Policy) -> None:
    with torch.no_grad():
        moved.model.lm_head.weight[5, 0] = torch.nan
    (done,) = regen(moved, project[1], project[0], KEY, names=["words"])
    assert done.result.verdict == "degenerate"
    refused(project, "a non-finite value at ")


def test_degenerate(project: tuple[Path, Suite], policy: Policy) -> None:
    endless = replace(policy, eos_token_ids=(policy.pad_token_id,))
    (done,) = regen(endless, project[1], project[0], KEY, names=["words"])
    assert done.result.verdict == "degenerate"
    refused(project, "a degenerate completion")


def test_a_platform_that_regen_did_not_run_on(pending: tuple[Path, Suite]) -> None:
    refused(pending, "pending goldens of cpu-fp32 only", platform="cuda-sm90-bf16")


def test_a_file_renamed_to_another_platform(pending: tuple[Path, Suite]) -> None:
    file = pending[0] / ".pending" / "words" / "logits.txt"
    file.rename(file.with_name("logits@cuda-sm90-bf16.txt"))
    refused(pending, "a golden made on cpu-fp32, wanted one made on cuda-sm90-bf16")


def test_a_pending_file_edited_by_hand(pending: tuple[Path, Suite]) -> None:
    golden, suite = pending
    path = golden / ".pending" / "words" / "logits.txt"
    path.write_bytes(path.read_bytes().replace(b'tree: "clean"', b'tree: "CLEAN"'))
    before = contents(golden)
    with pytest.raises(TraceError, match=rf"{path}:\d+: found a line that does not match"):
        accept(golden, ["words"], REASON, suite)
    assert contents(golden) == before


def broken(path: Path, how: str) -> int | None:
    """Damage a golden; returns the line that must be named (``None``: any)."""
    lines = path.read_bytes().split(b"\n")
    at = lines.index(b"self: Logits")
    if how == "edited":
        lines[at + 1] = lines[at + 1].replace(b"float32", b"float64")
        path.write_bytes(b"\n".join(lines))
        return at + 2
    if how == "cut":
        path.write_bytes(b"\n".join(lines[: at + 3]))
        return None
    if how == "newer":
        path.write_bytes(b"\n".join([b"omni-grpo golden 2", *lines[1:]]))
        return 1
    path.write_bytes(b"\n".join([*lines[:at], b"\xff\xfe", *lines[at:]]))
    return at + 1


@pytest.mark.parametrize("how", ["edited", "cut", "newer", "bytes"])
def test_a_broken_golden_is_named_by_file_and_line(
    project: tuple[Path, Suite], how: str, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    golden, _ = project
    path = golden / "words" / "logits.txt"
    line = broken(path, how)
    before = contents(golden)
    code, out, err = run_cli("golden", "check", "--golden", golden, "--json")
    assert code == 2
    assert json.loads(out)["error"]["item"].startswith(f"{path}:{line or ''}")
    assert f"{path}:{line or ''}" in err
    assert contents(golden) == before


def overlay(golden: Path, stage: str, key: str) -> Path:
    """A golden as a run on another platform would have made it."""
    path = golden / "words" / f"{stage}.txt"
    text = with_header(path.read_text(), {"platform": key})
    other = path.with_name(f"{stage}@{key}.txt")
    other.write_text(text)
    return other


def test_a_platform_without_its_own_goldens_fails_on_floats_only(
    project: tuple[Path, Suite], policy: Policy
) -> None:
    golden, suite = project
    (case,) = check(policy, suite, golden, "cuda-sm90-bf16", names=["words"]).cases
    missing = [stage.stage for stage in case.stages if not stage.golden]
    assert case.verdict == "new"
    assert missing == ["embeddings", "logits", "scoring", "completion"]
    assert {s.golden for s in case.stages if s.stage == "batch"} == {"words/batch.txt"}


def used(golden: Path, suite: Suite, policy: Policy, stage: str) -> str:
    """The file used for a stage on a GPU."""
    (case,) = check(policy, suite, golden, "cuda-sm90-bf16", names=["words"]).cases
    return next(found.golden for found in case.stages if found.stage == stage)


def test_its_own_golden_comes_first_then_the_declared_fallback(
    project: tuple[Path, Suite], policy: Policy
) -> None:
    golden, suite = project
    overlay(golden, "logits", "cuda-sm80-bf16")
    suite = replace(suite, fallbacks={"cuda-sm90-bf16": ("cuda-sm80-bf16",)})
    assert used(golden, suite, policy, "logits") == "words/logits@cuda-sm80-bf16.txt"
    overlay(golden, "logits", "cuda-sm90-bf16")
    assert used(golden, suite, policy, "logits") == "words/logits@cuda-sm90-bf16.txt"


def test_stages_computed_from_completions_have_their_own_golden_only_where_they_differ(
    project: tuple[Path, Suite], policy: Policy
) -> None:
    golden, suite = project
    assert used(golden, suite, policy, "parsed") == "words/parsed.txt"
    overlay(golden, "parsed", "cuda-sm90-bf16")
    assert used(golden, suite, policy, "parsed") == "words/parsed@cuda-sm90-bf16.txt"


def test_a_cpu_run_prunes_no_gpu_golden(project: tuple[Path, Suite]) -> None:
    golden, suite = project
    other = overlay(golden, "logits", "cuda-sm90-bf16")
    fewer = replace(suite, cases={"other": suite.cases["other"]})
    found = stale(golden, KEY, fewer, every=False)
    assert {path.parent.name for path in found} == {"words"}
    assert other not in found
    assert other in stale(golden, KEY, fewer, every=True)
    assert stale(golden, KEY, suite, every=True) == []


def test_the_commands_end_to_end(
    tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]], capfd: pytest.CaptureFixture[str]
) -> None:
    golden = make_project(tmp_path / "project")
    where = ("--golden", golden, "--json")
    code, out, _ = run_cli("golden", "regen", "words", *where)
    assert (code, json.loads(out)["pending"]) == (1, True)
    code, out, _ = run_cli("golden", "review", *where)
    (pending,) = json.loads(out)["pending"]
    assert code == 1
    assert pending["accept"] == f"omni-grpo golden accept words --reason WHY --golden {golden}"
    code, _, err = run_cli("golden", "accept", "words", *where)
    assert (code, "--reason" in err) == (2, True)
    code, out, _ = run_cli("golden", "accept", "words", "--reason", "first of all", *where)
    assert (code, len(json.loads(out)["accepted"])) == (0, 12)
    code, out, _ = run_cli("golden", "check", "words", *where)
    assert (code, json.loads(out)["verdict"]) == (0, "exact")
    code, out, _ = run_cli("golden", "review", *where)
    assert (code, json.loads(out)["pending"]) == (0, [])
    code, _, err = run_cli("golden", "check", "nowhere", *where)
    assert (code, "no case of that name" in err) == (2, True)
    (golden / "suite.yaml").write_text("cases: {other: {rows: [21]}}")
    code, out, _ = run_cli("golden", "prune", *where)
    assert (code, len(json.loads(out)["removed"])) == (0, 12)
    assert not list((golden / "words").glob("*.txt"))
