"""What recording costs: a GRPO step's time with the recorder over its time without, in one run.

::

    python tests/benchmarks/bench_recorder.py [--shape tiny] [--pairs 20] [--threads 1] [--json]
    python tests/benchmarks/bench_recorder.py --shape 7b --device cuda [--pairs 20] [--json]

One step: template, media, processor, ``generate`` for a group, a reward, the scoring forward with
gradient checkpointing, backward, SGD. ``tiny`` is the shipped checkpoint; ``7b`` a thinker of
Qwen2.5-Omni-7B's shape with random weights in bfloat16 (towers frozen, as trainers do), a synthetic
clip with sound and full-length completions. A recorded step includes the recorder's start, writing
its folder, and its end.

To tell the cost from the noise of a machine, both steps of a pair do the same work (one seed, one
number of tokens) right after each other, every second pair in the other order, and the cost is the
median of the pairs' ratios with the interval that holds it in 95 of 100 runs (order statistics: no
distribution is assumed). Twice: in seconds that pass, and in seconds of CPU that this process used,
which other processes hardly change.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

import numpy as np
import torch

from omni_grpo_core import record
from omni_grpo_core.core.policy import Policy, load_policy


@dataclass(frozen=True, slots=True)
class Shape:
    """``frames`` of ``pixels`` squared, at two per second; ``group`` completions of ``tokens``."""

    frames: int
    pixels: int
    group: int
    tokens: int


class Times(NamedTuple):
    """Seconds that passed, and seconds of CPU."""

    wall: float
    cpu: float


class Cost(NamedTuple):
    """The share that recording adds: median of the pairs, and its 95 % interval."""

    median: float
    low: float
    high: float


def cost(plain: Sequence[float], recorded: Sequence[float]) -> Cost:
    """
    >>> cost([1.0] * 20, [1 + n / 100 for n in range(20)])
    Cost(median=0.095, low=0.05, high=0.14)
    """
    shares = sorted(r / p - 1 for r, p in zip(recorded, plain, strict=True))
    count, below, tail = len(shares), 0, 0.0
    # the median lies outside the k-th lowest and highest with twice P(fewer than k heads of n)
    while (tail := tail + math.comb(count, below) / 2**count) <= 0.025:
        below += 1
    below = max(below, 1)
    rounded = (statistics.median(shares), shares[below - 1], shares[-below])
    return Cost(*(round(share, 4) for share in rounded))


SHAPES = {"tiny": Shape(4, 56, 4, 48), "7b": Shape(8, 336, 8, 256)}


def unique_letters(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    return [len(set(text)) / 100 for text in completions]


class Loop:
    def __init__(self, policy: Policy, shape: Shape) -> None:
        self.model, self.processor, self.shape = policy.model, policy.processor, shape
        self.suppressed = [int(i) for i in policy.suppressed.nonzero()[:, 0]]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = not name.startswith(("visual", "audio_tower"))
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-6)
        self.rewards = [unique_letters]
        random = np.random.default_rng(0)
        size = (shape.frames, 3, shape.pixels, shape.pixels)
        self.video = torch.from_numpy(random.integers(0, 256, size, dtype=np.uint8)).float()
        self.audio = random.normal(0, 0.1, 8_000 * shape.frames).astype(np.float32)
        self.messages = [
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": "clip.mp4"},
                    {"type": "text", "text": "What happens here, and what is said?"},
                ],
            }
        ]

    def step(self) -> None:
        group = self.shape.group
        text = self.processor.apply_chat_template(
            self.messages, add_generation_prompt=True, tokenize=False
        )
        text = text if isinstance(text, str) else text[0]
        batch = self.processor(
            text=[text] * group,
            videos=[self.video] * group,
            audio=[self.audio] * group,
            return_tensors="pt",
            padding=True,
            do_resize=False,
            use_audio_in_video=True,
            fps=2.0,
        ).to(self.model.device)
        keywords = {
            key: value.to(self.model.dtype) if value.is_floating_point() else value
            for key, value in batch.items()
        }
        self.model.eval()
        sequences = self.model.generate(
            **keywords,
            use_audio_in_video=True,
            do_sample=True,
            top_k=0,
            temperature=1.0,
            max_new_tokens=self.shape.tokens,
            min_new_tokens=self.shape.tokens,
            suppress_tokens=self.suppressed,
        )
        length = keywords["input_ids"].shape[1]
        completions = self.processor.tokenizer.batch_decode(sequences[:, length:])
        [scores] = [f(prompts=[text] * group, completions=completions) for f in self.rewards]
        rewards = torch.tensor(scores, device=self.model.device)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        self.model.train()
        mask = torch.cat([keywords["attention_mask"], torch.ones_like(sequences[:, length:])], 1)
        inputs = {**keywords, "input_ids": sequences, "attention_mask": mask}
        logits = self.model(**inputs, use_audio_in_video=True).logits[:, length - 1 : -1]
        rows = zip(logits, sequences[:, length:], strict=True)
        scored = torch.stack(
            [row.log_softmax(-1).gather(1, ids[:, None])[:, 0] for row, ids in rows]
        )
        loss = -(torch.exp(scored - scored.detach()) * advantages[:, None]).mean()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def recorded(self, folder: Path) -> None:
        with record(
            folder,
            model=self.model,
            processor=self.processor,
            reward_funcs=self.rewards,
            steps=1,
        ):
            self.step()

    def timed(self, call: Callable[[], None]) -> Times:
        """The same work at every call: one seed, and no garbage of the call before."""
        torch.manual_seed(0)
        gc.collect()
        self._wait()
        begun = Times(time.perf_counter(), time.process_time())
        call()
        self._wait()
        return Times(time.perf_counter() - begun.wall, time.process_time() - begun.cpu)

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()


def load(shape: str, device: str, folder: Path) -> Policy:
    if shape == "7b":
        from full_shape import random_7b

        return random_7b(folder / "processor")
    from omni_grpo_core import tiny

    return load_policy(tiny.checkpoint_dir(), device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loop = Loop(load(arguments.shape, arguments.device, folder), SHAPES[arguments.shape])
        loop.timed(loop.step)
        loop.timed(lambda: loop.recorded(folder / "warm-up"))
        plain, recorded = [], []
        for pair in range(arguments.pairs):
            own = folder / f"pair-{pair}"
            if pair % 2:
                recorded.append(loop.timed(functools.partial(loop.recorded, own)))
            plain.append(loop.timed(loop.step))
            if not pair % 2:
                recorded.append(loop.timed(functools.partial(loop.recorded, own)))
        step = folder / "pair-0" / "step-000000"
        header = json.loads((step / "trace.json").read_text(encoding="utf-8"))["header"]
        size = sum(file.stat().st_size for file in step.iterdir())
    wall, cpu = (cost([p[i] for p in plain], [r[i] for r in recorded]) for i in (0, 1))
    if arguments.json:
        result = {
            "shape": arguments.shape,
            "device": arguments.device,
            "pairs": arguments.pairs,
            "plain_seconds": round(statistics.median(p.wall for p in plain), 4),
            "plain_cpu_seconds": round(statistics.median(p.cpu for p in plain), 4),
            "cost": wall._asdict(),
            "cpu_cost": cpu._asdict(),
            "bytes": size,
            "not_recorded": header.get("not_recorded", ""),
        }
        print(json.dumps(result))
        return
    for name, share, clock in (("passed", wall, 0), ("of CPU", cpu, 1)):
        seconds = statistics.median(p[clock] for p in plain)
        print(
            f"seconds {name}: {seconds:.3f} a step, recording adds {share.median:+.1%} "
            f"({share.low:+.1%} to {share.high:+.1%}, {arguments.pairs} pairs)"
        )
    print(f"{size / 1e6:.2f} MB a step; not recorded: {header.get('not_recorded', 'nothing')}")


if __name__ == "__main__":
    main()
