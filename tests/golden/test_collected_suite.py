"""A ``suite.yaml`` as tests: what is collected, what a failure says, and what an update writes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from golden_project import KEY, contents, make_project, with_goldens

from omni_grpo_core import pytest_suite, tiny
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.golden import checking
from omni_grpo_core.golden.pending import regen
from omni_grpo_core.golden.steps import golden_stages
from omni_grpo_core.golden.suite import Case, load_suite

pytest_plugins = ["pytester"]

Run = Callable[..., pytest.RunResult]
CLI = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def accepted(tmp_path_factory: pytest.TempPathFactory, policy: Policy) -> Path:
    """A project with goldens, to copy."""
    return with_goldens(tmp_path_factory.mktemp("accepted"), policy)[0].parent


@pytest.fixture
def project(pytester: pytest.Pytester) -> Path:
    """The golden folder of a project without goldens."""
    return make_project(pytester.path)


@pytest.fixture
def goldens(pytester: pytest.Pytester, accepted: Path) -> Path:
    """The golden folder of a project with goldens."""
    shutil.copytree(accepted, pytester.path, dirs_exist_ok=True)
    return pytester.path / "golden"


@pytest.fixture
def run(pytester: pytest.Pytester, accepted: Path) -> Run:
    """pytest in this process, with settings of its own as in ``test_pytest_plugin``; strict."""
    # pytester forgets what the inner run imports, and torch cannot be imported twice: by now
    # ``accepted`` has imported everything
    settings = str(pytester.makeini("[pytest]\ntestpaths = golden"))
    options = ("-c", settings, "--strict-markers", "-p", "no:cacheprovider")

    def run_here(*more: str) -> pytest.RunResult:
        return pytester.runpytest_inprocess(*options, *more)

    return run_here


def ids(result: pytest.RunResult) -> list[str]:
    """Sorted: another plugin may shuffle them."""
    return sorted(line for line in result.outlines if line.startswith("golden/suite.yaml::"))


def failure(result: pytest.RunResult) -> list[str]:
    """The lines of the only failure, without its headline."""
    begin = next(at for at, line in enumerate(result.outlines) if re.match("_+ golden ", line))
    end = next(at for at, line in enumerate(result.outlines) if "short test summary" in line)
    return result.outlines[begin + 1 : end]


@pytest.mark.usefixtures("project")
def test_a_case_is_a_test(run: Run) -> None:
    names = ["golden/suite.yaml::other", "golden/suite.yaml::words"]
    assert ids(run("--co", "-q")) == names
    assert ids(run("--co", "-q", "-k", "words")) == names[1:]
    assert ids(run("--co", "-q", names[0])) == names[:1]
    assert ids(run("--co", "-q", "-m", "tiny")) == names
    assert ids(run("--co", "-q", "-m", "slow")) == []


@pytest.mark.usefixtures("project")
def test_by_option_a_stage_is_a_test(run: Run) -> None:
    found = ids(run("--co", "-q", "--omni-stages"))
    stages = sorted(golden_stages(Case(rows=(20,))))
    assert found == [f"golden/suite.yaml::{c}::{s}" for c in ("other", "words") for s in stages]
    assert ids(run("--co", "-q", "--omni-stages", found[3])) == [found[3]]
    assert ids(run("--co", "-q", "--omni-stages", "-m", "xdist_group")) == found
    assert ids(run("--co", "-q", "--omni-stages", "-p", "no:xdist")) == found


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("cases: {clip: {rows: [0]}}", True),
        ("checkpoint: ../model\ncases: {clip: {row: [0]}}", True),
        ("cases:\n  clip: {rows: [0]\n", True),
        ("cases: [a, b]", False),
        ("cases: {smoke: {run: make}}", False),
        ("steps: {build: {rows: [0]}}", False),
        ("- cases", False),
        ("{{ template }}", False),
        ("", False),
    ],
    ids=[
        "a suite",
        "a slip",
        "no YAML",
        "a list",
        "no rows",
        "another",
        "text",
        "no YAML",
        "empty",
    ],
)
def test_only_a_golden_suite_is_collected(text: str, ours: bool, tmp_path: Path) -> None:
    """Other tools have files of that name; one of ours must not vanish for a slip of the pen."""
    (tmp_path / "suite.yaml").write_text(text)
    assert pytest_suite.is_suite(tmp_path / "suite.yaml") is ours


def test_another_tools_suite_and_the_packages_own_are_ignored(project: Path, run: Run) -> None:
    (project / "suite.yaml").write_text("cases: {smoke: {run: make}}")
    assert run("--co").ret == pytest.ExitCode.NO_TESTS_COLLECTED
    package = run("--co", "--pyargs", "omni_grpo_core.golden")
    assert package.ret == pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cases: {words: {rows: [20], step: 1}}",
            "config: *suite.yaml: cases: words: found unknown",
        ),
        ("cases: {words: {rows: all}}", "config: *suite.yaml: cases: words: rows: found 'all'"),
        ("cases: {words: {rows: [20]}", "config: *suite.yaml:*: found not YAML"),
        ("marks: ['']\ncases: {words: {rows: [20]}}", "config: *suite.yaml: marks: found ''"),
        ("marks: [fast]\ncases: {words: {rows: [20]}}", "'fast' not found in `markers`"),
    ],
    ids=["key", "value", "YAML", "no mark", "mark"],
)
def test_a_wrong_suite_is_an_error_in_one_line(
    text: str, message: str, project: Path, run: Run
) -> None:
    (project / "suite.yaml").write_text(text)
    result = run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"{message}*"])
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*.py:*")


def test_marks_of_suite_and_case(project: Path, run: Run) -> None:
    (project / "suite.yaml").write_text(
        "device: cuda\nmarks: [slow]\ncases: {words: {rows: [20], marks: [full]}, b: {rows: [20]}}"
    )
    assert ids(run("--co", "-q", "-m", "slow and gpu and full")) == ["golden/suite.yaml::words"]
    result = run("-rs", "-m", "full")
    result.assert_outcomes(skipped=1, deselected=1)
    (report, *_) = result.reprec.getreports("pytest_runtest_logreport")  # type: ignore[attr-defined]
    assert report.location == ("golden/suite.yaml", 2, "golden words")
    stages = ids(run("--co", "-q", "--omni-stages", "-m", "full"))
    assert {name.split("::")[1] for name in stages} == {"words"}


def test_a_row_that_is_not_there_fails_only_its_case(project: Path, run: Run) -> None:
    (project / "suite.yaml").write_text("cases: {words: {rows: [99]}}")
    result = run()
    result.assert_outcomes(failed=1)
    (line,) = failure(result)
    assert line.endswith(
        "case words: found row 99, wanted rows from 0 to 21; correct the case's rows"
    )


def test_what_is_missing_is_said_in_a_line_and_written_by_an_update_alone(
    project: Path, run: Run, policy: Policy
) -> None:
    result = run("-k", "words")
    result.assert_outcomes(failed=1, deselected=1)
    assert len(failure(result)) == 1
    assert failure(result)[0].startswith(
        "words: new: no golden for this platform yet: run `omni-grpo"
    )
    assert not (project / ".pending").exists()

    result = run("--snapshot-update")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*golden summary*", "2 cases pending: omni-grpo golden review"])
    written = contents(project / ".pending")
    regen(policy, load_suite(project), project, KEY)
    assert contents(project / ".pending") == written


def test_a_difference_is_shown_as_golden_diff_shows_it(
    goldens: Path, run: Run, run_cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    run().assert_outcomes(passed=2)

    text = (goldens / "suite.yaml").read_text()
    (goldens / "suite.yaml").write_text(text.replace("words: {rows: [20]}", "words: {rows: [21]}"))
    result = run()
    result.assert_outcomes(failed=1, passed=1)
    *difference, advice = failure(result)
    assert difference[0].startswith("words: harmful: sample: ")
    assert advice.startswith("do: compare both sides with `omni-grpo golden diff words`")
    code, shown, _ = run_cli("golden", "diff", "words", "--golden", goldens)
    assert code == 1
    assert "\n".join(difference) in shown

    # the stages share one computation of their case, on a policy loaded once
    computed: list[str] = []
    check_case = checking.check_case

    def counted(context: object, name: str, *rest: object) -> object:
        computed.append(name)
        return check_case(context, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(checking, "check_case", counted)
    result = run("--omni-stages", "-k", "words and (sample or positions)")
    result.assert_outcomes(failed=1, passed=1, deselected=22)
    assert computed == ["words"]
    stages = [line for line in failure(result) if re.match(r"  \w+:", line)]
    assert [line.partition(":")[0] for line in stages] == ["  sample"]

    result = run("--snapshot-update")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["1 case pending: omni-grpo golden review"])
    assert [path.name for path in (goldens / ".pending").iterdir()] == ["words"]


@pytest.mark.usefixtures("goldens", "qwen3_policy")  # imported by now
def test_another_checkpoint_for_every_suite(run: Run) -> None:
    result = run("-k", "words", f"--omni-checkpoint={tiny.checkpoint_dir('qwen3')}")
    result.assert_outcomes(failed=1, deselected=1)
    assert failure(result)[0].startswith("words: schema: batch: ")
    assert "golden diff words --checkpoint" in failure(result)[-1]
