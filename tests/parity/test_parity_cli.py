"""``omni-grpo parity``: exit codes, one JSON object, stored traces, a page, another Python; and the
fixture ``omni_parity``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omni_grpo_core import tiny
from omni_grpo_core.parity.pytest_fixture import OmniParity

Run = Callable[..., tuple[int, str, str]]


def rows(folder: Path, *numbers: int) -> Path:
    """Some of the shipped rows, counted from 1."""
    every = json.loads(tiny.data_file().read_text(encoding="utf-8"))
    data = folder / "rows.json"
    data.write_text(json.dumps([every[number - 1] for number in numbers]), encoding="utf-8")
    return data


def parity(run_cli: Run, data: Path, *args: object) -> tuple[int, str, str]:
    return run_cli("parity", *args, "--data", data, "--root", tiny.data_file().parent)


def test_transformers_takes_other_frames_of_a_clip(run_cli: Run, tmp_path: Path) -> None:
    """Row 15 is a silent clip of 8 frames, of which 4 are taken: transformers takes frames
    k * 8 // 4, that is 0 2 4 6; qwen-omni-utils, with which the published models were trained,
    rounds k * 7 / 3, to 0 2 5 7. A picture, a recording and text (17, 19, 21) are the same."""
    pytest.importorskip("transformers", minversion="4.57")  # before, its template passes no rate
    data = rows(tmp_path, 15, 17, 19, 21)
    page, kept = tmp_path / "page.html", tmp_path / "kept"
    code, out, err = parity(
        run_cli, data, "ours", "transformers", "--json", "--html", page, "--traces", kept
    )
    found = json.loads(out)
    assert (code, err) == (1, "")
    assert (found["equal"], found["rows"], found["same_ids"]) == (False, 4, 4)
    assert found["verdicts"] == {"equal": 3, "within": 0, "differs": 1, "failed": 0}
    assert found["causes"] == {"other-frames": {"rows": ["rows.json:1"], "smallest": "rows.json:1"}}
    first = found["details"][0]
    assert first["stage"] == "media"
    assert first["causes"][0]["sentence"] == (
        "video 0: frames 0 2 4 6 of the file's 8, where the first takes 0 2 5 7"
    )
    text = page.read_text(encoding="utf-8")
    assert "3 of 4 rows alike" in text
    assert "other-frames" in text

    # the stored sides are compared again, without either path
    code, out, _ = parity(run_cli, data, kept / "a", kept / "b", "--json")
    again = json.loads(out)
    assert code == 1
    assert (again["a"]["path"], again["b"]["path"]) == ("ours", "transformers")
    assert again["details"] == found["details"]
    code, out, _ = parity(run_cli, data, kept / "a", "ours")
    assert code == 0
    assert "4 of 4 rows alike, ids in 4" in out


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("ours", "theirs"), "input path theirs: found no path of that name and no folder"),
        (
            ("ours", "nowhere:collate"),
            "input path nowhere:collate: found No module named 'nowhere'",
        ),
        (
            ("ours", "json:none"),
            "input path json:none: found module 'json' has no attribute 'none'",
        ),
    ],
)
def test_a_path_that_there_is_not(
    paths: tuple[str, str], message: str, run_cli: Run, tmp_path: Path
) -> None:
    code, out, err = parity(run_cli, rows(tmp_path, 21), *paths)
    assert (code, out) == (2, "")
    assert message in err


def test_a_missing_library_is_named(
    run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm.config", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    code, _, err = parity(run_cli, rows(tmp_path, 21), "ours", "vllm")
    assert code == 2
    assert "input path vllm: found no vllm" in err
    assert "--python-b" in err


def test_traces_of_other_rows_are_refused(run_cli: Run, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    assert parity(run_cli, rows(tmp_path, 19, 21), "ours", "ours", "--traces", kept)[0] == 0
    code, _, err = parity(run_cli, rows(tmp_path, 19), "ours", kept / "a")
    assert code == 2
    assert "found 2 rows where the first has 1" in err


def test_the_real_vocabulary_without_weights_or_config(
    run_cli: Run, tmp_path: Path, qwen_folder: Path
) -> None:
    """Only the processor's files: everything but positions is compared."""
    code, out, _ = parity(
        run_cli, rows(tmp_path, 17, 21), "ours", "transformers", "--checkpoint", qwen_folder,
        "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert list(found["details"][0]["stages"]) == ["text", "media", "batch"]
    # a picture of 56 x 56 pixels is 2 by 2 tokens of 28
    assert [row["a_media"] for row in found["details"]] == ["4 image", "no media"]


@pytest.mark.slow
def test_a_path_in_another_python(run_cli: Run, tmp_path: Path) -> None:
    code, out, _ = parity(
        run_cli, rows(tmp_path, 13, 17), "ours", "ours", "--python-b", sys.executable
    )
    assert code == 0
    assert "2 of 2 rows alike" in out
    code, _, err = parity(run_cli, rows(tmp_path, 21), "ours", "ours", "--python-b", "/bin/false")
    assert code == 2
    assert "input path ours in /bin/false: found exit code 1" in err


def test_the_fixture(omni_parity: OmniParity, tmp_path: Path) -> None:
    """What a project writes beside its own collate function."""

    def collate(messages: list[dict[str, Any]], processor: Any) -> dict[str, Any]:
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return dict(processor([text] if isinstance(text, str) else text))

    assert omni_parity("ours", collate, data=rows(tmp_path, 21, 22)).equal

    def forgetful(messages: list[dict[str, Any]], processor: Any) -> dict[str, Any]:
        text = processor.apply_chat_template(messages, tokenize=False)
        return dict(processor([text] if isinstance(text, str) else text))

    with pytest.raises(pytest.fail.Exception) as caught:
        omni_parity("ours", forgetful, data=rows(tmp_path, 21, 22))
    message = str(caught.value)
    assert "forgetful differ" in message
    assert "no-generation-prompt: 2 of 2 rows, rows.json:1: the end is missing" in message

    def wrong(messages: list[dict[str, Any]], processor: Any) -> dict[str, Any]:
        return {"labels": []}

    with pytest.raises(pytest.fail.Exception, match=r"rows.json:1: found no input_ids among lab"):
        omni_parity("ours", wrong, data=rows(tmp_path, 21))
    known = omni_parity("ours", forgetful, data=rows(tmp_path, 21), known=["no-generation-prompt"])
    assert not known.equal
