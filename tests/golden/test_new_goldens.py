"""What has no golden yet is ``new``: told once for all cases, with the next command."""

from __future__ import annotations

import copy
import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_project import KEY, doubled, make_project, project, template

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.golden.checking import check
from omni_grpo_core.golden.commands import advice, new_cases, regenerated_lines
from omni_grpo_core.golden.generations import scored_of
from omni_grpo_core.golden.pending import Regenerated, regen
from omni_grpo_core.golden.rebuild import rebuild
from omni_grpo_core.golden.results import CaseResult, GoldenReport, StageResult, Verdict, worst
from omni_grpo_core.golden.store import read_golden
from omni_grpo_core.golden.suite import Suite, load_suite
from omni_grpo_core.pipeline import stages
from omni_grpo_core.report.html.golden_page import golden_page
from omni_grpo_core.report.junit import golden_junit
from omni_grpo_core.report.markdown import golden_markdown
from omni_grpo_core.types import Rollout

__all__ = ["project", "template"]  # fixtures

Cli = Callable[..., tuple[int, str, str]]


def new_case(name: str) -> CaseResult:
    stage = StageResult("text", "new", "no golden for this platform yet", "none", (), "")
    return CaseResult(name, "new", stage.reason, None, (stage, replace(stage, stage="batch")))


def report(names: str, *others: CaseResult, **changes: object) -> GoldenReport:
    cases = (*map(new_case, names), *others)
    made = GoldenReport("golden", "cpu-fp32", cases, 1.0)
    return replace(made, **changes)  # type: ignore[arg-type]


def case(name: str, verdict: Verdict) -> CaseResult:
    fine = verdict == "exact"
    stage = StageResult("text", verdict, "why", "none" if fine else "added", (), f"{name}/text.txt")
    return CaseResult(name, verdict, "why", None if fine else "text", (stage,))


CALM, MOVED, BROKEN = (
    case("calm", "exact"),
    case("moved", "benign-drift"),
    case("broken", "harmful"),
)


def test_worse_than_within_and_milder_than_any_divergence() -> None:
    order: tuple[Verdict, ...] = ("within", "new", "benign-drift", "harmful")
    assert [worst(order[:n]) for n in range(1, 5)] == list(order)


def test_a_suite_without_goldens_is_one_line(tmp_path: Path, run_cli: Cli) -> None:
    """It was ten lines for each case, advising to undo the change."""
    golden = make_project(tmp_path / "project")
    junit, markdown = tmp_path / "junit.xml", tmp_path / "comment.md"
    files = ("--junit", junit, "--markdown", markdown, "--html", tmp_path / "page.html")
    code, out, _ = run_cli("golden", "check", "--golden", golden, *files)
    line, summary = out.splitlines()
    accept = f"omni-grpo golden accept --all --reason WHY --golden {golden}"
    assert code == 1
    assert line == (
        "new: words, other have no golden for cpu-fp32 yet: "
        f"omni-grpo golden regen --golden {golden}, then {accept}"
    )
    assert summary.startswith("new: 0 of 2 cases match")
    failures = [f.attrib for f in ET.parse(junit).iter("failure")]
    assert failures == [{"message": "no golden for cpu-fp32 yet", "type": "new"}] * 2
    assert markdown.read_text().count("regen") == 1
    assert "|" not in markdown.read_text()

    code, out, _ = run_cli("golden", "regen", "--golden", golden)
    assert code == 1
    assert out == (
        "new: words, other: 24 goldens pending: "
        f"omni-grpo golden review --golden {golden}, then {accept}\n"
    )
    code, out, _ = run_cli("golden", "review", "--golden", golden)
    assert code == 1
    assert out.splitlines() == [
        "new: other, words: 24 goldens",
        f"  {accept}",
        f"  omni-grpo golden reject --all --golden {golden}",
    ]
    assert run_cli("golden", "accept", "--all", "--reason", "first", "--golden", golden)[0] == 0
    code, out, _ = run_cli("golden", "check", "--golden", golden, "--json")
    assert (code, json.loads(out)["new"]) == (0, [])


def test_a_new_case_among_others(project: tuple[Path, Suite], run_cli: Cli) -> None:
    golden, _ = project
    shutil.rmtree(golden / "other")
    code, out, _ = run_cli("golden", "check", "--golden", golden, "--json")
    found = json.loads(out)
    assert (code, found["verdict"], found["first"], found["new"]) == (1, "new", None, ["other"])
    assert [case["verdict"] for case in found["cases"]] == ["exact", "new"]
    code, out, _ = run_cli("golden", "check", "--golden", golden)
    assert "│ other" not in out
    assert "\nnew: other has no golden for cpu-fp32 yet: omni-grpo golden regen" in out
    assert "1 of 2 cases match" in out


def test_many_names_are_cut() -> None:
    assert new_cases(report("abcdef")).startswith("a, b, c and 3 more have no golden")
    assert new_cases(report("abcd")).startswith("a, b, c, d have no golden")
    assert new_cases(report("")) == ""


