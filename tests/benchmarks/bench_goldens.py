"""What goldens cost: seconds of a check and kilobytes, for 10, 100 and 1,000 cases.

``python tests/benchmarks/bench_goldens.py [CASES...]``
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from omni_grpo_core import tiny
from omni_grpo_core.core.policy import load_policy
from omni_grpo_core.golden.checking import check
from omni_grpo_core.golden.pending import record
from omni_grpo_core.golden.suite import Case, load_suite

KEY = "cpu-fp32"
ROWS = 22


def main() -> None:
    torch.set_num_threads(1)
    policy = load_policy(tiny.checkpoint_dir())
    print(f"{'cases':>6} {'record s':>9} {'check s':>9} {'ms/case':>8} {'kB/case':>8}")
    for count in [int(word) for word in sys.argv[1:]] or [10, 100, 1000]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            cases = {f"case-{n}": Case((n % ROWS,)) for n in range(count)}
            suite = replace(load_suite(folder), cases=cases)
            begin = time.process_time()
            files = record(policy, suite, folder, KEY)
            middle = time.process_time()
            report = check(policy, suite, folder, KEY)
            end = time.process_time()
            assert report.verdict == "exact", report.verdict
            size = sum(path.stat().st_size for path in files)
        print(
            f"{count:6} {middle - begin:9.1f} {end - middle:9.1f} "
            f"{1000 * (end - middle) / count:8.0f} {size / count / 1000:8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
