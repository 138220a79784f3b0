"""``omni-grpo data check``: every row is read, not only those up to the first bad one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omni_grpo_core import tiny
from omni_grpo_core.errors import DataError
from omni_grpo_core.training.data_check import check_data

Run = Callable[..., tuple[int, str, str]]
CLIP = tiny.data_file().parent / "clip-00.mp4"
GOOD: dict[str, Any] = {
    "problem": "Which colour?",
    "problem_type": "multiple choice",
    "options": ["A. red", "B. blue"],
    "solution": "<answer>B</answer>",
    "data_type": "video",
    "path": str(CLIP),
}
ROWS: list[dict[str, Any]] = [
    GOOD,
    {"prompt": "What is 6 times 7?", "solution": "42"},
    {"prompt": "What is 6  times 7?", "solution": "42"},
    {"prompt": "What is 6 times 7?", "solution": "43"},
    {**GOOD, "problem_type": "numerical", "solution": "<answer>a few</answer>"},
    {**GOOD, "path": "none.mp4"},
    {"question": "Why?"},
    {"prompt": "so " * 40_000, "solution": "yes"},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_what_is_in_a_file_and_what_is_wrong_with_it(file: Path) -> None:
    report = check_data(file)
    assert (report.rows, report.ok, report.dialogues) == (8, False, 0)
    assert report.formats == {"trl": 4, "humanomni": 3, "none": 1}
    assert report.problem_types == {"numerical": 3, "multiple choice": 2, "judge": 1}
    assert report.media == {"text only": 4, "video": 2}
    assert [(one.kind, one.origin.rpartition(":")[2]) for one in report.findings] == [
        ("gold", "5"),
        ("file", "6"),
        ("row", "7"),
        ("contradiction", "4"),
    ]
    # the second and third row differ in white space alone
    assert report.repeated == ((f"{file}:3", f"{file}:2"),)
    assert report.tokens is not None
    assert report.tokens.limit == 32_768
    # 120,000 characters, four a token, and the instructions
    origin, tokens = report.tokens.longest[0]
    assert origin == f"{file}:8"
    assert 30_000 <= tokens < 30_200


def test_counts_by_the_checkpoint_s_own_tokenizer(file: Path) -> None:
    """The shipped one has a token for " so", or for its letters: 40,000 words are at least as many
    tokens, beyond its 4,096 positions."""
    report = check_data(file, checkpoint=tiny.checkpoint_dir())
    assert report.tokens is not None
    assert report.tokens.limit == 4096
    assert report.tokens.most >= 40_000
    (length,) = [one for one in report.findings if one.kind == "length"]
    assert length.got.startswith("a prompt of at least ")
    assert "(text: " in length.got


def test_exit_codes_json_and_page(file: Path, tmp_path: Path, run_cli: Run) -> None:
    page = tmp_path / "page.html"
    code, out, _ = run_cli("data", "check", file, "--json", "--html", page)
    found = json.loads(out)
    assert (code, found["ok"], found["rows"], len(found["findings"])) == (1, False, 8, 4)
    html = page.read_text()
    assert "4 of 8 rows cannot be used as they are" in html
    assert "gold answer &#39;a few&#39;" in html
    code, out, _ = run_cli("data", "check", file)
    assert code == 1
    assert "4 of 8 rows cannot be used as they are: gold 1, file 1, row 1, contra" in out
    good = tmp_path / "good.json"
    good.write_text(json.dumps([GOOD]))
    code, out, _ = run_cli("data", "check", good)
    assert (code, out.strip().splitlines()[-1]) == (0, "✓ all 1 row can be used")
    code, _, err = run_cli("data", "check", tmp_path / "none.json")
    assert (code, "no such file" in err) == (2, True)


def test_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(DataError, match="no rows"):
        check_data(tmp_path / "rows.json")


def test_no_torch_is_loaded(file: Path) -> None:
    code = (
        "import sys; from omni_grpo_core.training.data_check import check_data;"
        f"check_data({str(file)!r});"
        "print(*sorted({'torch', 'transformers', 'datasets'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.returncode) == ([], 0), done.stderr
