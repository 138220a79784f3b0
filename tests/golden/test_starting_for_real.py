"""``golden init`` from an empty folder on, in its own processes: with git, without, and killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from golden_project import contents, git

from omni_grpo_core import tiny
from omni_grpo_core.golden.text import parse_golden, read_text

pytestmark = pytest.mark.slow

KILLS = 50
INIT = "golden init golden --checkpoint model --data rows/samples.json"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
# Plans once, then forks a process per init, so that init is killed, not the imports. It prints how
# many changes init made to the disk.
WORKER = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from killed import die_before_change
from omni_grpo_core.golden.new_suite import Sources
from omni_grpo_core.golden.starting import Approval, plan_suite, start_suite
plan = plan_suite(Sources(Path("rows/samples.json"), Path("model")), most=1, steps=0)
for line in sys.stdin:
    accept, kill = line.split()
    pid = os.fork()
    if pid == 0:
        changes = die_before_change(None if kill == "None" else int(kill))
        approval = Approval("the first goldens") if accept == "True" else None
        start_suite(Path("golden"), plan, approval=approval)
        print(changes(), flush=True)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        print(0, flush=True)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of the shipped checkpoint and rows, and nothing else."""
    folder = tmp_path / "mine"
    shutil.copytree(tiny.checkpoint_dir(), folder / "model")
    shutil.copytree(tiny.data_file().parent, folder / "rows")
    monkeypatch.chdir(folder)
    return folder


def omni_grpo(line: str) -> tuple[int, str]:
    """Exit code and stdout of a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "omni_grpo_core", *line.split()],
        capture_output=True, text=True, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def header(case: str) -> dict[str, str]:
    file = Path("golden", case, "text.txt")
    return dict(parse_golden(read_text(file), str(file)).header)


def test_from_an_empty_repository_to_a_check_that_passes(here: Path) -> None:
    """It took a dozen steps, of which the documentation named two."""
    git(here, "init", "-q")
    code, out = omni_grpo(f"{INIT} --accept --reason first --steps 1")
    assert code == 0, out
    assert "11 cases, 133 stages" in out
    code, out = omni_grpo("golden check --json")
    assert (code, json.loads(out)["verdict"]) == (0, "exact")
    assert len(json.loads(out)["cases"]) == 11
    assert omni_grpo("golden verify")[0] == 0
    assert header("padded")["reason"] == "first"
    assert header("padded")["tree"] == "under git without a commit"
    # from the first commit on, it finds what somebody does to the model's input
    git(here, "add", ".")
    git(here, "commit", "-q", "-m", "start")
    rows = Path("rows/samples.json")
    rows.write_text(rows.read_text().replace("What colour", "Which colour"))
    assert omni_grpo("golden check image-multiple-choice-short")[0] == 1
    assert omni_grpo("golden check text-multiple-choice-short")[0] == 0


def test_without_git_only_if_told_so_and_on_record(here: Path) -> None:
    assert omni_grpo(f"{INIT} --cases 2 --accept --reason first") == (2, "")
    assert not Path("golden").exists()
    code, out = omni_grpo(f"{INIT} --cases 2 --accept --reason first --no-git")
    assert code == 0, out
    assert omni_grpo("golden check")[0] == 0
    assert header("padded")["git"] == "not required (--no-git)"


def test_a_second_checkpoint_is_compared_with_the_first(here: Path) -> None:
    assert omni_grpo(f"{INIT} --cases 1 --accept --reason first --no-git")[0] == 0
    shutil.copytree(tiny.checkpoint_dir("qwen3"), "next")
    code, out = omni_grpo("golden check --checkpoint next --json")
    assert (code, json.loads(out)["first"]) == (1, "text")


@contextmanager
def worker() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", WORKER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
    ) as process:  # fmt: skip
        yield process
        assert process.stdin is not None
        process.stdin.close()


def run(process: subprocess.Popen[str], accept: bool, kill: int | None) -> int:
    """How many changes init made to the disk; 0 if it was killed before the change ``kill``."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{accept} {kill}\n")
    process.stdin.flush()
    return int(process.stdout.readline())


@pytest.mark.parametrize("accept", [False, True])
def test_killed_at_any_moment_there_is_a_whole_suite_or_none(accept: bool, here: Path) -> None:
    git(here, "init", "-q")
    git(here, "add", ".")
    git(here, "commit", "-q", "-m", "start")
    golden = Path("golden")
    with worker() as process:
        changes = run(process, accept, None)
        whole = {*contents(golden)}
        assert len(whole) == 13
        assert all(name.startswith(".pending/") != accept for name in whole - {"suite.yaml"})
        missing = 0
        for number in range(KILLS):
            shutil.rmtree(golden, ignore_errors=True)
            run(process, accept, number * changes // KILLS)
            missing += not golden.exists()
            assert {*contents(golden)} in (set(), whole)
        assert missing > KILLS // 2
        # what the killed ones left is in nobody's way
        left = [path.name for path in here.iterdir() if path.name.startswith(".golden.")]
        assert len(left) > KILLS // 2
        shutil.rmtree(golden, ignore_errors=True)
        assert run(process, accept, None)
    assert {*contents(golden)} == whole
    assert omni_grpo("golden check")[0] == (0 if accept else 1)
