"""What the launcher of a run has set: how many processes, and sharded by what."""

from __future__ import annotations

from collections.abc import Mapping

from omni_grpo_core.errors import ConfigError

_NOT_BY_ACCELERATE: Mapping[str, str] = {
    "FSDP_ACTIVATION_CHECKPOINTING": "set gradient_checkpointing in the run's file: it is on where "
    "gradients are, and off in sampling",
    "FSDP_OFFLOAD_PARAMS": "use more processes, lora or freeze: sampling needs all weights on the "
    "device",
}
"""What a launcher can ask of FSDP, and what to do instead."""


def check_launcher(environment: Mapping[str, str]) -> None:
    """Check the configuration of ``accelerate launch``, by the variables that it sets.

    Raises ``ConfigError`` for DeepSpeed, whose engine clips and updates the weights within the
    backward pass, before the guard has seen loss and gradient; for FSDP version 1, under which a
    wrapped model cannot be sampled from; and for its offloading and checkpointing.
    """
    if is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "accelerate configuration", got="DeepSpeed", want="distributed_type FSDP or MULTI_GPU",
            fix="use FSDP version 2, which shards like ZeRO 3: DeepSpeed's engine updates the "
            "weights before the guard has seen the step",
        )  # fmt: skip
    sharded = is_on(environment, "ACCELERATE_USE_FSDP")
    if sharded and environment.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "accelerate configuration", got="FSDP version 1", want="fsdp_version: 2",
            fix="set it: under version 1 a wrapped model cannot be sampled from",
        )  # fmt: skip
    for key, instead in _NOT_BY_ACCELERATE.items():
        if sharded and is_on(environment, key):
            raise ConfigError(
                "accelerate configuration", got=f"{key.lower()}: true", want="false", fix=instead
            )


def is_on(environment: Mapping[str, str], key: str, default: str = "false") -> bool:
    """A switch of the launcher's, read as Accelerate reads one.

    >>> is_on({"FSDP_OFFLOAD_PARAMS": "True"}, "FSDP_OFFLOAD_PARAMS"), is_on({}, "FSDP_VERSION")
    (True, False)
    """
    return environment.get(key, default).lower() in ("y", "yes", "t", "true", "on", "1")


def world_size(environment: Mapping[str, str]) -> int:
    """How many processes the launcher started. Raises ``ConfigError`` for variables that no
    launcher sets: libraries would wait for processes that do not exist."""
    world, rank = environment.get("WORLD_SIZE", "1"), environment.get("RANK", "0")
    if not (world.isdecimal() and rank.isdecimal() and int(rank) < int(world)):
        raise ConfigError(
            "environment", got=f"WORLD_SIZE {world!r} and RANK {rank!r}",
            want="those of `accelerate launch`", fix="unset them, or use the launcher",
        )  # fmt: skip
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if int(world) > 1 and lacking:
        raise ConfigError(
            "environment", got=f"WORLD_SIZE {world} without {', '.join(lacking)}",
            want="those of `accelerate launch`", fix="unset it, or use the launcher",
        )  # fmt: skip
    return int(world)
