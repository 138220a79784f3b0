"""Markers and options of the plugin: what runs, what is skipped and why, and what is refused."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

from omni_grpo_core import pytest_plugin

pytest_plugins = ["pytester"]

TESTS = """
import pytest
@pytest.mark.gpu
def test_gpu(): pass
@pytest.mark.full
def test_full(omni_checkpoint): assert (omni_checkpoint / "config.json").exists()
def test_checkpoint(omni_checkpoint): pass
@pytest.mark.slow
@pytest.mark.tiny
def test_plain(): pass
"""


def run(pytester: pytest.Pytester, *options: str, tests: str = TESTS) -> pytest.RunResult:
    pytester.makepyfile(tests)
    # its own settings: pytest's folder may be inside this project's, as under tox, and pytest also
    # looks for settings next to any option value that is a folder
    settings = str(pytester.makeini("[pytest]"))
    # -p no:syrupy: the plugin must not need it until a golden is requested
    return pytester.runpytest_inprocess(
        "-c", settings, "-p", "no:syrupy", "--strict-markers", "-rs", *options
    )


@pytest.fixture
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(request.param))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(request.param))


@pytest.mark.parametrize("cuda", [False], indirect=True)
@pytest.mark.usefixtures("cuda")
def test_without_cuda_gpu_tests_are_skipped_with_the_reason(pytester: pytest.Pytester) -> None:
    result = run(pytester)
    result.assert_outcomes(passed=1, skipped=3)
    result.stdout.fnmatch_lines_random(
        [
            f"SKIPPED*torch {torch.__version__} finds no CUDA device",
            "SKIPPED*no --omni-checkpoint was given",
        ]
    )


@pytest.mark.parametrize("cuda", [False], indirect=True)
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("options", [(), ("-m", "not gpu")])
def test_without_cuda_require_gpu_is_refused(
    pytester: pytest.Pytester, options: tuple[str, ...]
) -> None:
    result = run(pytester, "--omni-require-gpu", *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --omni-require-gpu: torch * finds no CUDA device"])


@pytest.mark.parametrize("cuda", [True], indirect=True)
@pytest.mark.usefixtures("cuda")
def test_with_cuda_and_a_checkpoint_everything_runs(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    (tmp_path / "config.json").touch()
    run(pytester, "--omni-require-gpu", "--omni-checkpoint", str(tmp_path)).assert_outcomes(
        passed=4
    )


def test_a_checkpoint_that_is_not_a_folder_is_refused(pytester: pytest.Pytester) -> None:
    result = run(pytester, "--omni-checkpoint", "nowhere")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --omni-checkpoint: nowhere is not a folder"])


def test_an_old_syrupy_is_refused(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest_plugin, "version", lambda _: "7.0.1")
    pytester.makepyfile("def test_it(omni_golden): pass")
    result = pytester.runpytest_inprocess()
    result.stdout.fnmatch_lines(["*omni_golden needs syrupy 7.0.2 or newer, found 7.0.1*"])


def test_a_missing_syrupy_is_reported(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(pytest_plugin, "version", missing)
    pytester.makepyfile("def test_it(omni_golden): pass")
    result = pytester.runpytest_inprocess()
    result.stdout.fnmatch_lines(["*found none: pip install*"])


OWN = """
def pytest_addoption(parser):
    parser.addoption("--checkpoint", default="mine")
"""


def test_a_project_may_define_an_option_with_the_old_name(pytester: pytest.Pytester) -> None:
    """The plugin defined ``--checkpoint``: pytest failed to start if a conftest defined it too."""
    pytester.makeconftest(OWN)
    own = "def test_own(pytestconfig): assert pytestconfig.getoption('checkpoint') == 'yours'"
    run(pytester, "--checkpoint", "yours", tests=own).assert_outcomes(passed=1)


def test_another_plugin_may_define_it_too(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(theirs=OWN)
    pytester.syspathinsert()
    own = "def test_own(pytestconfig): assert pytestconfig.getoption('checkpoint') == 'yours'"
    result = run(pytester, "-p", "theirs", "--checkpoint", "yours", tests=own)
    result.assert_outcomes(passed=1)


def test_the_old_names_work_for_one_more_version(pytester: pytest.Pytester, tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    old = "def test_old(omni_checkpoint): assert omni_checkpoint.is_dir()"
    result = run(pytester, "--checkpoint", str(tmp_path), tests=old)
    # not the number of warnings: other plugins in this process may issue their own
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["*--checkpoint is now --omni-checkpoint; the old name goes with 0.2"]
    )
