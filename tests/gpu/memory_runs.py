"""Training runs at real sizes on one GPU: the memory of each stage beside its estimate, and runs
that are killed and resumed. Random weights, the shipped processor, nothing is downloaded::

    PYTHONPATH=src:tests python tests/gpu/memory_runs.py --size middle matrix --out figures.json

``matrix`` trains two steps in many settings, within this process; ``full`` and ``lora`` run
``omni-grpo train`` for five, kill it after its fifth step and resume it from the state after the
third; ``refused`` shows how long a refusal takes. ``tiny`` tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState

from omni_grpo_core import tiny
from omni_grpo_core.bench import shapes
from omni_grpo_core.fast import compiled
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.training.config import (
    Fast,
    GuardConfig,
    LoraConfig,
    RewardEntry,
    Tower,
    TrainConfig,
)
from omni_grpo_core.training.loop import StepView, train
from omni_grpo_core.training.memory import GIB, estimate, thinker_shapes
from omni_grpo_core.training.prompt_estimate import PromptSize

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {},
    "middle": {
        "text_config": {
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 16,
            "max_window_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 2,
        },
        "vision_config": {
            "depth": 8, "out_hidden_size": 2048, "fullatt_block_indexes": [3, 7],
        },
        "audio_config": {"encoder_layers": 8, "num_hidden_layers": 8, "output_dim": 2048},
    },
    "7b": {},
}  # fmt: skip
"""Where a size differs from the 7B."""
PICTURE = {"tiny": 64, "middle": 2304, "7b": 3200}
"""Tokens of the picture that every prompt shows."""
TOWERS: tuple[Tower, ...] = ("image", "video", "audio")
STEPS = 2


def make_checkpoint(size: str, folder: Path) -> None:
    shipped = tiny.checkpoint_dir()
    if size == "tiny":
        shutil.copytree(shipped, folder)
        return
    # compiling the layers for each of the settings would take most of the time
    compiled._compilable = lambda policy: False
    sizes = {part: own | SIZES[size].get(part, {}) for part, own in shapes._SIZES_7B.items()}
    with patch.object(shapes, "_SIZES_7B", sizes):
        model = shapes._random_7b("cuda", torch.bfloat16, 0, None)
    model.save_pretrained(folder, max_shard_size="5GB")
    for file in shipped.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)
    del model
    clear()


def make_rows(folder: Path) -> Path:
    """Four rows, each of the same picture."""
    source = tiny.data_file()
    row = next(r for r in json.loads(source.read_text()) if r["data_type"] == "image")
    path = str(source.parent / row["path"])
    rows = [{**row, "path": path, "problem": f"{row['problem']} {index}"} for index in range(4)]
    target = folder / "rows.json"
    target.write_text(json.dumps(rows))
    return target


def base(size: str, checkpoint: Path, rows: Path, out: Path) -> TrainConfig:
    pixels = PICTURE[size] * 28 * 28
    settings = Settings(group_size=8, max_new_tokens=24 if size == "tiny" else 256)
    media = replace(settings.media, image_min_pixels=pixels, image_max_pixels=2 * pixels)
    return TrainConfig(
        checkpoint=str(checkpoint), data=str(rows), out=str(out),
        settings=replace(settings, media=media),
        rewards={"toy_rewards:early_letters": RewardEntry()},
        steps=9, batch_size=8, micro_batch_size=4, freeze=TOWERS, precision="bfloat16",
        device="cpu" if size == "tiny" else "cuda", fast="on", gradient_checkpointing=True,
        guard=GuardConfig(preflight=False, patience=99, garbage=1.0, drift=9.0), trackers=(),
        save_every=0,
    )  # fmt: skip


class EnoughError(Exception):
    """Ends a measured run."""


def measured(name: str, config: TrainConfig) -> dict[str, Any]:
    """The most that each stage held in two steps, in GiB, and the estimate."""
    lines: list[dict[str, Any]] = []
    prompt = shown = 0

    def look(view: StepView) -> None:
        nonlocal prompt, shown
        lines.append(dict(view.record))
        prompt = max(prompt, view.inputs.batch.input_ids.shape[1])
        shown = max(span.length for row in view.inputs.batch.rows for span in row.spans)
        if len(lines) == STEPS:
            raise EnoughError

    clear()
    begin = time.perf_counter()
    failed = None
    try:
        train(config, on_step=look)
    except EnoughError:
        pass
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"[:1500]
    reserved = torch.cuda.memory_reserved() / GIB if torch.cuda.is_available() else 0.0
    clear()
    shutil.rmtree(config.out, ignore_errors=True)
    size = PromptSize(vision=shown, text=prompt - shown)
    found = estimate(config, thinker_shapes(Path(config.checkpoint)), size, world=1)
    estimated = (found.peak - found.always["runtime"]) / GIB
    stages: dict[str, float] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith("memory/"):
                stage = key.removeprefix("memory/")
                stages[stage] = max(value, stages.get(stage, 0.0))
    peak = max(stages.values(), default=0.0)
    row = {
        "name": name, "prompt": prompt, "stages": stages, "peak": peak, "reserved": reserved,
        "always": {part: size / GIB for part, size in found.always.items()},
        "moments": {
            moment: {part: size / GIB for part, size in parts.items()}
            for moment, parts in found.moments.items()
        },
        "estimated_peak": estimated,
        "seconds": [line["seconds"] for line in lines],
        "total_seconds": time.perf_counter() - begin,
        "failed": failed,
    }  # fmt: skip
    ratio = estimated / peak if peak else 0.0
    print(f"{name}: {peak:.2f} GiB ({reserved:.2f} reserved), estimated {estimated:.2f} "
          f"({ratio:.3f}) in {found.worst} {failed or ''}", flush=True)  # fmt: skip
    return row


def clear() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def cases(size: str, plain: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    ways: dict[str, dict[str, Any]] = {
        "lora": {"lora": LoraConfig(), "freeze": ()},
        "float32 adamw": {},
        "float32 adamw_8bit": {"optimizer": replace(plain.optimizer, name="adamw_8bit")},
        "float32 adafactor": {"optimizer": replace(plain.optimizer, name="adafactor")},
        "master": {"trained_weights": "bfloat16_master"},
        "stochastic": {
            "trained_weights": "bfloat16_stochastic",
            "optimizer": replace(plain.optimizer, name="adamw_8bit"),
        },
    }
    offloaded = {**ways["stochastic"], "offload_gradients": True}
    if size == "7b":
        for way in ("lora", "stochastic", "master", "float32 adamw"):
            yield f"{way}, fast", replace(plain, **ways[way])
        yield "stochastic, fast, offloaded", replace(plain, **offloaded)
        yield "lora, plain", replace(plain, **ways["lora"], fast="off", micro_batch_size=2)
        kept: dict[str, Any] = {"gradient_checkpointing": False}
        yield "lora, fast, no checkpointing", replace(plain, **ways["lora"], **kept)
        return
    how: Fast
    for way, changes in ways.items():
        for how in ("on", "off"):
            for checkpointing in (True, False):
                name = f"{way}, {'fast' if how == 'on' else 'plain'}"
                name += "" if checkpointing else ", no checkpointing"
                yield (
                    name,
                    replace(plain, **changes, fast=how, gradient_checkpointing=checkpointing),
                )
    whole: dict[str, Any] = {"micro_batch_size": 8, "fast": "off"}
    yield "lora, plain, one micro-batch", replace(plain, **ways["lora"], **whole)
    yield "float32 adamw, plain, one micro-batch", replace(plain, **whole)
    yield "stochastic, plain, one micro-batch", replace(plain, **ways["stochastic"], **whole)
    yield "stochastic, fast, offloaded", replace(plain, **offloaded)
    yield "stochastic, plain, offloaded", replace(plain, **offloaded, fast="off")
    adafactor = {**ways["float32 adafactor"], "offload_gradients": True}
    yield "float32 adafactor, fast, offloaded", replace(plain, **adafactor)
    two = replace(plain, batch_size=16, micro_batch_size=8)
    yield "float32 adamw, fast, two groups", two
    yield "lora, fast, two groups", replace(two, **ways["lora"])
    yield "float32 adamw, fast, two groups in one", replace(two, micro_batch_size=16)
    yield "float32, fast, all learns", replace(plain, freeze=())
    yield "float32, plain, all learns", replace(plain, freeze=(), fast="off")
    yield "lora, float32", replace(plain, **ways["lora"], precision="float32")
    yield "float32, float32 forward", replace(plain, precision="float32")
    kl = replace(plain.loss, beta=0.1)
    yield "float32 adamw, fast, reference", replace(plain, loss=kl)
    yield "lora, fast, reference", replace(plain, **ways["lora"], loss=kl)
    yield "lora, plain, reference", replace(plain, **ways["lora"], loss=kl, fast="off")


# --------------------------------------------------------------------------- runs of the command


def command(config: TrainConfig, folder: Path) -> subprocess.Popen[str]:
    path = folder / "run.json"
    values = asdict(config)
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "omni_grpo_core", "train", str(path)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def lines_of(out: Path) -> list[dict[str, Any]]:
    log = out / "log.jsonl"
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def until_fifth_step(config: TrainConfig, folder: Path) -> tuple[list[dict[str, Any]], str, float]:
    """Starts the command and kills it when its fifth step is in the log. Also what it printed, and
    the most memory of the machine that it held besides files, GiB."""
    process = command(config, folder)
    out, held = Path(config.out), 0.0
    while process.poll() is None and len(lines_of(out)) < 5:
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = re.search(r"RssAnon:\s+(\d+) kB", status)
            held = max(held, int(found[1]) / 2**20 if found else 0.0)
    lines = lines_of(out)
    process.kill()
    return lines, (process.communicate()[1] or "")[-3000:], held


def resumed(name: str, config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Five steps, saved after the third, killed; then resumed. Its fourth and fifth step must be
    the same again."""
    config = replace(config, save_every=3, steps=9, keep=1, full_determinism=True)
    begin = time.perf_counter()
    first, text, held = until_fifth_step(config, folder)
    middle = time.perf_counter()
    out = Path(config.out)
    saved = {str(p.relative_to(out)): p.stat().st_size for p in out.rglob("*") if p.is_file()}
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in first[:3]))
    again, more, _ = until_fifth_step(config, folder)
    kept = [key for key in (first[0] if first else ()) if not key.startswith(("memory/", "sec"))]
    same = [
        {key: line[key] for key in kept} == {key: other[key] for key in kept}
        for line, other in zip(first[3:5], again[3:5], strict=True)
    ]
    shutil.rmtree(out, ignore_errors=True)
    print(f"{name}: resumed steps equal {same}; {held:.1f} GiB of the machine", flush=True)
    return {
        "name": name, "equal": same, "machine": held, "first": first, "again": again,
        "saved": saved, "seconds": [middle - begin, time.perf_counter() - middle],
        "stderr": [text, more],
    }  # fmt: skip


