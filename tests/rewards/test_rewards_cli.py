"""``omni-grpo rewards test`` as people use it: in another process, with their own module."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from omni_grpo_core.rewards import conformance

Run = Callable[..., tuple[int, str, str]]

THEIRS = """
print("imported")

def bribed(prompts, completions, **columns):
    print("called")
    return [0.1] * len(completions)
"""


@pytest.fixture(autouse=True)
def standing_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that a function takes is tested elsewhere, with a fake clock."""
    monkeypatch.setattr(conformance, "run", partial(conformance.run, clock=lambda: 0.0))


@pytest.fixture
def invoke(run_cli: Run) -> Run:
    return partial(run_cli, "rewards", "test")


def test_json_is_one_object_with_functions_cases_and_failures(invoke: Run) -> None:
    code, out, _ = invoke("format", "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["ok"], report["failures"]) == (True, [])
    assert [function["name"] for function in report["functions"]] == ["format"]
    assert report["cases"] == len(report["functions"][0]["values"])


def test_a_bad_function_of_a_local_module_exits_1_with_its_cases(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(THEIRS, encoding="utf-8")
    command = "from omni_grpo_core.cli.rewards import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", command, "test", "mine:bribed", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)
    assert done.returncode == 1, done.stderr
    assert {failure["check"] for failure in report["failures"]} == {"garbage", "gold"}
    assert any(failure["case"] == "OCR: empty" for failure in report["failures"])


def test_the_table_shows_each_failure_once_for_all_problem_types(invoke: Run) -> None:
    code, out, _ = invoke("format", "people_focus", "--top", "0.5")
    assert code == 1
    assert "Failures of format" in out
    lines = out.partition("Failures of people_focus")[2].splitlines()
    [gold] = [line for line in lines if "gold" in line]
    cells = [cell.strip() for cell in gold.strip("│").split("│")]
    assert cells == ["gold", "gold", "8", "1", "the top, 0.5"]


def test_a_function_that_cannot_be_loaded_exits_2_with_one_message(invoke: Run) -> None:
    code, out, err = invoke("no_such_module_here:f")
    assert (code, out) == (2, "")
    assert err.startswith(
        "error: config: reward 'no_such_module_here:f': found ModuleNotFoundError"
    )
    code, out, _ = invoke("no_such_module_here:f", "--json")
    assert code == 2
    assert json.loads(out)["error"]["item"] == "reward 'no_such_module_here:f'"
