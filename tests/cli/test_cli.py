"""The command line: exit codes, one JSON object, and one message for bad input."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omni_grpo_core import __version__, tiny
from omni_grpo_core.io import NEWEST, newer_than_tested

Run = Callable[..., tuple[int, str, str]]


def rows(folder: Path, *changes: dict[str, Any]) -> Path:
    """A data file with one video row per change, beside a copy of a shipped clip."""
    shutil.copy(tiny.data_file().parent / "clip-00.mp4", folder / "clip.mp4")
    base = next(
        row for row in json.loads(tiny.data_file().read_text()) if row.get("data_type") == "video"
    )
    data = folder / "rows.json"
    data.write_text(json.dumps([{**base, "path": "clip.mp4", **change} for change in changes]))
    return data


def test_version(run_cli: Run) -> None:
    assert run_cli("--version") == (0, f"omni-grpo {__version__}\n", "")


ENDING = """
import atexit, os, sys
atexit.register(os.abort)
from omni_grpo_core.__main__ import main
sys.argv = ["omni-grpo", "--version"]
main()
"""


def test_one_of_several_processes_ends_without_the_interpreter() -> None:
    """Of fourteen finished runs of two sharded processes three ended with code -6: a thread of gloo
    freed a tensor while the interpreter ended. Here something else aborts there."""
    environment = {**os.environ, "WORLD_SIZE": "2"}
    ended = subprocess.run(
        [sys.executable, "-c", ENDING], env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, f"omni-grpo {__version__}\n"), ended.stderr


def test_a_newer_transformers_is_warned_about_once(
    run_cli: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A plain install got transformers 5.24 the day it came out: commands crashed in it or called
    every run broken, and nothing said that it was untested."""
    known = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: "5.26.0" if name == "transformers" else known(name),
    )
    code, _, stderr = run_cli("check", "--data", tmp_path / "none.json")
    lines = stderr.splitlines()
    assert code == 2
    assert lines[0].startswith(f"warning: transformers 5.26.0 is newer than {NEWEST}, the newest")
    assert [line for line in lines if line.startswith("warning")] == lines[:1]
    monkeypatch.setenv("RANK", "1")  # one of several processes
    assert "warning" not in run_cli("check", "--data", tmp_path / "none.json")[2]


@pytest.mark.parametrize(
    ("installed", "warned"),
    [(NEWEST, False), ("5.17.0", False), ("5.24.1", True), ("5.25.0.dev0", True), ("6", True),
     ("mine", False)],
)  # fmt: skip
def test_which_transformers_is_newer_than_tested(installed: str, warned: bool) -> None:
    assert (newer_than_tested(installed) is not None) == warned


def test_the_path_of_the_tiny_checkpoint(run_cli: Run) -> None:
    assert Path(run_cli("tiny", "path")[1].strip()) == tiny.checkpoint_dir()


def _missing(folder: Path) -> list[object]:
    return ["--data", rows(folder, {"path": "gone.mp4"})]


def _zero(folder: Path) -> list[object]:
    data = rows(folder, {})
    (folder / "clip.mp4").write_bytes(b"")
    return ["--data", data]


def _truncated(folder: Path) -> list[object]:
    data = rows(folder, {})
    clip = folder / "clip.mp4"
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    return ["--data", data]


def _text_as_mp4(folder: Path) -> list[object]:
    data = rows(folder, {})
    (folder / "clip.mp4").write_text("this is not a clip\n" * 100)
    return ["--data", data]


def _twice(folder: Path) -> list[object]:
    data = rows(folder, {"data_type": "video", "path": {"video": "clip.mp4", "audio": "clip.mp4"}})
    return ["--data", data, "--audio-in-video", "interleaved"]


def _problem_type(folder: Path) -> list[object]:
    return ["--data", rows(folder, {"problem_type": "riddle"})]


def _config_key(folder: Path) -> list[object]:
    (folder / "run.yaml").write_text("grup_size: 4\n")
    return ["--data", rows(folder, {}), "--config", folder / "run.yaml"]


