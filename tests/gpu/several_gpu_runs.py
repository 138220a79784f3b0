"""``omni-grpo train`` at a 7B's shape on ``--world`` GPUs: five steps, saved after the third, one
process killed after the fifth, resumed. Figures beside those of one GPU::

    PYTHONPATH=src:tests python tests/gpu/several_gpu_runs.py lora one full --out figures.json

A group a step for each GPU. Random weights, written once to ``--place``. ``lora``, ``full``: FSDP2
in bfloat16, ``--kept`` with ``fsdp_reshard_after_forward: false``. ``ddp``: LoRA, data-parallel.
``one``, ``one-full``: the same steps on one GPU, for the update's efficiency (all weights fit there
only with bfloat16 weights and eight-bit moments). ``--timed``: the five steps alone, without
``full_determinism``, which costs time, without a state, and with completions that nothing ends
early. ``--size tiny`` tries the script on CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from launched import FSDP, KEPT, Run, command, lines_of
from memory_runs import base, make_checkpoint, make_rows

from omni_grpo_core.training.config import LoraConfig, RewardEntry, TrainConfig
from omni_grpo_core.training.memory import GIB, estimate, thinker_shapes
from omni_grpo_core.training.prompt_estimate import PromptSize

PARTS = ("lora", "full", "ddp", "one", "one-full")
STEPS = 5


def setting(
    size: str, place: Path, out: Path, part: str, tokens: int, world: int, timed: bool
) -> TrainConfig:
    plain = base(size, place / "checkpoint", place / "rows.json", out)
    config = replace(
        plain, batch_size=8 * world, micro_batch_size=8, steps=9, keep=1,
        save_every=0 if timed or part.startswith("one") else 3, full_determinism=not timed,
        rewards={"toy_rewards:early_letters": RewardEntry()},
        settings=replace(plain.settings, max_new_tokens=tokens),
    )  # fmt: skip
    if part == "one-full":
        return replace(
            config, trained_weights="bfloat16_stochastic",
            optimizer=replace(config.optimizer, name="adamw_8bit"),
        )  # fmt: skip
    return config if part == "full" else replace(config, lora=LoraConfig(), freeze=())


def after(out: Path, steps: int) -> Any:
    return lambda: len(lines_of(out)) >= steps


def sizes(out: Path) -> dict[str, int]:
    files = (path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.stat().st_size for path in files}


def apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest relative difference of loss, gradient norm, reward and entropy."""
    names = ("loss", "grad_norm", "reward", "entropy")
    return max(float(abs(one[n] - other[n]) / max(1e-6, abs(one[n]))) for n in names)


def shown(run: Run) -> dict[str, Any]:
    return {
        "codes": run.codes, "seconds": run.seconds, "after_kill": run.after_kill,
        "warnings": [line for text in run.outputs for line in text.splitlines()
                     if "without" in line or "warning:" in line],
        "outputs": [text[-2000:] for text in run.outputs],
    }  # fmt: skip


def measured(
    part: str, config: TrainConfig, folder: Path, world: int, fsdp: Mapping[str, str],
    found: dict[str, Any], keep: Callable[[], None],
) -> None:  # fmt: skip
    """Fills ``found``; ``keep`` writes what is known."""
    world = 1 if part.startswith("one") else world
    kind = fsdp if part in ("lora", "full") else None
    out = Path(config.out)
    shutil.rmtree(out, ignore_errors=True)
    timed = not config.full_determinism
    first = command(
        config, folder, world, kind, kill=after(out, STEPS), victims=(world - 1,), limit=330.0,
        program=("-m", "endless" if timed else "omni_grpo_core", "train"),
    )  # fmt: skip
    lines = lines_of(out)
    found |= {"part": part, "killed": shown(first), "lines": lines, "saved": sizes(out)}
    found |= costs(lines, config, world, kind)
    keep()
    if config.save_every and part != "ddp" and len(lines) >= STEPS:
        kept = "".join(json.dumps(line) + "\n" for line in lines[:3])
        (out / "log.jsonl").write_text(kept)
        again = command(
            config,
            folder,
            world,
            kind,
            kill=after(out, STEPS),
            victims=(*range(world),),
            limit=250.0,
        )
        resumed = lines_of(out)
        pairs = list(zip(lines[3:STEPS], resumed[3:STEPS], strict=False))
        found["resumed"] = shown(again) | {"lines": resumed}
        found["apart"] = [apart(a, b) for a, b in pairs]
    shutil.rmtree(out, ignore_errors=True)
    print(json.dumps({k: found[k] for k in found if k not in ("killed", "resumed", "lines")}))
    print({"codes": first.codes, "after_kill": first.after_kill}, flush=True)


