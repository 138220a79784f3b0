"""Does GRPO make the policy better? Held-out accuracy over a training, on several seeds.

::

    python tests/benchmarks/bench_training.py OUT [--checkpoint DIR] [--seeds 0 1 2] [--steps 80]

Training sees clips of the train combinations of attributes; accuracy is measured on combinations
that neither this training nor the recipe's ever saw. The policy to begin with is a checkpoint (the
shipped one if none is named) whose head is softened, so that sampling goes wrong often. One more
run has the sound taken away: it can only guess the pitch. Writes ``OUT/training.json`` and, where
matplotlib is installed, ``OUT/training.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
from safetensors.torch import load_file, save_file

from omni_grpo_core import tiny
from omni_grpo_core.grpo.evaluation import Examiner
from omni_grpo_core.grpo.train import LOG, train
from omni_grpo_core.grpo.train_config import (
    GuardConfig,
    OptimizerConfig,
    RewardEntry,
    TrainConfig,
)
from omni_grpo_core.policy import load_policy
from omni_grpo_core.settings import load_settings
from omni_grpo_core.tiny.attributes import Split, combinations
from omni_grpo_core.tiny.clips import Clip
from omni_grpo_core.tiny.questions import TOPICS, ask
from omni_grpo_core.tiny.shipped import row

SOFTEN = 0.45
"""The head's weights times this: a policy that knows, but is as good as never sure. Unlike an early
step of the recipe it has something to learn in every kind of question."""


def softened(checkpoint: Path, out: Path) -> Path:
    """A copy of a checkpoint with its head's weights times ``SOFTEN``."""
    if not out.exists():
        shutil.copytree(checkpoint, out)
        weights = load_file(out / "model.safetensors")
        weights["lm_head.weight"] = weights["lm_head.weight"] * SOFTEN
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def write_rows(folder: Path, split: Split, *, copies: int, first_seed: int) -> Path:
    """Every combination of a split ``copies`` times, asked for colour, motion and pitch."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(first_seed)
    cast = [
        Clip(attributes, seed=first_seed + number)
        for number, attributes in enumerate(list(combinations(split)) * copies)
    ]
    rows = [
        row(ask(clip, "interleaved", rng, (topic,)), folder) for clip in cast for topic in TOPICS
    ]
    path = folder / "samples.json"
    path.write_text(json.dumps(rows))
    return path


def configuration(
    out: Path, checkpoint: Path, data: Path, held_out: Path, seed: int, steps: int, sound: bool
) -> TrainConfig:
    """6 prompts x 8 completions a step, temperature 1, accuracy and format."""
    settings = replace(
        load_settings(checkpoint),
        group_size=8,
        max_new_tokens=56,
        audio_in_video="auto" if sound else "off",
    )
    return TrainConfig(
        checkpoint=str(checkpoint),
        data=str(data),
        out=str(out),
        eval_data=str(held_out),
        settings=settings,
        rewards={"accuracy": RewardEntry(), "format": RewardEntry(weight=0.25)},
        steps=steps,
        batch_size=48,
        micro_batch_size=24,
        optimizer=OptimizerConfig(lr=1e-3, schedule="linear", warmup_steps=5, final=0.1),
        seed=seed,
        save_every=0,
        eval_every=20,
        guard=GuardConfig(preflight=False),
        trackers=(),
    )


def measure(config: TrainConfig) -> dict[str, Any]:
    """One run: held-out accuracy before it and along it."""
    before = Examiner(config).accuracy(load_policy(config.checkpoint))
    begin = time.perf_counter()
    result = train(config)
    lines = [json.loads(line) for line in (Path(config.out) / LOG).read_text().splitlines()]
    curve = [[0, before["eval/accuracy"], before["eval/accuracy_greedy"]]] + [
        [line["step"] + 1, line["eval/accuracy"], line["eval/accuracy_greedy"]]
        for line in lines
        if "eval/accuracy" in line
    ]
    return {
        "seed": config.seed,
        "status": result.status,
        "findings": [str(finding) for finding in result.findings],
        "seconds": round(time.perf_counter() - begin, 1),
        "curve": curve,
        "reward": [line["reward"] for line in lines],
        "rise": round(curve[-1][1] - curve[0][1], 4),
        "rise_greedy": round(curve[-1][2] - curve[0][2], 4),
        "settings": asdict(config.settings),
    }


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Sampled held-out accuracy by step, one line a run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, run in runs.items():
        style = "--" if "without" in name else "-"
        steps, sampled, _ = zip(*run["curve"], strict=True)
        axes.plot(steps, sampled, style, marker="o", label=name)
    axes.set(xlabel="optimizer step", ylabel="accuracy on held-out clips (sampled)", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--no-silent-run", action="store_true")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = softened(options.checkpoint or tiny.checkpoint_dir(), out / "softened")
    data = write_rows(out / "train", "train", copies=2, first_seed=10_000)
    held_out = write_rows(out / "held-out", "held-out", copies=1, first_seed=20_000)
    wanted = [(f"seed {seed}", seed, True) for seed in options.seeds]
    if not options.no_silent_run:
        wanted.append(("without sound", 0, False))
    runs = {}
    for name, seed, sound in wanted:
        folder = out / name.replace(" ", "-")
        runs[name] = measure(
            configuration(folder, checkpoint, data, held_out, seed, options.steps, sound)
        )
        print(f"{name}: {runs[name]['curve']} in {runs[name]['seconds']} s", flush=True)
        (out / "training.json").write_text(json.dumps(runs, indent=1))
    try:
        draw(runs, out / "training.png")
    except ModuleNotFoundError:
        print("no curve: matplotlib is not installed")


if __name__ == "__main__":
    main()