def test_all_is_not_advised_beside_a_divergence() -> None:
    """``accept --all`` would take the divergent case along."""
    assert "accept --all" in new_cases(report("ab", CALM))
    assert "accept --verdict new" in new_cases(report("ab", MOVED))
    done = [Regenerated(case, (Path("x"),)) for case in report("ab", MOVED).cases]
    assert regenerated_lines(done, Path("golden")) == [
        "moved: benign-drift: 1 stages pending",
        "new: a, b: 2 goldens pending: omni-grpo golden review, "
        "then omni-grpo golden accept --verdict new --reason WHY",
    ]


def test_the_command_is_for_the_device_that_was_used() -> None:
    options = Suite().options("cuda-sm90-bf16")
    assert options == ("--device", "cuda")
    line = new_cases(report("a", platform="cuda-sm90-bf16", options=options))
    assert "no golden for cuda-sm90-bf16 yet: omni-grpo golden regen --device cuda, then" in line
    assert "golden regen a --device cuda" in advice(new_case("a"), Path("golden"), options)
    own = Suite(device="cuda", dtype="float32")
    assert own.options("cuda-sm90-fp32") == ()
    assert own.options("cuda-sm80-bf16") == ("--dtype", "bfloat16")
    assert own.options("cpu-fp32") == ("--device", "cpu")


def test_in_markdown_new_cases_share_a_line_beside_the_table() -> None:
    text = golden_markdown(report("abcdef", BROKEN, CALM))
    assert text.count("\n| ") == 3, "the head and two cases"
    assert "New: `a`, `b`, `c` and 3 more have no golden for `cpu-fp32` yet: `omni-grpo" in text
    assert "compare both sides with `omni-grpo golden diff broken`" in text


def test_in_junit_missing_goldens_of_a_case_are_one_failure() -> None:
    half = replace(BROKEN, stages=(*BROKEN.stages, *new_case("x").stages))
    root = ET.fromstring(golden_junit(report("a", half)))
    found = [
        (case.attrib["name"], failure.attrib["message"])
        for case in root.iter("testcase")
        for failure in case.iter("failure")
    ]
    assert found[0] == ("new", "no golden for cpu-fp32 yet")
    assert found[-1] == ("new", "text, batch: no golden for cpu-fp32 yet")


def test_on_the_page_new_cases_are_told_once_and_have_no_details() -> None:
    html = golden_page(report("ab", CALM))
    assert "<title>+ omni-grpo golden diff: new</title>" in html
    assert html.count("omni-grpo golden regen, then") == 1
    assert "case-3" in html
    assert 'id="case-1"' not in html


def test_a_stage_that_moved_keeps_its_verdict_beside_a_missing_golden(
    project: tuple[Path, Suite], policy: Policy
) -> None:
    golden, suite = project
    (golden / "words" / "embeddings.txt").unlink()
    (case,) = check(doubled(policy), suite, golden, KEY, names=["words"]).cases
    assert (case.verdict, case.first) == ("benign-drift", "logits")
    assert case.reason.endswith("; no golden for this platform yet: embeddings")


def test_drift_is_not_benign_without_a_golden_of_the_completions(
    project: tuple[Path, Suite], policy: Policy
) -> None:
    """Nothing shows then that they are unchanged."""
    golden, suite = project
    (golden / "words" / "completion.txt").unlink()
    (case,) = check(doubled(policy), suite, golden, KEY, names=["words"]).cases
    assert (case.verdict, case.first) == ("harmful", "logits")


class Broken(torch.nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this head")


def test_what_cannot_be_computed_is_not_new(tmp_path: Path, policy: Policy) -> None:
    golden = make_project(tmp_path / "project")
    failing = replace(policy, model=copy.deepcopy(policy.model))
    failing.model.lm_head = Broken()
    report = check(failing, load_suite(golden), golden, KEY, names=["words"])
    (case,) = report.cases
    assert (case.verdict, report.new) == ("schema", ())
    assert case.reason.startswith(
        "logits: the stage failed: RuntimeError: no kernel for this head (no golden"
    )
    verdicts = {stage.stage: stage.verdict for stage in case.stages}
    assert (verdicts["batch"], verdicts["logits"]) == ("new", "schema")
    (line,) = regenerated_lines([Regenerated(case, (Path("x"),))], Path("golden"))
    assert line.startswith("words: schema: 1 stages pending; logits: the stage failed: RuntimeErr")


def test_first_goldens_take_one_pass(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new case was run to be compared with no golden, and again to be stored; in each run its
    completion was generated to be scored, and again to be stored: at 7B most of the time."""
    calls = []

    def counted(*given: Any, **how: Any) -> Rollout:
        calls.append(how)
        return rollout(*given, **how)

    monkeypatch.setattr(stages, "rollout", counted)
    golden = make_project(tmp_path / "project")
    suite = load_suite(golden)
    done = regen(policy, suite, golden, KEY)
    assert len(calls) == len(done) == 2
    for one in done:
        found = {path.stem: read_golden(path).leaves for path in one.files}
        (scored,) = scored_of(found["scoring"])
        rolled = rebuild(found["completion"])
        assert isinstance(rolled, Rollout)
        assert len(scored.logprobs) == len(rolled.completions[0].token_ids)
