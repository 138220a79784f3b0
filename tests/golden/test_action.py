"""``action.yml`` and the pre-commit hook: their shell, run here as GitHub and pre-commit run it.

The action has never run on GitHub. The stand-in is small: the kinds of expressions that
``action.yml`` uses are substituted, outputs are read back from ``GITHUB_OUTPUT``, and the package
comes from the environment that runs the suite.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from golden_project import git

import omni_grpo_core
from omni_grpo_core.golden.text import format_golden

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
(HOOK,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Ran:
    """``code``: of the step that failed, else 0. ``files``: what the artefact would contain."""

    code: int
    outputs: Mapping[str, str]
    summary: str
    files: frozenset[str]
    log: str


def environment() -> dict[str, str]:
    """An environment with this Python as ``python``, which finds the package under test."""
    here = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": os.pathsep.join([here, os.environ["PATH"]]),
        "PYTHONPATH": str(Path(omni_grpo_core.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }


def evaluated(text: str, known: Mapping[str, str]) -> str:
    return re.sub(r"\$\{\{ (.*?) \}\}", lambda match: known[match[1]], text)


def outputs_of(text: str) -> dict[str, str]:
    """``name=value`` lines, and ``name<<END`` up to a line ``END``: the format of GITHUB_OUTPUT."""
    found, lines = {}, iter(text.splitlines())
    for line in lines:
        if match := re.fullmatch(r"([\w-]+)<<(.+)", line):
            value = []
            for inner in lines:
                if inner == match[2]:
                    break
                value.append(inner)
            found[match[1]] = "\n".join(value)
        else:
            name, _, found_value = line.partition("=")
            assert re.fullmatch(r"[\w-]+", name), line
            found[name] = found_value
    return found


def run_action(folder: Path, **inputs: str) -> Ran:
    """Run the ``run`` steps in order, except the install, with ``folder`` as workspace."""
    temp = folder.parent / "runner"
    temp.mkdir()
    given = {name: str(spec.get("default", "")) for name, spec in ACTION["inputs"].items()}
    given |= {name.replace("_", "-"): value for name, value in inputs.items()}
    known = {f"inputs.{name}": value for name, value in given.items()}
    known |= {"runner.temp": str(temp), "github.action_path": str(ROOT)}
    log = ""
    for number, step in enumerate(ACTION["runs"]["steps"]):
        if "run" not in step or step["name"] == "Install":
            continue
        assert step["shell"] == "bash"
        names = ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")
        files = {name: temp / f"{name}-{number}" for name in names}
        for file in files.values():
            file.touch()
        own = {name: evaluated(value, known) for name, value in step["env"].items()}
        script = temp / f"{number}.sh"
        script.write_text(step["run"], encoding="utf-8")
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", script],
            cwd=folder,
            env=environment() | own | {name: str(file) for name, file in files.items()},
            capture_output=True,
            text=True,
            check=False,
        )
        log += done.stdout + done.stderr
        if "id" in step:
            set_by_step = outputs_of(files["GITHUB_OUTPUT"].read_text(encoding="utf-8"))
            known |= {f"steps.{step['id']}.outputs.{k}": v for k, v in set_by_step.items()}
            summary = files["GITHUB_STEP_SUMMARY"].read_text(encoding="utf-8")
        if done.returncode:
            break
    outputs = {name: evaluated(spec["value"], known) for name, spec in ACTION["outputs"].items()}
    out = temp / "omni-grpo"
    kept = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    return Ran(done.returncode, outputs, summary, frozenset(kept), log)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A checkout with the shipped goldens of two cases."""
    folder = tmp_path / "workspace"
    for case in ("text", "image"):
        shutil.copytree(ROOT / "golden" / case, folder / "golden" / case)
    return folder


CASES = "text\nimage\n"
ALWAYS = {"golden.html", "golden.json", "junit.xml", "comment.md", "log.txt"}


@pytest.mark.slow
def test_goldens_that_hold_are_green(workspace: Path) -> None:
    ran = run_action(workspace, arguments=CASES)
    assert ran.code == 0, ran.log
    assert ran.outputs["verdict"] in ("exact", "within")
    assert (ran.outputs["first-stage"], ran.outputs["exit-code"]) == ("", "0")
    assert ran.files == ALWAYS
    assert ran.summary.startswith("### ✅ Goldens for `cpu-fp32`")
    assert ran.outputs["comment"].strip() == ran.summary.strip()