def costs(
    lines: list[dict[str, Any]], config: TrainConfig, world: int, kind: Mapping[str, str] | None
) -> dict[str, Any]:
    """Seconds of the last steps by stage, and the peak on the first GPU beside the estimate."""
    warm = lines[2:STEPS] or lines
    stages = sorted({key for line in warm for key in line if key.startswith("seconds")})
    seconds = {key: sorted(line.get(key, 0.0) for line in warm)[len(warm) // 2] for key in stages}
    peaks = {
        key: max(line.get(key, 0.0) for line in lines)
        for line in lines for key in line if key.startswith("memory/")
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in kind or {}}
    os.environ.update(kind or {})
    shapes = thinker_shapes(Path(config.checkpoint))
    wanted = estimate(config, shapes, PromptSize(vision=3200, text=100), world=world)
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    return {
        "seconds": seconds, "memory": peaks,
        "estimated_peak": wanted.peak / GIB, "estimate": str(wanted),
    }  # fmt: skip


def efficiency(figures: Mapping[str, Any], world: int) -> dict[str, float]:
    """Of the update: the time on one GPU over the time on all, times their number."""
    found = {}
    for part, alone in (("lora", "one"), ("ddp", "one"), ("full", "one-full")):
        if part in figures and alone in figures:
            all_, one = (figures[name]["seconds"].get("seconds/update") for name in (part, alone))
            if all_ and one:
                found[part] = one / (world * all_)
    return found


def write(path: Path, figures: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(figures, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="+", choices=("make", *PARTS))
    parser.add_argument("--size", choices=("tiny", "middle", "7b"), default="7b")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--kept", action="store_true", help="weights stay whole for the update")
    parser.add_argument("--timed", action="store_true", help="five plain steps and no state")
    parser.add_argument("--place", type=Path, default=Path("/tmp/omni-gpus"))
    parser.add_argument("--runs", type=Path, help="where runs write, by default in the place")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    place = arguments.place
    os.environ["HF_HUB_OFFLINE"] = "1"
    figures: dict[str, Any] = {"size": arguments.size, "torch": torch.__version__}
    begin = time.monotonic()
    if not (place / "rows.json").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        make_checkpoint(arguments.size, place / "checkpoint")
        make_rows(place)
    figures["making"] = time.monotonic() - begin
    for part in arguments.parts:
        if part == "make":
            continue
        try:
            runs = arguments.runs or place
            world = arguments.world
            config = setting(
                arguments.size, place, runs / "out", part, arguments.tokens, world, arguments.timed
            )
            found: dict[str, Any] = figures.setdefault(part, {})
            keep = partial(write, arguments.out, figures)
            fsdp = KEPT if arguments.kept else FSDP
            measured(part, config, place / "runs", world, fsdp, found, keep)
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
            figures[part] = {"seconds": {}, **figures.get(part, {}), "failed": failed}
            print(part, failed, flush=True)
        figures["efficiency"] = efficiency(figures, arguments.world)
        write(arguments.out, figures)
    print(figures.get("efficiency"), flush=True)


if __name__ == "__main__":
    main()
