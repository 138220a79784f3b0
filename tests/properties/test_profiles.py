"""Examples of property tests: always the same in the suite, new ones in the slow profile."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.database import DirectoryBasedExampleDatabase


def test_the_suite_draws_no_new_examples() -> None:
    """Two runs of one commit failed on an example that no other run had drawn."""
    profile = settings.get_profile("default")
    assert profile.derandomize
    assert profile.database is None
    assert profile.deadline is None


def test_the_slow_profile_keeps_its_examples_in_the_project(pytestconfig: pytest.Config) -> None:
    profile = settings.get_profile("slow")
    assert not profile.derandomize
    assert profile.print_blob
    assert isinstance(profile.database, DirectoryBasedExampleDatabase)
    kept = Path(profile.database.path)
    assert kept == pytestconfig.rootpath / ".hypothesis" / "examples"
