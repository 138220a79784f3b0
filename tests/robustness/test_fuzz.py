"""Mutated traces, goldens, configurations, rows and training states: exit code 0, 1 or 2.

``OMNI_GRPO_FUZZ_SEED`` and ``OMNI_GRPO_FUZZ_COUNT`` reproduce a run of the slow environment. Inputs
that ended differently are kept in pytest's cache (``.pytest_cache/d/fuzz``), each in a folder with
its output.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fuzz
import pytest
from fuzz_inputs import WHOLE, mutated, subjects, write

_COUNT = 20_000
_PROCESSES = 2
_KEPT = 20


def endings(seed: int, count: int, processes: int, folder: Path) -> list[fuzz.Answer]:
    inputs = fuzz.plan(count)

    def share(of: int) -> list[fuzz.Answer]:
        return list(fuzz.answers(seed, inputs[of::processes], folder / str(of)))

    with ThreadPoolExecutor(processes) as threads:
        return [answer for found in threads.map(share, range(processes)) for answer in found]


def keep(seed: int, wrong: Sequence[fuzz.Answer], place: Path) -> None:
    """Keep the inputs for inspection."""
    for answer in wrong[:_KEPT]:
        folder = place / f"{seed}-{answer.subject.replace(' ', '-')}-{answer.number}"
        shutil.rmtree(folder, ignore_errors=True)
        subject = subjects()[answer.subject]
        write(folder / "input", subject, mutated(answer.subject, seed, answer.number))
        words = " ".join(subject.words)
        (folder / "output.txt").write_text(f"{words}: exit {answer.code}\n{answer.problem}\n")


def shown(seed: int, answers: Sequence[fuzz.Answer]) -> str:
    """A summary: the seed, and how the inputs of each subject ended."""
    lines = [f"fuzz: seed {seed}, {len(answers)} inputs"]
    for name in fuzz.SHARES:
        codes = Counter(answer.code for answer in answers if answer.subject == name)
        counts = ", ".join(f"{n} exit {code}" for code, n in sorted(codes.items(), key=str))
        lines.append(f"  {name}: {counts}")
    lines += [
        f"  {a.subject} {a.number}: exit {a.code}: {a.problem.strip()[-1500:]}"
        for a in answers
        if not a.fine
    ][:_KEPT]
    return "\n".join(lines)


def judge(
    seed: int, count: int, processes: int, folder: Path, request: pytest.FixtureRequest
) -> str:
    found = endings(seed, count, processes, folder)
    wrong = [answer for answer in found if not answer.fine]
    if wrong:
        keep(seed, wrong, request.config.cache.mkdir("fuzz"))
    summary = shown(seed, found)
    assert len(found) == len(fuzz.plan(count))
    assert not wrong, summary
    refused = [answer for answer in found if answer.number == WHOLE and answer.code == 2]
    assert not refused, "valid input is refused, and with it every mutation of it"
    return summary


def test_some_hundred_inputs_end_as_they_should(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The same inputs in every run."""
    judge(0, 300, 1, tmp_path, request)


@pytest.mark.slow
def test_many_inputs_end_as_they_should(
    tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("OMNI_GRPO_FUZZ_SEED", secrets.randbelow(1 << 32)))
    count = int(os.environ.get("OMNI_GRPO_FUZZ_COUNT", _COUNT))
    summary = judge(seed, count, _PROCESSES, tmp_path, request)
    with capsys.disabled():
        print(f"\n{summary}")
