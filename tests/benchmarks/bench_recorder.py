"""What recording costs: a GRPO step's time with the recorder over its time without, in one run.

::

    python tests/benchmarks/bench_recorder.py [--shape tiny] [--pairs 20] [--threads 1] [--json]
    python tests/benchmarks/bench_recorder.py --shape 7b --device cuda [--seconds 240] [--json]

One step: template, media, processor, ``generate`` for a group, a reward, the scoring forward with
gradient checkpointing, backward, SGD. ``tiny`` is the shipped checkpoint; ``7b`` a thinker of
Qwen2.5-Omni-7B's shape with random weights in bfloat16, made on the device (towers frozen, as
trainers do), a synthetic clip of four seconds with sound and four completions of 32 tokens: real
ones are longer, and so are their steps, of which recording is then a smaller share.

Three figures. ``recorded``: of the one step that is recorded, with the recorder's start, probing of
the reward, writing of the folder and end. ``after``: of a step after the last recorded one, inside
the same ``with`` block, where nothing of the recorder should be left. ``run``: of a run of 100
steps of which three are recorded, made of both. ``7b`` has the first only, as time is short there.

To tell the cost from the noise of a machine, the steps of a round do the same work (one seed, one
number of tokens) right after each other, every second round in the other order, and the cost is the
median of the rounds' ratios with the interval that holds it in 95 of 100 runs (order statistics: no
distribution is assumed). Twice: in seconds that pass, and in seconds of CPU that this process used,
which other processes hardly change. ``--seconds``: no round is begun later than this after the
first; fewer than ``--pairs`` are then said to be fewer.
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

RUN, RECORDED = 100, 3
"""Steps of a run, and those that are recorded by default."""


@dataclass(frozen=True, slots=True)
class Shape:
    """``frames`` of ``pixels`` squared, at two per second; ``group`` completions of ``tokens``;
    whether the step ``after`` the recorded one is timed."""

    frames: int
    pixels: int
    group: int
    tokens: int
    after: bool


class Times(NamedTuple):
    """Seconds that passed, and seconds of CPU."""

    wall: float
    cpu: float


class Round(NamedTuple):
    """A step without the recorder, the recorded one, and the next."""

    plain: Times
    recorded: Times
    after: Times | None

    def shares(self, clock: int) -> dict[str, float]:
        """What recording adds, by figure.

        >>> times = [Times(wall, 0.0) for wall in (1.0, 1.5, 1.0)]
        >>> Round(*times).shares(0)
        {'recorded': 0.5, 'after': 0.0, 'run': 0.015}
        """
        plain = self.plain[clock]
        recorded = self.recorded[clock] / plain - 1
        if self.after is None:
            return {"recorded": recorded}
        after = self.after[clock] / plain - 1
        run = (RECORDED * recorded + (RUN - RECORDED) * after) / RUN
        return {"recorded": recorded, "after": after, "run": run}


class Cost(NamedTuple):
    """The share that recording adds: median of the rounds, and its 95 % interval."""

    median: float
    low: float
    high: float


def cost(shares: Sequence[float]) -> Cost:
    """
    >>> cost([n / 100 for n in range(20)])
    Cost(median=0.095, low=0.05, high=0.14)
    """
    shares = sorted(shares)
    count, below, tail = len(shares), 0, 0.0
    # the median lies outside the k-th lowest and highest with twice P(fewer than k heads of n)
    while (tail := tail + math.comb(count, below) / 2**count) <= 0.025:
        below += 1
    below = max(below, 1)
    rounded = (statistics.median(shares), shares[below - 1], shares[-below])
    return Cost(*(round(share, 4) for share in rounded))


SHAPES = {"tiny": Shape(4, 56, 4, 48, after=True), "7b": Shape(8, 336, 4, 32, after=False)}


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

    def recorded(self, folder: Path) -> tuple[Times, Times | None]:
        """The recorded step, and the one after it."""
        recorder = record(
            folder,
            model=self.model,
            processor=self.processor,
            reward_funcs=self.rewards,
            steps=1,
        )

        def first() -> None:
            recorder.start()
            self.step()

        found = self.timed(first), self.timed(self.step) if self.shape.after else None
        recorder.stop()
        return found

    def round(self, folder: Path, *, reverse: bool) -> Round:
        if reverse:
            recorded, after = self.recorded(folder)
            return Round(self.timed(self.step), recorded, after)
        return Round(self.timed(self.step), *self.recorded(folder))

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


def rounds(loop: Loop, folder: Path, pairs: int, seconds: float) -> list[Round]:
    say = functools.partial(print, file=sys.stderr, flush=True)
    begun = time.perf_counter()
    loop.round(folder / "warm-up", reverse=False)
    say(f"a round takes {time.perf_counter() - begun:.1f} s at first")
    found: list[Round] = []
    begun = time.perf_counter()
    while len(found) < pairs and time.perf_counter() - begun < seconds:
        number = len(found)
        found.append(loop.round(folder / f"round-{number}", reverse=bool(number % 2)))
    say(f"{len(found)} rounds took {time.perf_counter() - begun:.1f} s")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loop = Loop(load(arguments.shape, arguments.device, folder), SHAPES[arguments.shape])
        found = rounds(loop, folder, arguments.pairs, arguments.seconds)
        step = folder / "round-0" / "step-000000"
        header = json.loads((step / "trace.json").read_text(encoding="utf-8"))["header"]
        size = sum(file.stat().st_size for file in step.iterdir())
    costs = {
        clock: {
            figure: cost([one.shares(at)[figure] for one in found])
            for figure in found[0].shares(at)
        }
        for at, clock in enumerate(Times._fields)
    }
    plain = {
        clock: statistics.median(one.plain[at] for one in found)
        for at, clock in enumerate(Times._fields)
    }
    if arguments.json:
        result = {
            "shape": arguments.shape,
            "device": arguments.device,
            "pairs": len(found),
            "plain_seconds": {clock: round(held, 4) for clock, held in plain.items()},
            "cost": {
                clock: {figure: share._asdict() for figure, share in shares.items()}
                for clock, shares in costs.items()
            },
            "bytes": size,
            "not_recorded": header.get("not_recorded", ""),
        }
        print(json.dumps(result))
        return
    for clock, shares in costs.items():
        print(f"{clock}: {plain[clock]:.3f} s a step; recording adds, in {len(found)} rounds,")
        for figure, share in shares.items():
            print(f"  {figure:<9} {share.median:+.1%} ({share.low:+.1%} to {share.high:+.1%})")
    print(f"{size / 1e6:.2f} MB a step; not recorded: {header.get('not_recorded', 'nothing')}")


if __name__ == "__main__":
    main()
