"""Does GRPO improve the policy? Held-out accuracy during training, on several seeds.

::

    python tests/benchmarks/bench_training.py OUT [--start DIR] [--seeds 0 1 2] [--steps 360]

The start is an under-trained tiny checkpoint, ``omni-grpo tiny build OUT/start --stop 100`` (100 of
the recipe's 900 steps), unless ``--start`` names one. Training uses clips of the train combinations
of attributes; accuracy is measured on combinations that neither this training nor the recipe has
seen. The settings below were chosen on the select split; the held-out one is only evaluated on.

Each seed runs twice, the second time with the sound dropped: pitch can then only be guessed, and
the accuracy stays at what video alone allows. In one more run every sound is silenced on disk: the
guard must stop it at step 0 and report why. Writes ``OUT/training.json`` after every run and, if
matplotlib is installed, ``OUT/training.png``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import av
import numpy as np
import torch

from omni_grpo_core.core.policy import load_policy
from omni_grpo_core.pipeline.settings import load_settings
from omni_grpo_core.tiny.clips import Clip, Split, combinations
from omni_grpo_core.tiny.questions import TOPICS, ask
from omni_grpo_core.tiny.recipe import build
from omni_grpo_core.tiny.shipped import row
from omni_grpo_core.training.config import GuardConfig, OptimizerConfig, RewardEntry, TrainConfig
from omni_grpo_core.training.evaluation import Evaluator
from omni_grpo_core.training.loop import train
from omni_grpo_core.training.run import LOG

UNDER_TRAINED = 100
"""Of the recipe's 900 steps: on the select split 0.40 of sampled answers are right, 0.50 of greedy
ones; colour and pitch are half known, motion not at all."""


def write_rows(folder: Path, split: Split, *, copies: int, first_seed: int) -> Path:
    """Every combination of a split ``copies`` times, asked about colour, motion and pitch."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(first_seed)
    cast = [
        Clip(attributes, seed=first_seed + number)
        for number, attributes in enumerate(list(combinations(split)) * copies)
    ]
    rows = [
        {**row(ask(clip, "interleaved", rng, (topic,)), folder), "topic": topic}
        for clip in cast
        for topic in TOPICS
    ]
    for topic in TOPICS:
        _write(folder / f"{topic}.json", [one for one in rows if one["topic"] == topic])
    return _write(folder / "samples.json", rows)


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    plain = [{key: value for key, value in one.items() if key != "topic"} for one in rows]
    path.write_text(json.dumps(plain))
    return path


def silenced(data: Path, out: Path) -> Path:
    """The same rows, every clip's sound replaced by zeros: what a broken decoder returns."""
    shutil.copytree(data.parent, out)
    for clip in sorted(out.glob("*.mp4")):
        whole = clip.with_suffix(".with-sound.mp4")
        clip.rename(whole)
        with av.open(str(whole)) as was, av.open(str(clip), "w") as now:
            picture, sound = was.streams.video[0], was.streams.audio[0]
            copied = now.add_stream_from_template(picture)
            silent = now.add_stream("aac", rate=sound.rate)
            for packet in was.demux(picture, sound):
                if packet.stream is picture and packet.dts is not None:
                    packet.stream = copied
                    now.mux(packet)
                elif packet.stream is sound:
                    for frame in packet.decode():
                        quiet = av.AudioFrame.from_ndarray(
                            np.zeros_like(frame.to_ndarray()),
                            format=frame.format.name,
                            layout=frame.layout.name,
                        )
                        quiet.sample_rate = frame.sample_rate
                        now.mux(silent.encode(quiet))
            now.mux(silent.encode(None))
        whole.unlink()
    return out / data.name


def configuration(
    out: Path, checkpoint: Path, data: Path, held_out: Path, seed: int, steps: int, sound: bool
) -> TrainConfig:
    """6 prompts x 8 completions per step, temperature 1, accuracy and format."""
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
        optimizer=OptimizerConfig(lr=5e-4, schedule="linear", warmup_steps=5, final=0.1),
        seed=seed,
        save_every=0,
        eval_every=40,
        # 6 groups of 8: near the end most are all right, which is not a dead run
        guard=GuardConfig(patience=steps),
        trackers=(),
    )


