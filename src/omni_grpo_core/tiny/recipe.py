"""The recipe of the tiny checkpoints: tokenizer, architecture, training, one finished folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from safetensors.torch import save_file

from omni_grpo_core.core.conversation import INSTRUCTIONS, SYSTEM_PROMPT
from omni_grpo_core.core.policy import Policy, load_policy, require_library
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.tiny import FamilyName
from omni_grpo_core.tiny.evaluate import evaluate, summary
from omni_grpo_core.tiny.make import MAKES, Make, make_of, write_folder
from omni_grpo_core.tiny.questions import corpus
from omni_grpo_core.tiny.tokenizer import train_tokenizer
from omni_grpo_core.tiny.training import OnProgress, Plan, clip_lessons, clip_questions, train

_THREADS = 1
"""Sums depend on how they are split over threads, which makes matrices this small no faster."""
_PRESENCE = (
    "You are given a video with sound and an audio recording. "
    "You are given 2 images, videos, audio recordings without sound. You are given text only."
)


def build(
    out: Path,
    *,
    family: FamilyName = "qwen2.5",
    seed: int = 0,
    steps: int | None = None,
    stop: int | None = None,
) -> dict[str, float]:
    """Make the checkpoint folder ``out`` from scratch; takes some minutes on one core.

    The same seed gives the same weights on the same machine and torch version. ``steps`` shortens
    the training; ``stop`` ends it early, which leaves an under-trained policy to start GRPO from.
    The folder appears at the end, complete, or not at all. Returns
    :func:`~omni_grpo_core.tiny.evaluate.summary` on held-out clips.

    Raises:
        ConfigError: ``out`` exists and is not empty, or ``steps`` or ``stop`` is below 1.
        CheckpointError: the installed transformers does not have the family.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(str(out), got="a path in use", want="a new folder", fix="name another")
    for name, number in (("steps", steps), ("stop", stop)):
        if number is not None and number < 1:
            raise ConfigError(name, got=str(number), want="at least 1", fix="omit it")
    plan = Plan(stop=stop)
    if steps is not None:
        plan = replace(plan, steps=steps, clips=max(plan.batch, min(plan.clips, 4 * steps)))
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with _repeatable(seed):
            policy = untrained(work, MAKES[family])
            with _bars() as on_progress:
                lessons = clip_lessons(policy, clip_questions(plan, seed), on_progress)
                train(policy, plan, lessons, seed=seed, on_progress=on_progress)
            save_weights(policy, work)
            metrics = summary(evaluate(policy, clips=16))
        work.chmod(0o755)
        work.replace(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return metrics


def untrained(folder: Path, make: Make) -> Policy:
    """Write a checkpoint with newly initialised weights into ``folder`` and load it.

    Raises:
        CheckpointError: the installed transformers does not have the family.
    """
    words = [*corpus(), SYSTEM_PROMPT, *INSTRUCTIONS.values(), _PRESENCE, "system user assistant"]
    write_folder(folder, train_tokenizer(words, wording=make.wording), make)
    require_library(folder, make.family)
    config = getattr(transformers, make.config_class).from_pretrained(folder)
    model = getattr(transformers, make.family.thinker_class)(config)
    _save(model, folder, make)
    return load_policy(folder)


def save_weights(policy: Policy, folder: Path) -> None:
    """Write the policy's weights as ``model.safetensors``."""
    _save(policy.model, folder, make_of(policy.family))


def _save(model: torch.nn.Module, folder: Path, make: Make) -> None:
    weights = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    save_file(make.published(weights), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


@contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.set_num_threads(_THREADS)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)


@contextmanager
def _bars() -> Iterator[OnProgress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}

        def on_progress(phase: str, done: int, total: int, loss: float) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total, note="")
            note = "" if loss != loss else f"loss {loss:.3f}"
            progress.update(tasks[phase], completed=done, note=note)

        yield on_progress