def _checkpoint(folder: Path) -> Path:
    shutil.copytree(tiny.checkpoint_dir(), folder / "checkpoint")
    return folder / "checkpoint"


def _no_processor(folder: Path) -> list[object]:
    checkpoint = _checkpoint(folder)
    (checkpoint / "preprocessor_config.json").unlink()
    return ["--data", rows(folder, {}), "--checkpoint", checkpoint]


def _architecture(folder: Path) -> list[object]:
    checkpoint = _checkpoint(folder)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    return ["--data", rows(folder, {}), "--checkpoint", checkpoint]


def _long_prompt(folder: Path) -> list[object]:
    (folder / "run.json").write_text('{"max_prompt_length": 50}')
    return ["--data", rows(folder, {}), "--config", folder / "run.json"]


def _no_folder_for_html(folder: Path) -> list[object]:
    return ["--data", rows(folder, {}), "--html", folder / "nowhere" / "page.html"]


BAD: dict[str, tuple[Callable[[Path], list[object]], list[str]]] = {
    "missing file": (_missing, ["gone.mp4"]),
    "zero bytes": (_zero, ["media", "clip.mp4"]),
    "truncated mp4": (_truncated, ["media", "clip.mp4"]),
    "text named .mp4": (_text_as_mp4, ["media", "clip.mp4"]),
    "clip listed twice": (_twice, ["conversation", "counted twice"]),
    "unknown problem type": (_problem_type, ["sample", "riddle", "multiple choice"]),
    "unknown config key": (_config_key, ["config", "grup_size", "group_size"]),
    "no processor": (_no_processor, ["policy", "preprocessor_config.json"]),
    "another architecture": (_architecture, ["policy", "llama", "qwen2_5_omni"]),
    "prompt too long": (_long_prompt, ["batch", "tokens, wanted at most 50"]),
    "no folder for the page": (_no_folder_for_html, ["page.html"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message_and_exit_code_2(name: str, tmp_path: Path, run_cli: Run) -> None:
    prepare, words = BAD[name]
    given = tmp_path / "given"
    given.mkdir()
    arguments = prepare(given)
    before = sorted(tmp_path.rglob("*"))
    out = [] if "--html" in arguments else ["--html", tmp_path / "page.html"]
    code, stdout, stderr = run_cli("check", *arguments, *out, "--trace", tmp_path / "trace")
    assert (code, stdout) == (2, "")
    messages = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1
    assert "Traceback" not in stderr
    for word in [*words, ": found ", ", wanted ", "; "]:
        assert word in messages[0]
    assert sorted(tmp_path.rglob("*")) == before, "nothing half-written"


def test_bad_input_as_json(tmp_path: Path, run_cli: Run) -> None:
    code, stdout, _ = run_cli("check", *_problem_type(tmp_path), "--json")
    assert code == 2
    assert json.loads(stdout)["error"]["stage"] == "sample"


@pytest.mark.parametrize("arguments", [["--limit", "0"], ["--device", "tpu"], ["--nonsense"]])
def test_bad_usage_is_exit_code_2(arguments: list[str], run_cli: Run) -> None:
    assert run_cli("check", *arguments)[0] == 2


def test_check_as_json_from_an_empty_folder(
    run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own it runs in .ci/run, before the suite."""
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = run_cli("check", "--json", "--html", "page.html")
    assert code == 0, stderr
    result = json.loads(stdout)
    assert result["verdict"] == "pass"
    assert {"name", "ok", "checks", "seconds"} == set(result["stages"][0])
    assert [stage["name"] for stage in result["stages"]][:5] == [
        "sample",
        "conversation",
        "text",
        "media",
        "batch",
    ]
    assert {"image", "video", "audio"} == set(result["modalities"])
    for proof in result["modalities"].values():
        assert {"accuracy", "without", "swapped", "moved", "shift"} < set(proof)
        assert proof["accuracy"] > max(proof["without"], proof["swapped"])
    assert 0 < result["health"]["reward_mean"] <= 1
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
