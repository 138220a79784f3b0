"""A run's file -> its configuration; what cannot work is rejected before torch is loaded."""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omni_grpo_core.core.rows import local_path
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io import device_memory
from omni_grpo_core.io.extras import require
from omni_grpo_core.io.strict import merge, read_mapping
from omni_grpo_core.pipeline.settings import Settings, load_settings
from omni_grpo_core.rewards import COLUMNS
from omni_grpo_core.rewards.call import RewardFunction
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.rewards.load import BY_JUDGE, load_reward
from omni_grpo_core.training.check_engine import check_engine
from omni_grpo_core.training.check_memory import check_memory
from omni_grpo_core.training.check_trained import check_reached, check_trained
from omni_grpo_core.training.config import TrainConfig, as_values
from omni_grpo_core.training.foreign_keys import explained
from omni_grpo_core.training.launcher import check_launcher, world_size
from omni_grpo_core.training.memory import GIB, Estimate
from omni_grpo_core.training.placement import fewest
from omni_grpo_core.training.positions import check_positions, positions_of
from omni_grpo_core.training.prompt_estimate import (
    PromptSize,
    check_prompt_limit,
    prompt_sizes,
    token_shape,
)
from omni_grpo_core.types import Sample

TRACKERS: Mapping[str, str] = {
    "aim": "aim",
    "clearml": "clearml",
    "comet_ml": "comet_ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""Accelerate's trackers, and the module that each needs."""


MAXIMA: Mapping[str, int] = {
    "steps": 10**8,
    "iterations": 1000,
    "batch_size": 10**6,
    "settings: group_size": 4096,
    "settings: max_new_tokens": 10**9,
    "guard: patience": 10**6,
    "optimizer: warmup_steps": 10**9,
    "lora: rank": 10**5,
    "lora: alpha": 10**6,
    "seed": 2**63 - 1,
}
"""A number beyond these is a slip, and would end in hours of work or out of memory."""


def load_train_config(
    path: Path, say: Callable[[str], None] = lambda text: None
) -> tuple[TrainConfig, tuple[str, ...]]:
    """Read and check a run's YAML or JSON; paths in it are relative to its own folder.

    ``settings`` override the checkpoint's own ``omni_grpo.json``. ``say`` is called with how
    weights are stored, and the memory that was estimated. Returns the configuration and warnings.
    Raises ``MissingExtra`` without the packages for training, ``ConfigError``, and what
    :func:`check_data` raises.
    """
    require("train", "accelerate")
    values = read_mapping(path)
    here = path.absolute().parent
    paths = ("checkpoint", "data", "out", "processor", "root", "eval_data")
    for key in paths:
        _check_path(key, values.get(key))
    resolved = {
        key: str(here / value)
        if key in paths and isinstance(value, str) and value and local_path(value) is not None
        else value
        for key, value in values.items()
    }
    judge = resolved.get("judge")
    if isinstance(judge, Mapping) and isinstance(judge.get("cache"), str) and judge["cache"]:
        resolved["judge"] = {**judge, "cache": str(here / judge["cache"])}
    own = Settings()
    if isinstance(resolved.get("checkpoint"), str):
        own = load_settings(Path(str(resolved["checkpoint"])))
    try:
        config: TrainConfig = merge(replace(TrainConfig(), settings=own), resolved, str(path))
    except ConfigError as error:
        raise explained(error) from None
    check_launcher(os.environ)
    world = world_size(os.environ)
    warnings = check_config(config, world=world)
    estimate = check_data(config, world=world)
    say(f"weights: {config.storage}")
    if estimate is not None:
        say(f"memory: {estimate.peak / GIB:.3g} GiB expected (GiB: {estimate})")
    return config, warnings


def check_config(config: TrainConfig, *, world: int = 1) -> tuple[str, ...]:
    """Check all that needs no loading. Returns warnings, raises ``ConfigError``."""
    _check_finite(as_values(config))
    _check_paths(config)
    if not config.rewards:
        raise _bad("rewards", "none", "at least one, such as 'accuracy: {}'", "name them")
    _check_rewards(config)
    group = config.settings.group_size
    if not 2 <= group <= MAXIMA["settings: group_size"]:
        raise _bad("settings: group_size", str(group),
                   f"2 or more, at most {MAXIMA['settings: group_size']}",
                   "set it: an advantage compares the answers of one group")  # fmt: skip
    if config.batch_size < group or config.batch_size % group:
        raise _bad("batch_size", str(config.batch_size), f"a multiple of group_size {group}",
                   f"try {max(1, round(config.batch_size / group)) * group}")  # fmt: skip
    if group < (least := fewest(config.prompts, world)):
        raise _bad(
            "batch_size",
            f"{config.prompts} groups of {group} completions on {world} processes",
            f"whole groups on each, or groups of {least} or more, to be spread over them",
            f"try {world * group * -(-config.prompts // world)}",
        )
    micro = config.micro_batch_size
    if micro < 1 or (micro % group and group % micro):
        raise _bad("micro_batch_size", str(micro), f"a divisor or a multiple of group_size {group}",
                   f"try {group}")  # fmt: skip
    temperature = config.settings.temperature
    if not 0.01 <= temperature <= 100:
        raise _bad("settings: temperature", f"{temperature:g}", "above 0: 0.01 to 100",
                   "set it: at 0 a group's answers are all equal, above 100 noise")  # fmt: skip
    check_engine(config, world)
    _check_loss(config)
    _check_numbers(config)
    check_trained(config, world=world)
    _check_trackers(config)
    warnings = []
    if group == 2 and config.scale == "group":
        warnings.append(
            "group_size 2 with scale 'group': every advantage is +1, -1 or 0, however much the two "
            "rewards differ; use a larger group, or scale 'none'"
        )
    return tuple(warnings)


def _check_loss(config: TrainConfig) -> None:
    if config.aggregation == "normalize_then_sum" and config.scale != "group":
        raise _bad(
            "scale",
            f"{config.scale!r} with aggregation 'normalize_then_sum'",
            "'group'",
            "remove it: each reward is scaled within its groups, their sum in the batch",
        )
    correction = config.correction
    if config.loss.loss_type == "vespo" and correction and correction.level == "sequence":
        raise _bad(
            "correction: level",
            "'sequence' with loss_type 'vespo'",
            "'token'",
            "set it: vespo multiplies the weights of a sequence's tokens itself",
        )


def check_data(config: TrainConfig, *, world: int = 1) -> Estimate | None:
    """Check a run against its rows, the headers of their files and the device's memory, of which
    it returns the estimate, ``None`` for weights without headers.

    Raises ``DataError`` for a row that cannot be used, ``ConversationError`` for one that
    contradicts the audio-in-video setting, ``ConfigError`` for fewer samples than groups, a row
    from which nothing learns, a prompt limit below the media tokens and a run that needs more
    memory than is available, ``BatchError`` for a row beyond the model's positions.
    """
    root = Path(config.root) if config.root else None
    samples = load_samples(config.data, root=root, format=config.data_format)
    require_enough(config, samples)
    check_reached(config, samples)
    read = [*samples]
    if config.eval_data:
        read += load_samples(config.eval_data, root=root, format=config.data_format)
    checkpoint = Path(config.checkpoint)
    sizes = prompt_sizes(read, config.settings, token_shape(checkpoint))
    check_prompt_limit(read, [size.media for size in sizes], config.settings.max_prompt_length)
    needed = check_memory(
        config,
        max(sizes, key=lambda size: size.total, default=PromptSize()),
        world=world,
        memory=device_memory(config.device),
        host=device_memory("cpu"),
    )
    check_positions(read, sizes, config.settings.max_new_tokens, positions_of(checkpoint))
    return needed


def require_enough(config: TrainConfig, samples: Sequence[Sample]) -> None:
    """A step never holds a sample twice. Raises ``ConfigError`` for more groups than samples."""
    if len(samples) < config.prompts:
        raise _bad(
            "batch_size",
            f"{config.prompts} groups of {len(samples)} samples",
            "no more groups in a step than there are samples",
            "lower batch_size or raise settings: group_size",
        )


def _check_paths(config: TrainConfig) -> None:
    for key in ("checkpoint", "data", "out"):
        if not getattr(config, key):
            raise _bad(key, "nothing", "a path", f"add '{key}: …'")
    if not (Path(config.checkpoint) / "config.json").is_file():
        raise _bad("checkpoint", config.checkpoint, "a folder with a config.json", "correct it")
    for key in ("data", "eval_data", "root", "processor"):
        path = getattr(config, key)
        local = local_path(path) if path else None
        if local is not None and not local.exists():
            raise _bad(key, f"{path}, which does not exist", "an existing path", "correct it")
    out = Path(config.out)
    _check_apart(Path(config.checkpoint), out)
    above = next(folder for folder in (out, *out.parents) if os.path.lexists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise _bad("out", config.out, "a writable folder", f"check {above}")


def _check_path(key: str, value: object) -> None:
    """``value``: a path as written in the file."""
    if isinstance(value, str) and "://" in value:
        raise _bad(key, f"the URL {value}", "a path on this machine",
                   "mount or copy it: training does not use the network for files")  # fmt: skip
    if isinstance(value, str) and not value.isprintable():
        raise _bad(key, repr(value), "a path of printable characters", "correct it")


def _check_apart(checkpoint: Path, out: Path) -> None:
    """A run must not write into the checkpoint it reads, nor over it."""
    source, target = (Path(os.path.realpath(path)) for path in (checkpoint, out))
    if target.is_relative_to(source):
        raise _bad("out", str(out), "a folder outside the checkpoint", "choose another")
    if any(source.is_relative_to(target / part) for part in ("model", "state", "trace", "stopped")):
        raise _bad("out", f"{out}, which contains the checkpoint", "a folder of its own",
                   "choose another: the run would overwrite what it started from")  # fmt: skip


def _check_finite(values: Mapping[str, Any], above: str = "") -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            _check_finite(value, f"{above}{key}: ")
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise _bad(f"{above}{key}", str(value), "a finite number", "correct it")


def _check_rewards(config: TrainConfig) -> None:
    def load(name: str) -> RewardFunction:
        if config.judge is None or name not in BY_JUDGE:
            return load_reward(name)
        # importing an endpoint's client is slow, and a cache is a file
        return Format(name=name)

    if config.judge is not None:
        require("judge", "httpx", "tenacity")
    composition = config.composition(load)
    for component in composition.components:
        _check_signature(component.name, component.function)
    if config.judge is not None and not set(BY_JUDGE) & set(config.rewards):
        raise _bad("judge", "one that no reward uses", f"rewards: {' or '.join(BY_JUDGE)}",
                   "add them, or remove the judge")  # fmt: skip


def _check_signature(name: str, function: RewardFunction) -> None:
    """Bind the arguments of a step's call, without calling it."""
    columns = dict.fromkeys(COLUMNS, ())
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # some callables written in C have no signature
    try:
        signature.bind(prompts=(), completions=(), **columns)
    except TypeError as error:
        raise _bad(f"reward {name!r}", f"a function that cannot be called: {error}",
                   "one that takes prompts, completions and further columns by name",
                   "add **columns to its parameters") from None  # fmt: skip


def _check_numbers(config: TrainConfig) -> None:
    plan = config.optimizer
    limits: tuple[tuple[str, float, bool, str], ...] = (
        ("steps", config.steps, config.steps >= 1, "1 or more"),
        ("iterations", config.iterations, config.iterations >= 1, "1 or more"),
        ("save_every", config.save_every, config.save_every >= 0, "0 or more"),
        ("eval_every", config.eval_every, config.eval_every >= 0, "0 or more"),
        ("keep", config.keep, config.keep >= 1, "1 or more"),
        ("seed", config.seed, config.seed >= 0, "0 or more"),
        ("optimizer: lr", plan.lr, 0 < plan.lr < 1, "between 0 and 1"),
        ("optimizer: weight_decay", plan.weight_decay,
         0 <= plan.lr * plan.weight_decay < 1, "0 or more, below 1/lr"),
        ("optimizer: max_grad_norm", plan.max_grad_norm, plan.max_grad_norm > 0, "above 0"),
        ("optimizer: final", plan.final, 0 <= plan.final <= 1, "0 to 1"),
        ("optimizer: warmup_steps", plan.warmup_steps, plan.warmup_steps >= 0, "0 or more"),
        ("guard: patience", config.guard.patience, config.guard.patience >= 1, "1 or more"),
        ("guard: garbage", config.guard.garbage, 0 < config.guard.garbage <= 1, "0 to 1, above 0"),
        ("guard: drift", config.drift_limit, config.drift_limit > 0, "above 0"),
        ("seed", config.seed, abs(config.seed) < 1 << 63, "a 64-bit integer"),
    )  # fmt: skip
    for item, got, ok, want in limits:
        if not ok:
            raise _bad(item, f"{got:g}", want, "correct it")
    values = as_values(config)
    for item, most in MAXIMA.items():
        *parts, key = item.split(": ")
        section = values[parts[0]] if parts else values
        if section is not None and abs(section[key]) > most:
            raise _bad(item, str(section[key])[:60], f"at most {most}", "correct it")
    limit = config.settings.max_prompt_length
    if limit is not None and limit < 1:
        raise _bad("settings: max_prompt_length", str(limit), "1 or more, or none", "correct it")
    if len(plan.betas) != 2 or not all(0 <= beta < 1 for beta in plan.betas):
        raise _bad("optimizer: betas", str(list(plan.betas)), "two, each from 0 to 1", "correct it")
    if config.eval_every and not config.eval_data:
        raise _bad("eval_every", f"{config.eval_every} without eval_data", "rows to measure on",
                   "set eval_data, or remove eval_every")  # fmt: skip
    if config.loss.loss_type == "dr_grpo" and (
        config.loss.max_completion_length != config.settings.max_new_tokens
    ):
        raise _bad(
            "loss: max_completion_length",
            str(config.loss.max_completion_length),
            f"settings: max_new_tokens, {config.settings.max_new_tokens}",
            "set both to the same number: dr_grpo divides by the length limit",
        )


def _check_trackers(config: TrainConfig) -> None:
    for name in config.trackers:
        if name not in TRACKERS:
            raise _bad("trackers", repr(name), ", ".join(TRACKERS), "correct it")
        if importlib.util.find_spec(TRACKERS[name]) is None:
            # Accelerate would silently ignore it
            raise _bad("trackers", f"{name!r}, which is not installed", "one that is",
                       "install it, or remove it: log.jsonl is always written")  # fmt: skip


def _bad(item: str, got: str, want: str, fix: str) -> ConfigError:
    return ConfigError(item, got=got, want=want, fix=fix)
