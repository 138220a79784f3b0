"""Whether the git tree around a golden folder is clean: the folder itself does not count."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_project import git

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.golden.git_tree import require_git, tree_state


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text("x = 1\n" * 20)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "start")
    return tmp_path


def state(folder: Path) -> str:
    return tree_state(folder)["tree"]


@pytest.mark.parametrize("name", ["golden", "my goldens", 'say "gold"', "göldens", "a -> b", "-x"])
def test_files_in_a_folder_of_any_name_do_not_count(name: str, project: Path) -> None:
    """git escapes such names: goldens in ``göldens`` made their own tree dirty, and were refused
    for it."""
    (project / name / "clip").mkdir(parents=True)
    (project / name / "clip" / "text.txt").touch()
    assert state(project / name) == "clean"
    git(project, "add", ".")
    assert state(project / name) == "clean"
    assert state(project / "elsewhere") == "dirty"


def test_a_file_moved_into_or_out_of_the_folder_counts_and_one_moved_within_does_not(
    project: Path,
) -> None:
    golden = project / "golden"
    golden.mkdir()
    (golden / "a.txt").write_text("a golden\n" * 20)
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "a golden")
    git(project, "mv", "golden/a.txt", "golden/b.txt")
    assert state(golden) == "clean"
    git(project, "mv", "golden/b.txt", "b.txt")
    assert state(golden) == "dirty"
    git(project, "mv", "b.txt", "golden/a.txt")
    git(project, "mv", "code.py", "golden/code.py")
    assert state(golden) == "dirty"


def test_what_a_killed_command_left_does_not_count(project: Path) -> None:
    """A killed ``golden init --accept`` left a hidden folder that made the tree dirty: the next one
    was refused."""
    left = project / ".golden.0123456789ab.partial"
    left.mkdir()
    (left / "suite.yaml").touch()
    assert state(project / "golden") == "clean"
    (project / ".golden.partial").touch()
    assert state(project / "golden") == "dirty"


def test_a_refusal_names_what_changed(project: Path) -> None:
    """The page of ``golden init --html`` had made the tree dirty, and nothing said that it had."""
    for number in range(5):
        (project / f"page-{number}.html").touch()
    with pytest.raises(
        ConfigError, match=r"dirty \(page-0.html, page-1.html, page-2.html and 2 more"
    ):
        require_git(project / "golden")
