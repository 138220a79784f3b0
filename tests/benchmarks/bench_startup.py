"""What a person waits for before anything happens: the package's import and ``--help``, beside an
interpreter that does nothing.

``python tests/benchmarks/bench_startup.py [RUNS]``
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "import omni_grpo_core": ("-c", "import omni_grpo_core"),
    "omni-grpo --help": ("-m", "omni_grpo_core", "--help"),
}


def seconds(arguments: tuple[str, ...]) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    bare = 0.0
    print(f"{'':24} {'best s':>7} {'median':>7} {'ratio':>6}")
    for name, arguments in COMMANDS.items():
        times = [seconds(arguments) for _ in range(runs)]
        bare = bare or median(times)
        print(f"{name:24} {min(times):7.3f} {median(times):7.3f} {median(times) / bare:6.1f}")


if __name__ == "__main__":
    main()
