"""If a package of an extra is not installed: what is missing, what for, and how to get it."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from omni_grpo_core import tiny
from omni_grpo_core.errors import MissingExtra
from omni_grpo_core.io.extras import EXTRAS, extra, require
from omni_grpo_core.rewards import accuracy

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
EXTRAS_OF_PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]
TOOLS = {"all", "docs", "lint", "pytest", "suite", "test", "tox"}
"""Extras that no module here imports from, and the plugin's, which pytest itself reports."""
RUN = {
    "checkpoint": str(tiny.checkpoint_dir()),
    "data": str(tiny.data_file()),
    "rewards": {"context": {}},
    "settings": {"group_size": 4, "max_new_tokens": 24},
    "batch_size": 16,
    "micro_batch_size": 8,
    "judge": {"base_url": "http://127.0.0.1:9/v1", "model": "m"},
}


def omni_grpo(missing: str, *arguments: str | Path) -> tuple[int, dict[str, str]]:
    """Exit code and error of a command in a separate process."""
    done = subprocess.run(
        [sys.executable, HERE / "without_packages.py", missing, *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    error: dict[str, str] = json.loads(done.stdout)["error"]
    return done.returncode, error


@pytest.mark.parametrize(
    ("name", "package", "command"),
    [
        ("train", "accelerate", ("train", "run.json")),
        ("judge", "httpx", ("train", "run.json")),
        ("judge", "tenacity", ("train", "run.json")),
        ("rewards", "jiwer", ("rewards", "test", "accuracy")),
        ("rewards", "math_verify", ("rewards", "test", "accuracy")),
        ("rewards", "rouge_score", ("rewards", "test", "accuracy")),
        ("qwen", "dashscope", ("realvocab", "build", "new")),
    ],
)
def test_a_command_without_a_package_names_its_extra(
    name: str, package: str, command: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({**RUN, "out": str(tmp_path / "out")}))
    placed = [tmp_path / word if word in ("run.json", "new") else word for word in command]
    code, error = omni_grpo(package, *placed)
    assert code == 2
    assert error["got"] == f"no package {package}"
    assert error["fix"] == f"pip install 'omni-grpo-core[{name}]'"


def test_rows_whose_measure_is_not_installed_are_refused_at_once(
    tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base install scores multiple choice and numbers; a row it cannot score is reported at
    once, not minutes later when the first completion is scored."""
    row = {"problem": "What does the sign say?", "problem_type": "OCR", "data_type": "text"}
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{**row, "path": "", "solution": "<answer>exit</answer>"}]))
    monkeypatch.setitem(sys.modules, "jiwer", None)  # as if it were not installed
    code, out, _ = run_cli("check", "--data", rows, "--json")
    assert (code, json.loads(out)["error"]["got"]) == (2, "no package jiwer")


def test_the_table_matches_pyproject() -> None:
    assert EXTRAS.keys() == EXTRAS_OF_PYPROJECT.keys() - TOOLS
    (everything,) = map(Requirement, EXTRAS_OF_PYPROJECT["all"])
    assert everything.extras == EXTRAS.keys() - {"low-memory", "vllm"} | {"pytest"}
    assert "omni-grpo-core[all,docs]" in EXTRAS_OF_PYPROJECT["suite"]
    assert "omni-grpo-core[suite]" in EXTRAS_OF_PYPROJECT["test"]
    names = {Requirement(line).name for line in EXTRAS_OF_PYPROJECT["rewards"]}
    assert {name.replace("-", "_") for name in names} == set(accuracy.PACKAGES)


def test_it_is_an_import_error_that_keeps_its_cause() -> None:
    with pytest.raises(ImportError, match=r"omni-grpo-core\[judge\]") as caught, extra("judge"):
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401
    assert isinstance(caught.value, MissingExtra)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_broken_package_is_not_called_missing() -> None:
    with pytest.raises(ImportError) as caught, extra("judge"):
        from json import no_such_name  # type: ignore[attr-defined]  # noqa: F401
    assert not isinstance(caught.value, MissingExtra)


def test_locating_a_package_does_not_import_it() -> None:
    (spec,) = require("qwen", "dashscope")
    assert spec.name == "dashscope"
    assert "dashscope" not in sys.modules
