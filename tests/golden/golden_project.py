"""A small project under git with its own goldens: two text rows, the tiny checkpoint."""

from __future__ import annotations

import copy
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.golden.pending import regen
from omni_grpo_core.golden.review import accept
from omni_grpo_core.golden.suite import Suite, load_suite

KEY = "cpu-fp32"
REASON = "the first golden of this project"
SUITE = """
cases:
  words: {rows: [20]}
  other: {rows: [21]}
"""


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout


def make_project(folder: Path) -> Path:
    """A clean tree with a suite; returns the golden folder."""
    golden = folder / "golden"
    golden.mkdir(parents=True)
    (golden / "suite.yaml").write_text(SUITE)
    (folder / "code.py").write_text("x = 1\n")
    (folder / ".gitignore").write_text("golden/.pending/\n")
    git(folder, "init", "-q")
    git(folder, "config", "user.name", "Ann")
    git(folder, "config", "user.email", "ann@example.org")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "start")
    return golden


def with_goldens(folder: Path, policy: Policy) -> tuple[Path, Suite]:
    """A project whose goldens were made and accepted."""
    golden = make_project(folder)
    suite = load_suite(golden)
    regen(policy, suite, golden, KEY)
    accept(golden, ["words", "other"], REASON, suite)
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "goldens")
    return golden, suite


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under ``folder``, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def doubled(policy: Policy) -> Policy:
    """The head doubled: logits change, ids and embeddings do not."""
    changed = replace(policy, model=copy.deepcopy(policy.model))
    with torch.no_grad():
        changed.model.lm_head.weight.mul_(2.0)
    return changed


@pytest.fixture(scope="module")
def template(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project") / "one"
    with_goldens(folder, policy)
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path) -> tuple[Path, Suite]:
    """A fresh project with accepted goldens."""
    shutil.copytree(template, tmp_path / "project")
    golden = tmp_path / "project" / "golden"
    return golden, load_suite(golden)
