"""What goldens cost: seconds of a record and of a check, and kilobytes.

::

    python tests/benchmarks/bench_goldens.py [CASES...]
    python tests/benchmarks/bench_goldens.py --shape 7b --device cuda

By default the shipped checkpoint and 10, 100 and 1,000 cases. ``7b``: ten cases of real length, one
of each kind, on a thinker of Qwen2.5-Omni-7B's shape with random weights in bfloat16. They never
end a completion by themselves, so each case is charged with all 256 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

import numpy as np
import PIL.Image
import torch
from media_files import tone, write_media

from omni_grpo_core import tiny
from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.golden.checking import check, contexts
from omni_grpo_core.golden.environment import platform_key
from omni_grpo_core.golden.pending import record
from omni_grpo_core.golden.suite import Case, Suite, load_suite, shipped_goldens
from omni_grpo_core.pipeline.inputs import prepare

ROWS = 22
CASES = {
    "video-10s-interleaved": Case((0,)),
    "video-30s-interleaved": Case((1,)),
    "video-60s-interleaved": Case((2,)),
    "video-10s-separate": Case((3,)),
    "video-30s-silent": Case((4,)),
    "image-720p": Case((5,)),
    "image-and-audio": Case((6,)),
    "audio-60s": Case((7,)),
    "text": Case((8,)),
    "padded": Case((8, 5, 0)),
}


def long_rows(folder: Path) -> Path:
    """A data file with nine rows, and their media: 640 x 360 at 25 frames a second."""
    random = np.random.default_rng(0)
    for seconds in (10, 30, 60):
        coarse = random.integers(0, 256, (seconds * 25, 9, 16, 3), dtype=np.uint8)
        frames = coarse.repeat(40, axis=1).repeat(40, axis=2)
        sound = tone(seconds, 48_000, hertz=300 + seconds)
        write_media(folder / f"{seconds}.mp4", frames, sound, fps=25)
        if seconds == 30:
            write_media(folder / "silent.mp4", frames, fps=25)
    for seconds in (10, 60):
        wave = tone(seconds, 16_000)
        write_media(
            folder / f"{seconds}.wav", audio=wave, audio_rate=16_000, audio_codec="pcm_s16le"
        )
    PIL.Image.fromarray(random.integers(0, 256, (720, 1280, 3), dtype=np.uint8)).save(
        folder / "720.png"
    )
    paths = [
        *({"video": f"{seconds}.mp4"} for seconds in (10, 30, 60)),
        {"video": "10.mp4", "audio": "10.wav"},
        {"video": "silent.mp4"},
        {"image": "720.png"},
        {"image": "720.png", "audio": "10.wav"},
        {"audio": "60.wav"},
        {},
    ]
    rows = [
        {
            "problem": "What happens here, and what is heard while it happens? Say it in a word.",
            "problem_type": "free-form",
            "solution": "<answer>Nothing</answer>",
            "data_type": next(iter(path), "text"),
            "path": path,
        }
        for path in paths
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def measured(
    policy: Policy, suite: Suite, key: str, clock: Callable[[], float]
) -> tuple[float, float, int]:
    """Seconds of a record, of a check against it, and bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = clock()
        files = record(policy, suite, folder, key)
        middle = clock()
        report = check(policy, suite, folder, key)
        end = clock()
        assert report.verdict in ("exact", "within"), report.cases
        return middle - begin, end - middle, sum(path.stat().st_size for path in files)


def tiny_shape(counts: list[int]) -> None:
    torch.set_num_threads(1)
    policy = load_policy(tiny.checkpoint_dir())
    print(f"{'cases':>6} {'record s':>9} {'check s':>9} {'ms/case':>8} {'kB/case':>8}")
    for count in counts:
        cases = {f"case-{n}": Case((n % ROWS,)) for n in range(count)}
        suite = replace(load_suite(shipped_goldens()), cases=cases)
        made, checked, size = measured(policy, suite, "cpu-fp32", time.process_time)
        print(
            f"{count:6} {made:9.1f} {checked:9.1f} {1000 * checked / count:8.0f} "
            f"{size / count / 1000:8.1f}",
            flush=True,
        )


def full_shape(device: str) -> None:
    # of the GPU tests; it needs a CUDA device
    from full_shape import random_7b

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = random_7b(folder / "processor")
        suite = Suite(
            data=str(long_rows(folder)),
            checkpoint=str(folder / "processor"),
            cases=CASES,
            file=str(folder / "suite.yaml"),
        )
        key = platform_key(device, "bfloat16")
        total = (0.0, 0.0, 0)
        print(f"{'case':>22} {'tokens':>7} {'record s':>9} {'check s':>8} {'kB':>6}")
        for case, context in contexts(policy, suite, tuple(CASES)).items():
            ids = prepare(policy, context.samples, context.settings).batch.input_ids
            found = measured(
                policy, replace(suite, cases={case: CASES[case]}), key, time.perf_counter
            )
            made, checked, size = found
            total = (total[0] + made, total[1] + checked, total[2] + size)
            print(
                f"{case:>22} {ids.numel():7} {made:9.1f} {checked:8.1f} {size / 1000:6.0f}",
                flush=True,
            )
        made, checked, size = total
        memory = torch.cuda.max_memory_allocated() / 1e9
        print(
            f"{'all ten':>22} {'':7} {made:9.1f} {checked:8.1f} {size / 1000:6.0f}\n"
            f"peak memory on the device: {memory:.1f} GB, weights included"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("counts", nargs="*", type=int, default=[10, 100, 1000], metavar="CASES")
    parser.add_argument("--shape", choices=("tiny", "7b"), default="tiny")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    if given.shape == "7b":
        full_shape(given.device)
    else:
        tiny_shape(given.counts)
