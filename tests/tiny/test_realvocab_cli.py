"""``omni-grpo realvocab build``: a processor folder, or one message and nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from omni_grpo_core.tiny.realvocab import ranks as ranks_module

Run = Callable[..., tuple[int, str, str]]


def test_a_folder_and_one_object(ranks: Path, tmp_path: Path, run_cli: Run) -> None:
    out = tmp_path / "qwen"
    code, stdout, _ = run_cli("realvocab", "build", out, "--json")
    told = json.loads(stdout)
    assert (code, told["processor"]) == (0, str(out))
    assert told["known_ids"]["<|VIDEO|>"] == [151656]
    vocabulary = json.loads((out / "vocab.json").read_text(encoding="utf-8"))
    assert (vocabulary["</"], vocabulary["think"]) == (522, 26865)

    code, stdout, stderr = run_cli("realvocab", "build", out)
    assert (code, stdout) == (2, "")
    assert "found a folder that already holds something" in stderr


def test_without_the_package_that_carries_the_ranks(
    tmp_path: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_module, "find_spec", lambda name: None)
    code, stdout, stderr = run_cli("realvocab", "build", tmp_path / "qwen", "--json")
    assert (code, json.loads(stdout)["error"]["got"]) == (2, "no package dashscope")
    assert "pip install 'omni-grpo-core[qwen]'" in stderr
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_not_there_is_known_before_the_work(tmp_path: Path, run_cli: Run) -> None:
    code, _, stderr = run_cli("realvocab", "build", tmp_path / "nowhere" / "qwen")
    assert (code, "No such file or directory" in stderr) == (2, True)
