"""The GitHub workflows agree with tox.ini, the supported Pythons and the GPU suite."""

from __future__ import annotations

import configparser
import re
import tomllib
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import omni_grpo_core
from omni_grpo_core.io import DEFAULT, NEWEST, TRANSFORMERS

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYTHONS = ("3.11", "3.12", "3.13")
Run = Callable[..., tuple[int, str, str]]


def load(name: str) -> dict[str, Any]:
    content = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def expanded(name: str) -> list[str]:
    """``tf{4524,4576}`` -> ``tf4524``, ``tf4576``."""
    parts = re.split(r"\{([^}]*)\}", name)
    choices = [part.split(",") if odd % 2 else [part] for odd, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def tox_envs() -> set[str]:
    """Environments that tox.ini declares, and tox's built-in ``py3xx``."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini", encoding="utf-8")
    sections = [s.removeprefix("testenv:") for s in parser.sections() if s.startswith("testenv:")]
    declared = {env for section in sections for env in expanded(section)}
    return declared | {f"py{version.replace('.', '')}" for version in PYTHONS}


def matrix() -> dict[str, str]:
    """Environment -> Python version, for the CPU job."""
    rows = load("ci.yml")["jobs"]["cpu"]["strategy"]["matrix"]["include"]
    found = {row["env"]: row["python"] for row in rows}
    assert len(found) == len(rows), "an environment is listed twice"
    return found


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def commands(workflow: dict[str, Any]) -> str:
    return "\n".join(step.get("run", "") for step in steps(workflow))


def test_braces_are_read_as_tox_reads_them() -> None:
    assert expanded("tf{1,2}-{a,b}") == ["tf1-a", "tf1-b", "tf2-a", "tf2-b"]
    assert expanded("lint") == ["lint"]
    assert {
        "lint",
        "types",
        "slow",
        "gpu",
        "newest",
        "workflows",
        "tf4524",
        "tf4576",
        "tf5230",
    } <= tox_envs()


def test_every_environment_that_is_run_exists() -> None:
    named = set(matrix())
    for path in WORKFLOWS:
        run = commands(load(path.name)).replace("${{ matrix.env }}", "")
        named |= set(re.findall(r"tox (?:exec )?-e (\w+)", run))
    assert {"slow", "gpu"} <= named
    assert named <= tox_envs()


def test_every_tested_transformers_has_an_environment_that_is_run() -> None:
    others = [version for version in TRANSFORMERS if version != DEFAULT]
    wanted = {f"tf{version.replace('.', '')}" for version in others}
    assert {env for env in tox_envs() if env.startswith("tf")} == wanted
    assert {env for env in matrix() if env.startswith("tf")} == wanted
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    section = next(name for name in tox.sections() if name.startswith("testenv:tf"))
    pinned = re.findall(r"tf(\d+): .* transformers==(\S+)", tox[section]["commands_pre"])
    assert dict(pinned) == {version.replace(".", ""): version for version in others}


def test_the_newest_release_is_run_weekly_and_its_findings_are_kept() -> None:
    """transformers 5.24 was within the bound of a plain install and broke the suite in 36 places;
    nobody knew, because every environment was pinned."""
    workflow = load("ci.yml")
    (triggers,) = (value for key, value in workflow.items() if str(key) in ("on", "True"))
    assert triggers["schedule"]
    job = workflow["jobs"]["newest"]
    assert "schedule" in job["if"]
    assert not [
        name for name, other in workflow["jobs"].items() if "newest" in other.get("needs", ())
    ]
    run = [step.get("run", "") for step in job["steps"]]
    kept = set(re.findall(r"findings/[\w.]+", "\n".join(run)))
    assert kept == {"findings/junit.xml", "findings/log.txt", "findings/versions.json"}
    suite = next(n for n, line in enumerate(run) if line.startswith("tox -e newest"))
    # a failed suite still uploads its findings, and still fails after the pipe
    assert all(step["if"] == "${{ !cancelled() }}" for step in job["steps"][suite + 1 :])
    assert job["defaults"]["run"]["shell"] == "bash"
    upload = job["steps"][-1]
    assert (upload["uses"].partition("@")[0], upload["with"]["path"]) == (
        "actions/upload-artifact",
        "findings",
    )
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    newest = tox["testenv:newest"]
    assert newest["constraints"] == ""
    # named on pip's command line, it is not limited by the project's bound
    assert re.search(r"pip install --upgrade transformers", newest["commands_pre"])


def test_a_plain_install_gets_nothing_newer_than_was_tested() -> None:
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = {r.name: r.specifier for r in map(Requirement, bounds["project"]["dependencies"])}
    major, minor, _ = map(int, NEWEST.split("."))
    assert all(version in found["transformers"] for version in TRANSFORMERS)
    assert f"{major}.{minor + 1}.0" not in found["transformers"]
    # what the environments and a plain install were run with, and the next version
    for name, tested, untested in (
        ("torch", "2.15.0", "2.16.0"),
        ("torchvision", "0.29.2", "0.30.0"),
        ("numpy", "2.4.6", "2.5.0"),
    ):
        assert tested in found[name]
        assert untested not in found[name]


def test_every_python_is_run_under_its_own_name() -> None:
    assert {env: python for env, python in matrix().items() if env.startswith("py")} == {
        f"py{version.replace('.', '')}": version for version in PYTHONS
    }
    assert {"lint", "types", "workflows"} <= set(matrix())
    assert set(matrix().values()) <= set(PYTHONS)


def test_the_gpu_job_runs_the_gpu_suite_on_a_self_hosted_runner() -> None:
    job = load("gpu.yml")["jobs"]["gpu"]
    assert "self-hosted" in job["runs-on"]
    assert "tox -e gpu" in [step.get("run") for step in job["steps"]]
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    assert "--omni-require-gpu" in tox["testenv:gpu"]["commands"], (
        "no GPU must not look like a pass"
    )


def test_pending_goldens_and_the_page_are_uploaded_even_from_a_failed_run() -> None:
    job = load("gpu.yml")["jobs"]["gpu"]
    after = job["steps"][[step.get("run") for step in job["steps"]].index("tox -e gpu") + 1 :]
    assert after
    assert all(step["if"] == "${{ !cancelled() }}" for step in after)
    upload = after[-1]
    assert upload["uses"].startswith("actions/upload-artifact@")
    paths = upload["with"]["path"].split()
    assert {"golden/.pending", "golden/qwen3/.pending"} <= set(paths)
    # by default the action skips names that begin with a dot
    assert upload["with"]["include-hidden-files"] is True
    (page,) = re.findall(r"--html (\S+)", commands(load("gpu.yml")))
    assert page.replace("$dtype", "*") in paths
    assert "golden accept" not in commands(load("gpu.yml")), "goldens are accepted by people"


def test_the_golden_commands_of_the_workflow_exist(run_cli: Run) -> None:
    """Every ``golden`` command of the workflow exists, with its options."""
    lines = re.findall(r"\$golden (\w+) (.*?) \|\|", commands(load("gpu.yml")))
    assert [name for name, _ in lines] == ["regen", "diff", "regen"]
    for name, options in lines:
        code, text, _ = run_cli("golden", name, "--help")
        assert code == 0
        plain = re.sub(r"\x1b\[[\d;]*m", "", text)  # if the terminal is taken to be coloured
        assert all(option in plain for option in re.findall(r"--[a-z-]+", options))


USES = re.compile(r"uses: (?P<action>\S+)@(?P<hash>[0-9a-f]{40}) # (?P<version>v\d+\.\d+\.\d+)")
# the permissions that a job requests beyond reading the code
RIGHTS = {
    ("release.yml", "attest"): {"id-token": "write", "attestations": "write"},
    ("release.yml", "publish"): {"id-token": "write"},
}


def test_every_action_is_pinned_by_hash_the_same_everywhere() -> None:
    """The tag of a third-party action can be moved to other code; dependabot updates hash and
    version together."""
    pins: dict[str, set[str]] = {}
    for path in [*WORKFLOWS, ROOT / "action.yml"]:
        for line in path.read_text(encoding="utf-8").splitlines():
            if "uses: " in line and "uses: ./" not in line and not line.startswith("#"):
                match = USES.search(line)
                assert match, line
                repository = "/".join(match["action"].split("/")[:2])
                pins.setdefault(repository, set()).add(f"{match['hash']} {match['version']}")
    assert {repository: len(found) for repository, found in pins.items()} == dict.fromkeys(pins, 1)
    assert {repository for repository in pins if not repository.startswith("actions/")} == {
        "pypa/gh-action-pypi-publish"
    }


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_few_inputs_and_few_permissions(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    workflow = load(path.name)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job.get("permissions", {}) == RIGHTS.get((path.name, name), {})
    assert "secrets" not in text
    assert "://" not in text
    checkouts = [step for step in steps(workflow) if step.get("uses", "").startswith("actions/ch")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)
    # expressions that outsiders control (titles, branch names) never reach a shell
    inserted = set(re.findall(r"\$\{\{ (.*?) \}\}", commands(workflow)))
    assert inserted <= {"matrix.env"}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())


def test_a_release_is_built_without_permissions_and_published_without_a_token() -> None:
    """Whatever a build dependency does, it can neither sign nor publish: the jobs that can run
    neither the project's code nor packages from PyPI."""
    jobs = load("release.yml")["jobs"]
    assert (jobs["attest"]["needs"], jobs["publish"]["needs"]) == ("build", "attest")
    assert jobs["publish"]["environment"] == "pypi"
    for name in ("attest", "publish"):
        assert not [step for step in jobs[name]["steps"] if "run" in step]
    publish = jobs["publish"]["steps"][-1]
    assert publish["uses"].startswith("pypa/gh-action-pypi-publish@")
    assert "with" not in publish, "neither user nor password: trusted publishing, with attestations"


def test_the_citation_has_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == omni_grpo_core.__version__
    # required by citation-file-format 1.2.0
    assert {"authors", "cff-version", "message", "title"} <= cited.keys()


def test_issue_forms_have_the_fields_that_github_requires() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    loaded = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in forms}
    assert loaded.pop("config") == {"blank_issues_enabled": True}
    assert {"bug", "broken-run"} == loaded.keys()
    for form in loaded.values():
        assert {"name", "description", "body"} <= form.keys()
        ids = [field["id"] for field in form["body"]]
        assert len(set(ids)) == len(ids)
    assert any("omni-grpo doctor" in f["attributes"]["label"] for f in loaded["broken-run"]["body"])
