"""How a command ends on each mutated input.

Many inputs run in one process, forked from the table's fork server; a process that dies or does not
answer is replaced.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import runner
from fuzz_inputs import WHOLE, mutated, subjects, write

LIMIT = 120.0
"""Seconds without an answer that count as a hang; an input takes about 0.05 s."""
_MEMORY = 4 << 30
"""Bytes of address space that a command may use beyond what its process has at the start."""


@dataclass(frozen=True)
class Answer:
    """How one input ended. ``code``: negative for a signal, ``None`` for a hang. ``problem``: what
    is wrong with the ending, empty if nothing is."""

    subject: str
    number: int
    code: int | None
    problem: str

    @property
    def fine(self) -> bool:
        return self.code in (0, 1, 2) and not self.problem


SHARES: Mapping[str, int] = {
    "trace": 240,
    "trace as JSON": 100,
    "golden": 250,
    "suite and tolerances": 70,
    "rows": 140,
    "settings": 60,
    "run": 60,
    "state": 60,
    "checkpoint": 20,
}
"""Per thousand inputs. Loading a whole checkpoint takes longest."""


def probe() -> Any:
    """What commands read before loading a model, as separate commands."""
    import typer

    app = typer.Typer()

    @app.command()
    def suite(folder: Path) -> None:
        from omni_grpo_core.golden.suite import load_suite
        from omni_grpo_core.golden.tolerances import load_tolerances

        found = load_suite(folder)
        load_tolerances(folder, "cpu-fp32")
        for name in found.cases:
            found.run_settings(name)

    @app.command()
    def rows(file: Path) -> None:
        from omni_grpo_core.core.sample import load_samples

        load_samples(file)

    @app.command()
    def settings(checkpoint: Path) -> None:
        from omni_grpo_core.pipeline.settings import load_settings

        load_settings(checkpoint)

    @app.command()
    def run(file: Path) -> None:
        from omni_grpo_core.training.load_config import load_train_config

        load_train_config(file)

    @app.command()
    def state(out: Path) -> None:
        from omni_grpo_core.training.checkpointing import newest, truncate_log
        from omni_grpo_core.training.config import TrainConfig

        newest(out, TrainConfig())
        truncate_log(out / "log.jsonl", 2)

    @app.command()
    def policy(checkpoint: Path) -> None:
        from omni_grpo_core.core.policy import load_policy

        load_policy(checkpoint)

    return app


def work(link: Connection, seed: int, inputs: Sequence[tuple[str, int]], folder: Path) -> None:
    """Run inputs one after another, in a separate process, and send how each ended."""
    from omni_grpo_core.cli.main import app
    from omni_grpo_core.io.exits import run

    os.setsid()
    probes = probe()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    os.environ["TMPDIR"] = str(folder)  # where a traceback goes
    for stream in (sys.stdout, sys.stderr):
        os.dup2(
            os.open(folder / f"{stream.name}", os.O_RDWR | os.O_CREAT | os.O_TRUNC), stream.fileno()
        )
    for name, number in inputs:
        subject = subjects()[name]
        place = folder / "input"
        write(place, subject, mutated(name, seed, number))
        os.chdir(place)
        for handle in (1, 2):
            os.lseek(handle, 0, os.SEEK_SET)
            os.truncate(handle, 0)
        commands = app if subject.words[0] in ("doctor", "golden") else probes
        code = run(lambda commands=commands: commands, subject.words)  # type: ignore[misc]
        sys.stderr.flush()
        link.send(Answer(name, number, code, _wrong(subject.words, code, folder)))
        os.chdir(folder)
        shutil.rmtree(place)
        gc.collect()


def _wrong(words: Sequence[str], code: int, folder: Path) -> str:
    """What is wrong with the ending, empty if nothing is."""
    out, err = ((folder / name).read_bytes() for name in ("<stdout>", "<stderr>"))
    report = next((p.read_text() for p in folder.glob("omni-grpo-*.txt")), "")
    for path in folder.glob("omni-grpo-*.txt"):
        path.unlink()
    if code not in (0, 1, 2):
        return (err.decode("utf-8", "replace") + report)[-6000:]
    if code == 2 and b"error: " not in err:
        return "no message"
    if "--json" in words:
        try:
            json.loads(out.decode("utf-8"))
        except ValueError as error:
            return f"not JSON on stdout: {error}: {out[:300]!r}"
    return ""


def plan(count: int) -> list[tuple[str, int]]:
    """``count`` inputs, by subject and number; each subject begins with its unmutated input."""
    total = sum(SHARES.values())
    return [
        (name, number)
        for name, share in SHARES.items()
        for number in (WHOLE, *range(count * share // total))
    ]


def answers(seed: int, inputs: Sequence[tuple[str, int]], folder: Path) -> Iterator[Answer]:
    """The ending of each input, in order, from one process at a time."""
    left = list(inputs)
    while left:
        ours, theirs = runner.CONTEXT.Pipe(duplex=False)
        folder.mkdir(parents=True, exist_ok=True)
        worker = runner.start(work, theirs, seed, left, folder)
        theirs.close()
        while left:
            answer = _next(ours, worker, left[0])
            left.pop(0)
            yield answer
            if answer.code is None or answer.code < 0:
                break
        worker.kill()
        worker.join()
        ours.close()
        shutil.rmtree(folder)


def _next(ours: Connection, worker: Any, expected: tuple[str, int]) -> Answer:
    if not ours.poll(LIMIT):
        return Answer(*expected, None, f"no answer within {LIMIT:g} seconds")
    try:
        found = ours.recv()
    except EOFError:
        worker.join()
        return Answer(*expected, -abs(worker.exitcode or 1), f"the process died: {worker.exitcode}")
    assert isinstance(found, Answer)
    return found