def test_a_golden_that_differs_is_red_named_and_uploaded(workspace: Path) -> None:
    """The text of another case stands in for a changed chat template."""
    golden = workspace / "golden"
    shutil.copy(golden / "image" / "text.txt", golden / "text" / "text.txt")
    ran = run_action(workspace, arguments=CASES)
    assert ran.code == 1
    assert (ran.outputs["verdict"], ran.outputs["first-stage"]) == ("harmful", "text")
    assert "| `text` | harmful | `text` |" in ran.outputs["comment"]
    assert "omni-grpo golden accept text --reason WHY" in ran.summary
    assert ran.files > ALWAYS
    assert "pending/text/text.txt" in ran.files
    assert not [file for file in ran.files - ALWAYS if not file.startswith("pending/text/")]


def test_no_input_reaches_the_shell_as_code(workspace: Path) -> None:
    """Inputs may come from a pull request's title or branch, which anyone can write."""
    attack = "x\"; touch pwned; $(touch pwned) `touch pwned` '; touch pwned\nverdict=exact"
    ran = run_action(workspace, golden=attack, checkpoint=attack, arguments=attack)
    assert (ran.code, ran.outputs["verdict"], ran.outputs["exit-code"]) == (2, "error", "2")
    assert ran.summary.startswith("### ❌ The goldens could not be checked\n\n    error: ")
    assert ran.outputs["comment"].strip() == ran.summary.strip()
    assert not list(workspace.parent.rglob("pwned"))


def test_inputs_reach_the_shell_through_the_environment_alone() -> None:
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step.get("run", "")


def test_the_action_installs_its_own_revision_or_the_named_package(tmp_path: Path) -> None:
    """The install step with a ``python`` that prints its arguments: pip itself and the network are
    not under test."""
    (step,) = (step for step in ACTION["runs"]["steps"] if step.get("name") == "Install")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)

    def called_with(package: str, constraints: str) -> list[str]:
        given = {"PACKAGE": package, "CONSTRAINTS": constraints, "OWN": "/own"}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            env=os.environ | given | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.split("\n")[:-1]

    assert called_with("", "") == ["-m", "pip", "install", "-q", "--", "/own"]
    assert called_with("--index-url=evil", "a b.txt") == [
        *("-m", "pip", "install", "-q", "-c", "a b.txt", "--", "--index-url=evil"),
    ]


@pytest.fixture
def hook(repository: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The hook's entry as pre-commit calls it: in the repository, without file names."""
    assert HOOK["pass_filenames"] is False
    program, *words = shlex.split(HOOK["entry"])
    assert program == "omni-grpo"
    monkeypatch.chdir(repository)
    return lambda *arguments: run_cli(*words, *arguments)


@pytest.fixture
def repository(workspace: Path) -> Path:
    (workspace / ".gitignore").write_text("golden/.pending/\n")
    git(workspace, "init", "-q")
    git(workspace, "add", ".")
    git(workspace, "commit", "-q", "-m", "goldens")
    return workspace


def test_the_hook_passes_intact_goldens(repository: Path, hook: Run) -> None:
    assert hook()[:2] == (0, "every golden is complete and reviewed\n")
    staged = git(repository, "ls-files").split()
    assert [name for name in staged if re.search(HOOK["files"], name)] == staged[1:]
    assert hook("--golden", "elsewhere")[0] == 2


def test_the_hook_refuses_edited_unaccepted_and_pending_goldens(
    repository: Path, hook: Run
) -> None:
    """All in one run: a commit is not refused three times in a row."""
    golden = repository / "golden"
    edited = golden / "text" / "logits.txt"
    edited.write_text(edited.read_text(encoding="utf-8").replace("mean -1", "mean -2", 1))
    # made for review, but moved by hand
    made = format_golden("loss", 0.25, {"platform": "cpu-fp32", "tree": "clean"})
    (golden / "text" / "loss.txt").write_text(made, encoding="utf-8")
    (golden / ".pending" / "text").mkdir(parents=True)
    (golden / ".pending" / "text" / "loss.txt").write_text(made, encoding="utf-8")
    code, out, _ = hook()
    assert code == 1
    first, second, third = out.splitlines()
    assert re.search(r"text.logits\.txt:\d+: found a line that does not match its checksum", first)
    assert re.search(r"text.loss\.txt: found a golden that was never accepted", second)
    assert re.search(r"\.pending.text: found 1 pending, wanted none", third)
