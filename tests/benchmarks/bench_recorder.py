"""What recording costs: a GRPO step's time with and without the recorder, in one run.

::

    python tests/benchmarks/bench_recorder.py [--shape tiny] [--pairs 8] [--threads 1]
    python tests/benchmarks/bench_recorder.py --shape 7b --device cuda [--pairs 5]

One step: template, media, processor, ``generate`` for a group, a reward, the scoring forward with
gradient checkpointing, backward, SGD. ``tiny`` is the shipped checkpoint; ``7b`` a thinker of
Qwen2.5-Omni-7B's shape with random weights in bfloat16 (towers frozen, as trainers do), a synthetic
clip with sound and full-length completions. Steps without and with recording alternate, after one
of each to warm up; a recorded step includes writing its folder. Prints one JSON object: seconds,
the share that recording adds (median of the pairs, and all of them), bytes on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def step(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
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
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def recorded(self, folder: Path) -> float:
        with record(
            folder,
            model=self.model,
            processor=self.processor,
            reward_funcs=self.rewards,
            steps=1,
        ):
            return self.step()


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
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loop = Loop(load(arguments.shape, arguments.device, folder), SHAPES[arguments.shape])
        loop.step()
        loop.recorded(folder / "warm-up")
        plain, recorded = [], []
        for pair in range(arguments.pairs):
            plain.append(loop.step())
            recorded.append(loop.recorded(folder / str(pair)))
        step = folder / "0" / "step-000000"
        header = json.loads((step / "trace.json").read_text(encoding="utf-8"))["header"]
        result = {
            "shape": arguments.shape,
            "device": arguments.device,
            "plain_seconds": round(statistics.median(plain), 4),
            "recorded_seconds": round(statistics.median(recorded), 4),
            "share": round(
                statistics.median(r / p - 1 for r, p in zip(recorded, plain, strict=True)), 4
            ),
            "shares": [round(r / p - 1, 4) for r, p in zip(recorded, plain, strict=True)],
            "bytes": sum(file.stat().st_size for file in step.iterdir()),
            "not_recorded": header.get("not_recorded", ""),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
