"""Building: complete or not at all, and reproducible."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.tiny.recipe import build


def test_a_path_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="wanted a new folder"):
        build(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_no_steps_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        build(tmp_path / "out", steps=0)
    with pytest.raises(ConfigError, match="stop: found 0"):
        build(tmp_path / "out", stop=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_same_seed_builds_the_same_folder(tmp_path: Path) -> None:
    first = build(tmp_path / "a", seed=5, steps=6)
    second = build(tmp_path / "b", seed=5, steps=6)
    assert first == second
    names = {file.name for file in (tmp_path / "a").iterdir()}
    assert names == {file.name for file in (tmp_path / "b").iterdir()}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert {folder.name for folder in tmp_path.iterdir()} == {"a", "b"}
