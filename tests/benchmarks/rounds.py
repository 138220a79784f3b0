"""Is the suite flaky? Round after round, each in another random order, on a loaded machine.

``python tests/benchmarks/rounds.py [--rounds 20] [--first-seed 0] [PYTEST ARGUMENTS]``

A round's seed reproduces its order: ``pytest -n 2 --random-order --random-order-seed=SEED``. Tests
are shuffled within their files, and the files as well; which worker gets which depends on the load.
Exit code 1 if a round failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

BUSY = "while True: pass"


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Processes that keep one core each busy."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def one_round(seed: int, workers: int, arguments: list[str]) -> list[str]:
    """Run the suite, print the outcome, and return the lines about failures."""
    order = ["--random-order", f"--random-order-seed={seed}"]
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", str(workers), *order, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    # what failed and how: the round may never fail again
    begins = (at for at, line in enumerate(lines) if re.match("=+ (FAILURES|ERRORS) =+$", line))
    failures = lines[next(begins, -20) :] if done.returncode else []
    seconds = time.perf_counter() - begin
    print(f"seed {seed:3}  {seconds:6.0f} s  exit {done.returncode}  {lines[-1:]}", flush=True)
    for line in failures:
        print(f"  {line}", flush=True)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--busy", type=int, default=2, help="processes that only keep a core busy")
    options, arguments = parser.parse_known_args()
    seeds = range(options.first_seed, options.first_seed + options.rounds)
    with load(options.busy):
        rounds = {seed: one_round(seed, options.workers, arguments) for seed in seeds}
    failed = [seed for seed, lines in rounds.items() if lines]
    print(f"{len(failed)} of {len(rounds)} rounds failed{f': seeds {failed}' if failed else ''}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
