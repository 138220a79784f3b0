"""A run that does not fit is refused with the changes that would make it fit; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omni_grpo_core.errors import ConfigError, MissingExtra
from omni_grpo_core.training.check_trained import check_together
from omni_grpo_core.training.config import LoraConfig, TrainConfig
from omni_grpo_core.training.memory import GIB, USABLE, Estimate, estimate, thinker_shapes
from omni_grpo_core.training.prompt_estimate import PromptSize

SHOWN = 4
"""Changes that are shown, of those that are enough alone."""
FEWEST_TOKENS = 32
"""Of a completion: fewer are not advised."""


def check_memory(
    config: TrainConfig,
    prompt: PromptSize,
    *,
    world: int,
    memory: int | None,
    host: int | None = None,
) -> Estimate | None:
    """The estimate, ``None`` without headers. Raises ``ConfigError`` if it exceeds the ``memory``
    bytes free on the device, or offloaded gradients the ``host`` bytes free on the machine.

    ``prompt``: the longest. ``None``: unknown. The processes of a run share the
    memory of a CPU; each has a CUDA device of its own.
    """
    shapes = thinker_shapes(Path(config.checkpoint))
    if not shapes:
        return None
    machine = _Machine(shapes, prompt, world, memory, host)
    found = machine.estimate(config)
    many = f"; {world} processes" if world > 1 else ""
    usable = machine.usable(config)
    if memory is not None and machine.needed(config, found) > usable * memory:
        raise ConfigError(
            "memory",
            got=f"{machine.needed(config, found) / GIB:.3g} GiB needed (GiB: {found}{many})",
            want=f"no more than {usable:.0%} of the {memory / GIB:.3g} GiB free on the "
            f"{config.device}",
            fix=_advice(config, machine),
        )
    if host is not None and found.offloaded > host:
        raise ConfigError(
            "offload_gradients",
            got=f"gradients of {found.offloaded / GIB:.3g} GiB",
            want=f"no more than the {host / GIB:.3g} GiB free on the machine",
            fix="remove it, or use lora or freeze",
        )
    return found


@dataclass(frozen=True, slots=True)
class _Machine:
    """What a run of these weights and prompts is on; as :func:`check_memory`."""

    shapes: Mapping[str, tuple[int, ...]]
    prompt: PromptSize
    world: int
    memory: int | None
    host: int | None

    def estimate(self, config: TrainConfig) -> Estimate:
        return estimate(config, self.shapes, self.prompt, world=self.world)

    def needed(self, config: TrainConfig, found: Estimate) -> int:
        return found.peak * (self.world if config.device == "cpu" else 1)

    def usable(self, config: TrainConfig) -> float:
        """Share of the free memory."""
        usable = 1.0 if config.device == "cpu" else USABLE
        beside = config.rollout == "vllm" and config.vllm.url is None
        return usable - config.vllm.memory if beside else usable

    def fits(self, config: TrainConfig) -> bool:
        found = self.estimate(config)
        on_host = self.host is None or found.offloaded <= self.host
        enough = self.memory is None or (
            self.needed(config, found) <= self.usable(config) * self.memory
        )
        return enough and on_host


def _advice(config: TrainConfig, machine: _Machine) -> str:
    """The changes of which one is enough; else which are, together; else how far they come."""
    alone = [
        (words, changed) for words, changed in _changes(config, machine) if machine.fits(changed)
    ]
    if alone:
        sized = (f"{words} ({_gib(changed, machine)})" for words, changed in alone[:SHOWN])
        return f"set {', or '.join(sized)}"
    chosen: dict[str, str] = {}
    while not machine.fits(config):
        further = [
            (machine.estimate(changed).peak, words, changed)
            for words, changed in _changes(config, machine)
        ]
        peak, words, changed = min(further, default=(0, "", config), key=lambda found: found[0])
        if not further or peak >= machine.estimate(config).peak:
            more = f"even with {', '.join(chosen.values())} it needs {_gib(config, machine)}: "
            return f"{more * bool(chosen)}use a larger device, or shard over more processes (FSDP)"
        chosen[words.rpartition(": ")[0]] = words
        config = changed
    return f"set {', '.join(chosen.values())}, all together ({_gib(config, machine)})"


def _gib(config: TrainConfig, machine: _Machine) -> str:
    return f"{machine.needed(config, machine.estimate(config)) / GIB:.3g} GiB"


def _changes(config: TrainConfig, machine: _Machine) -> Iterator[tuple[str, TrainConfig]]:
    """Settings that the configuration does not have, and that go together with the rest of it;
    those that change no number of a step first."""
    for words, changes in _candidates(config, machine):
        changed = replace(config, **changes)
        try:
            check_together(changed, world=machine.world)
        except MissingExtra:
            pass  # its own message says what to install
        except ConfigError:
            continue
        yield words, changed


def _candidates(config: TrainConfig, machine: _Machine) -> Iterator[tuple[str, dict[str, Any]]]:
    group, settings = config.settings.group_size, config.settings
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing: true", {"gradient_checkpointing": True}
    if config.fast == "off":
        yield "fast: on", {"fast": "on"}
    if config.micro_batch_size > 1:
        yield "micro_batch_size: 1", {"micro_batch_size": 1}
    if not config.offload_gradients and config.device == "cuda":
        yield "offload_gradients: true", {"offload_gradients": True}
    if config.precision == "float32":
        yield "precision: bfloat16", {"precision": "bfloat16"}
    if config.batch_size > (least := group * machine.world):
        yield f"batch_size: {least}", {"batch_size": least}
    if (tokens := settings.max_new_tokens // 2) >= FEWEST_TOKENS:
        shorter = replace(settings, max_new_tokens=tokens)
        yield f"settings: max_new_tokens: {tokens}", {"settings": shorter}
    if config.loss.beta > 0:
        yield "loss: beta: 0", {"loss": replace(config.loss, beta=0.0)}
    if config.lora is not None:
        return
    towers = ("image", "video", "audio")
    if not set(towers) <= set(config.freeze):
        yield "freeze: [image, video, audio]", {"freeze": towers}
    half = {"precision": "bfloat16", "trained_weights": "bfloat16_stochastic"}
    eight = replace(config.optimizer, name="adamw_8bit")
    if config.trained_weights != "bfloat16_stochastic":
        yield (
            "trained_weights: bfloat16_stochastic with precision: bfloat16 and optimizer: name: "
            "adamw_8bit",
            {**half, "optimizer": eight},
        )
    yield (
        "lora: {} with precision: bfloat16",
        {"lora": LoraConfig(), "freeze": (), "offload_gradients": False, "precision": "bfloat16",
         "trained_weights": "float32"},
    )  # fmt: skip