def measure(config: TrainConfig) -> dict[str, Any]:
    """One run: held-out accuracy before it, during it, and by topic after it."""
    before = Evaluator(config).accuracy(load_policy(config.checkpoint))
    begin, worked = time.perf_counter(), time.process_time()
    result = train(config)
    seconds, core_seconds = time.perf_counter() - begin, time.process_time() - worked
    lines = [json.loads(line) for line in _log(config)]
    curve = [[0, before["eval/accuracy"], before["eval/accuracy_greedy"]]] + [
        [line["step"] + 1, line["eval/accuracy"], line["eval/accuracy_greedy"]]
        for line in lines
        if "eval/accuracy" in line
    ]
    return {
        "seed": config.seed,
        "status": result.status,
        "step": result.step,
        "findings": [str(finding) for finding in result.findings],
        "seconds": round(seconds, 1),
        # all threads together: what it costs on a machine that is busy with other things
        "core_seconds": round(core_seconds, 1),
        "curve": [[step, round(a, 4), round(b, 4)] for step, a, b in curve],
        "rise": round(curve[-1][1] - curve[0][1], 4),
        "rise_greedy": round(curve[-1][2] - curve[0][2], 4),
        "topics": by_topic(config, result.model),
        "reward": [round(line["reward"], 4) for line in lines],
    }


def _log(config: TrainConfig) -> list[str]:
    path = Path(config.out) / LOG
    return path.read_text().splitlines() if path.is_file() else []


def by_topic(config: TrainConfig, model: Path | None) -> dict[str, float]:
    """Sampled accuracy on each topic, for the policy at the end."""
    if model is None or config.eval_data is None:
        return {}
    policy = load_policy(model)
    return {
        topic: round(
            Evaluator(
                replace(config, eval_data=str(Path(config.eval_data).with_name(f"{topic}.json")))
            ).accuracy(policy)["eval/accuracy"],
            4,
        )
        for topic in TOPICS
    }


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Sampled held-out accuracy by step, one line per run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, run in runs.items():
        if run["status"] == "finished":
            steps, sampled, _ = zip(*run["curve"], strict=True)
            deaf = "without" in name
            colour = f"C{run['seed']}"
            axes.plot(steps, sampled, "--" if deaf else "-", color=colour, marker="o", label=name)
    axes.set(xlabel="optimizer step", ylabel="accuracy on held-out clips (sampled)", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--cores", type=int, default=2, help="for all runs together")
    parser.add_argument("--split", choices=("select", "held-out"), default="held-out")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    start = options.start or out / "start"
    if not start.exists():
        build(start, stop=UNDER_TRAINED)
    data = write_rows(out / "train", "train", copies=2, first_seed=10_000)
    held_out = write_rows(out / options.split, options.split, copies=2, first_seed=20_000)
    quiet = silenced(data, out / "train-silenced")
    wanted = [("sound silenced on disk", options.seeds[0], True, quiet)]
    wanted += [(f"seed {seed}", seed, True, data) for seed in options.seeds]
    wanted += [(f"seed {seed}, without sound", seed, False, data) for seed in options.seeds]
    configs = {
        name: configuration(
            out / name.replace(" ", "-").replace(",", ""),
            start, rows, held_out, seed, options.steps, sound,
        )
        for name, seed, sound, rows in wanted
    }  # fmt: skip
    runs = {}
    spawn = multiprocessing.get_context("spawn")
    threads = max(1, options.cores // options.jobs)
    with spawn.Pool(options.jobs, torch.set_num_threads, (threads,), maxtasksperchild=1) as pool:
        for name, run in zip(configs, pool.imap(measure, configs.values()), strict=True):
            runs[name] = run
            shown = {key: value for key, value in run.items() if key != "reward"}
            print(f"{name}: {json.dumps(shown)}", flush=True)
            (out / "training.json").write_text(json.dumps(runs, indent=1))
    try:
        draw(runs, out / "training.png")
    except ModuleNotFoundError:
        print("no curve: matplotlib is not installed")


if __name__ == "__main__":
    main()