def refused(name: str, config: TrainConfig, folder: Path) -> dict[str, Any]:
    begin = time.perf_counter()
    process = command(config, folder)
    try:
        text = process.communicate(timeout=60)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        text = f"not refused: {process.communicate()[1]}"
    seconds = time.perf_counter() - begin
    print(f"{name}: exit code {process.returncode} after {seconds:.1f} s: {text}", flush=True)
    return {"name": name, "seconds": seconds, "code": process.returncode, "stderr": text}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="+", choices=("matrix", "full", "lora", "refused"))
    parser.add_argument("--size", choices=tuple(SIZES), default="middle")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="cases of the matrix whose name contains this")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    figures: dict[str, Any] = {"size": arguments.size, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        begin = time.perf_counter()
        make_checkpoint(arguments.size, folder / "checkpoint")
        figures["making"] = time.perf_counter() - begin
        plain = base(arguments.size, folder / "checkpoint", make_rows(folder), folder / "out")
        eight_bit = replace(plain.optimizer, name="adamw_8bit")
        stochastic = replace(plain, trained_weights="bfloat16_stochastic", optimizer=eight_bit)
        for part in arguments.parts:
            if part == "matrix":
                figures[part] = rows = []
                for name, config in cases(arguments.size, plain):
                    if arguments.only in name:
                        rows.append(measured(name, config))
                        arguments.out.write_text(json.dumps(figures, indent=1))
            elif part == "full":
                figures[part] = resumed("all weights", stochastic, folder)
            elif part == "lora":
                adapted = replace(plain, lora=LoraConfig(), freeze=())
                figures[part] = resumed("lora", adapted, folder)
            else:
                kl = replace(plain.loss, beta=0.1)
                figures[part] = refused("with a reference", replace(plain, loss=kl), folder)
            arguments.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
