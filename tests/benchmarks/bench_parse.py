"""Parser compared with the usual regular expression on adversarial completions.

``python tests/benchmarks/bench_parse.py`` prints MB/s of both from 10 kB to 10 MB and the ratio;
``--json`` prints the same as one object. No input is one that the usual expression can reject at
its first character. The expression gets ``--limit`` seconds for each input, in a process of its
own: on many it is quadratic or worse, and 10 MB would take days. If it was stopped, its speed and
the ratio are bounds (``<``, ``>``).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from omni_grpo_core.rewards.parse import parse

# the shape of format rewards in public trainers
USUAL = re.compile(
    r"<context>(.*?)</context>\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>", re.DOTALL
)
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)


def _filled(unit: str) -> Callable[[int], str]:
    return lambda size: unit * (size // len(unit))


INPUTS: dict[str, Callable[[int], str]] = {
    "<context> over and over": _filled("<context>"),
    "sections over and over": _filled("<context>c</context>"),
    "two of three sections": _filled("<context>c</context><think>t</think>"),
    "near tags in an open section": lambda n: "<context>" + "<contex></contex>" * (n // 17),
    "gap of white space": lambda n: "<context>c</context>" + " " * n,
    "well formed, near tags in think": lambda n: (
        "<context>c</context><think>"
        + "</think <answer " * (n // 16)
        + "</think><answer>A</answer>"
    ),
}


def usual(text: str) -> object:
    return USUAL.search(text)


def measure(function: Callable[[str], object], text: str) -> float:
    """Seconds of the fastest of several calls: up to five if quick, one if slow."""
    best = float("inf")
    spent = 0.0
    for _ in range(5):
        started = time.perf_counter()
        function(text)
        best = min(best, time.perf_counter() - started)
        spent += best
        if spent > 1.0:
            break
    return best


def _child(pipe: Connection, name: str, size: int) -> None:
    pipe.send(measure(usual, INPUTS[name](size)))


def measure_usual(name: str, size: int, limit: float) -> tuple[float, bool]:
    """Seconds, and whether it finished within the limit."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.Process(target=_child, args=(theirs, name, size))
    child.start()
    finished = ours.poll(limit)
    seconds = ours.recv() if finished else limit
    child.kill()
    child.join()
    return seconds, finished


def bench(sizes: tuple[int, ...], limit: float) -> list[dict[str, Any]]:
    rows = []
    for name, build in INPUTS.items():
        for size in sizes:
            text = build(size)
            seconds = measure(parse, text)
            usual_seconds, finished = measure_usual(name, size, limit)
            rows.append(
                {
                    "input": name,
                    "bytes": len(text),
                    "seconds": seconds,
                    "mb_per_s": len(text) / 1e6 / seconds,
                    "usual_seconds": usual_seconds,
                    "usual_finished": finished,
                    "usual_mb_per_s": len(text) / 1e6 / usual_seconds,
                    "ratio": usual_seconds / seconds,
                }
            )
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--limit", type=float, default=5.0, help="seconds for the expression")
    arguments.add_argument("--largest", type=int, default=SIZES[-1], help="bytes")
    options = arguments.parse_args()
    rows = bench(tuple(size for size in SIZES if size <= options.largest), options.limit)
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    print(f"{'input':32} {'bytes':>10} {'ours MB/s':>12} {'usual MB/s':>12} {'ratio':>12}")
    for row in rows:
        below, above = ("", "") if row["usual_finished"] else ("<", ">")
        print(
            f"{row['input']:32} {row['bytes']:>10,} {row['mb_per_s']:>12,.1f} "
            f"{below + format(row['usual_mb_per_s'], ',.4f'):>12} "
            f"{above + format(row['ratio'], ',.1f'):>12}"
        )


if __name__ == "__main__":
    main()
