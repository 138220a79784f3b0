"""``omni-grpo realvocab build``: a processor folder, or one message and nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.slow
def test_a_folder_and_one_object(ranks: Path, tmp_path: Path, run_cli: Run) -> None:
    out = tmp_path / "qwen"
    code, stdout, _ = run_cli("realvocab", "build", out, "--json")
    printed = json.loads(stdout)
    assert (code, printed["processor"]) == (0, str(out))
    assert printed["known_ids"]["<|VIDEO|>"] == [151656]
    vocabulary = json.loads((out / "vocab.json").read_text(encoding="utf-8"))
    assert (vocabulary["</"], vocabulary["think"]) == (522, 26865)


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, run_cli: Run) -> None:
    (tmp_path / "vocab.json").touch()
    code, stdout, stderr = run_cli("realvocab", "build", tmp_path)
    assert (code, stdout) == (2, "")
    assert "found a folder that is not empty" in stderr


def test_a_missing_parent_folder_is_reported_before_the_work(tmp_path: Path, run_cli: Run) -> None:
    code, _, stderr = run_cli("realvocab", "build", tmp_path / "nowhere" / "qwen")
    assert (code, "No such file or directory" in stderr) == (2, True)
