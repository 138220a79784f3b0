"""The pytest plugin: goldens, golden suites, markers and options for tests of omni-modal models.

Loaded by pytest wherever this package is installed, so importing it is cheap: torch and syrupy are
imported only where they are needed.
"""

from __future__ import annotations

import warnings
from argparse import ArgumentError
from collections.abc import Generator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from omni_grpo_core.golden.pytest_fixture import OmniGolden
    from omni_grpo_core.parity.pytest_fixture import OmniParity
    from omni_grpo_core.pytest_suite import GoldenSuite

_MARKERS = (
    "gpu: needs a CUDA device; skipped without one, refused by --omni-require-gpu",
    "gpu2: needs two CUDA devices; skipped without them",
    "gpu4: needs four CUDA devices; skipped without them",
    "full: needs a real checkpoint; skipped without --omni-checkpoint",
    "slow: takes minutes",
    "tiny: runs on the shipped tiny checkpoint",
)
_DEPRECATED: Mapping[str, dict[str, Any]] = {
    "checkpoint": {"type": Path, "metavar": "DIR"},
    "require-gpu": {"action": "store_true"},
}
_NO_CHECKPOINT = "no --omni-checkpoint was given"
_CASES = pytest.StashKey[dict[str, str]]()
_SYRUPY = (7, 0, 2)
"""Earlier versions silently lose snapshots under ``-n 4 --snapshot-update``."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("omni-grpo")
    group.addoption(
        "--omni-checkpoint",
        type=Path,
        metavar="DIR",
        help="checkpoint folder for tests marked full, and in place of that of every suite.yaml",
    )
    group.addoption(
        "--omni-require-gpu", action="store_true", help="fail, instead of skipping, without CUDA"
    )
    group.addoption(
        "--omni-stages",
        action="store_true",
        help="a test for each stage of a suite.yaml's cases, instead of one for each case",
    )


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(parser: pytest.Parser) -> Generator[None]:
    """Option names up to 0.1, unless a conftest or another plugin already has them."""
    yield
    group = parser.getgroup("omni-grpo")
    for old, how in _DEPRECATED.items():
        with suppress(ValueError, ArgumentError):  # taken
            group.addoption(f"--{old}", dest=f"old_omni_{old}", help=f"now --omni-{old}", **how)


def pytest_configure(config: pytest.Config) -> None:
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    for old in _DEPRECATED:
        value = config.getoption(f"old_omni_{old}", None)
        if value:
            config.issue_config_time_warning(
                pytest.PytestDeprecationWarning(
                    f"--{old} is now --omni-{old}; the old name goes with 0.2"
                ),
                2,
            )
            setattr(config.option, f"omni_{old.replace('-', '_')}", value)
    checkpoint = config.getoption("--omni-checkpoint")
    if checkpoint is not None and not checkpoint.is_dir():
        raise pytest.UsageError(f"--omni-checkpoint: {checkpoint} is not a folder")
    if config.getoption("--omni-require-gpu") and (reason := _no_cuda()):
        raise pytest.UsageError(f"--omni-require-gpu: {reason}")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> GoldenSuite | None:
    """A ``suite.yaml`` of goldens, except the one inside this package."""
    if file_path.name != "suite.yaml" or Path(__file__).parent in file_path.parents:
        return None
    from omni_grpo_core.pytest_suite import GoldenSuite, is_suite

    return GoldenSuite.from_parent(parent, path=file_path) if is_suite(file_path) else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What ``--snapshot-update`` wrote of suites; the reports come from every worker."""
    if not terminalreporter.config.getoption("--snapshot-update", False):
        return
    from omni_grpo_core.pytest_suite import pending_summary

    lines = [*pending_summary(terminalreporter.getreports("passed"))]
    if lines:
        terminalreporter.section("golden summary", sep="-")
        for line in lines:
            terminalreporter.write_line(line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, devices in (("gpu", 1), ("gpu2", 2), ("gpu4", 4)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := _no_cuda(devices)):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))
    if config.getoption("--omni-checkpoint") is None:
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason=_NO_CHECKPOINT))


def _no_cuda(wanted: int = 1) -> str:
    """Why there are not as many CUDA devices, or ``""``."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about an old driver
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found >= wanted:
        return ""
    return f"torch {torch.__version__} finds {found or 'no'} CUDA device"


@pytest.fixture(scope="session")
def omni_checkpoint(pytestconfig: pytest.Config) -> Path:
    """The folder given with ``--omni-checkpoint``; the test is skipped without one."""
    checkpoint = pytestconfig.getoption("--omni-checkpoint")
    if not isinstance(checkpoint, Path):
        pytest.skip(_NO_CHECKPOINT)
    return checkpoint


@pytest.fixture
def omni_golden(request: pytest.FixtureRequest) -> OmniGolden:
    """``omni_golden.check(value)`` compares with, or writes, a golden named after the test."""
    try:
        found = version("syrupy")
    except PackageNotFoundError:
        found = "0"
    if tuple(int(part) for part in found.split(".")[:3] if part.isdecimal()) < _SYRUPY:
        pytest.fail(
            f"omni_golden needs syrupy {'.'.join(map(str, _SYRUPY))} or newer, "
            f"found {'none' if found == '0' else found}: pip install 'omni-grpo-core[pytest]'",
            pytrace=False,
        )
    from omni_grpo_core.golden.pytest_fixture import OmniGolden
    from omni_grpo_core.golden.syrupy_ext import case_and_stage

    case, _ = case_and_stage(request.node.name, 0)
    cases = request.config.stash.setdefault(_CASES, {})
    return OmniGolden(request.getfixturevalue("snapshot"), case, request.node.nodeid, cases)


@pytest.fixture
def omni_parity(pytestconfig: pytest.Config) -> OmniParity:
    """``omni_parity(a, b, data=FILE)`` fails unless two input paths give the model the same."""
    from omni_grpo_core.parity.pytest_fixture import OmniParity

    return OmniParity(pytestconfig.getoption("--omni-checkpoint"))
