"""Whether what a run trains, and how, goes together. A part of ``load_config.py``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.fast.obstacles import refused
from omni_grpo_core.io.extras import require
from omni_grpo_core.training.config import OPTIMIZERS, LoraConfig, TrainConfig
from omni_grpo_core.training.headers import read_header
from omni_grpo_core.training.launcher import is_on
from omni_grpo_core.training.memory import adapted, fast_obstacle, thinker_shapes
from omni_grpo_core.types import Sample


def check_trained(config: TrainConfig, *, world: int) -> None:
    """Raises ``ConfigError`` as :func:`check_together` and for adapters that the weights do not
    take; ``MissingExtra``."""
    check_together(config, world=world)
    if config.lora is not None:
        _check_lora(config.lora, thinker_shapes(Path(config.checkpoint)))


def check_together(config: TrainConfig, *, world: int) -> None:
    """Raises ``ConfigError`` for towers, adapters, dtypes and an optimizer that do not go together,
    a fast step that cannot be, and gradients of several processes that should be offloaded;
    ``MissingExtra`` for an optimizer that is not installed."""
    if set(config.freeze) >= {"image", "video", "audio", "text"}:
        raise _bad("freeze", "everything", "something left to train", "remove one")
    if ("image" in config.freeze) != ("video" in config.freeze):
        raise _bad("freeze", ", ".join(config.freeze), "image and video, or neither",
                   "add or remove one: the same tower sees both")  # fmt: skip
    if config.lora is not None and config.freeze:
        raise _bad("freeze", f"{', '.join(config.freeze)} with lora", "one of the two",
                   "remove one: with lora everything but the adapter is frozen")  # fmt: skip
    _check_weights(config)
    if config.fast == "on" and (reason := fast_obstacle(config)):
        raise refused(reason)
    if config.offload_gradients and (world > 1 or is_on(os.environ, "ACCELERATE_USE_FSDP")):
        raise _bad("offload_gradients", f"true on {world} processes" if world > 1 else
                   "true under FSDP", "one process, without FSDP",
                   "remove it: FSDP shards the gradients over the processes")  # fmt: skip


def _check_weights(config: TrainConfig) -> None:
    how, name = config.trained_weights, config.optimizer.name
    default = how == "float32" and name == "adamw"
    if how != "float32" and config.precision != "bfloat16":
        raise _bad("trained_weights", f"{how} with precision {config.precision}",
                   "float32, or precision bfloat16", "set precision: bfloat16")  # fmt: skip
    if how != "float32" and config.lora is not None:
        raise _bad("trained_weights", f"{how} with lora", "float32",
                   "remove it: adapters are small, and what they adapt is bfloat16 anyway"
                   )  # fmt: skip
    if name not in OPTIMIZERS[how]:
        raise _bad("optimizer: name", f"{name} with trained_weights {how}",
                   " or ".join(OPTIMIZERS[how]), "change one of them")  # fmt: skip
    if not default and is_on(os.environ, "ACCELERATE_USE_FSDP"):
        raise _bad("trained_weights" if how != "float32" else "optimizer: name",
                   f"{how}, updated by {name}, under FSDP", "float32, updated by adamw",
                   "set them so: FSDP computes in bfloat16 and shards the float32 weights"
                   )  # fmt: skip
    if name == "adamw_8bit":
        require("low-memory", "torchao")


def check_reached(config: TrainConfig, samples: Sequence[Sample]) -> None:
    """Raises ``ConfigError`` for rows that go through frozen towers only: without a gradient."""
    idle = [sample for sample in samples if _is_idle(sample, config)]
    if idle:
        raise _bad("freeze", f"{', '.join(config.freeze)}, so that nothing learns from {len(idle)} "
                   f"of {len(samples)} rows, such as {idle[0].origin}",
                   "every row to go through something that learns",
                   "freeze less, or leave out these rows")  # fmt: skip


def _is_idle(sample: Sample, config: TrainConfig) -> bool:
    if not {"text", *(ref.modality for ref in sample.media)} <= set(config.freeze):
        return False
    if "audio" in config.freeze or config.settings.audio_in_video == "off":
        return True
    # a video whose frames teach nothing may still be heard; a silent one in a format other than
    # mp4 is found at its step
    headers = [read_header(ref.path) for ref in sample.media if ref.modality == "video"]
    return all(header is not None and not header.audio_seconds for header in headers)


def _check_lora(lora: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    require("train", "peft")
    if lora.rank < 1 or lora.alpha < 1 or not lora.target_modules:
        raise _bad(
            "lora", f"rank {lora.rank}, alpha {lora.alpha}, {len(lora.target_modules)} targets",
            "rank and alpha 1 or more, and targets", "correct it",
        )  # fmt: skip
    matched = [min(shape) for shape in adapted(lora, shapes)]
    if shapes and not matched:
        raise _bad(
            "lora: target_modules", ", ".join(lora.target_modules),
            "names of linear layers of the text model, such as q_proj", "correct them",
        )  # fmt: skip
    if matched and lora.rank > max(matched):
        raise _bad("lora: rank", str(lora.rank), f"at most {max(matched)}, the size of a layer",
                   "lower it: a larger one adds nothing")  # fmt: skip


def _bad(item: str, got: str, want: str, fix: str) -> ConfigError:
    return ConfigError(item, got=got, want=want, fix=fix)
