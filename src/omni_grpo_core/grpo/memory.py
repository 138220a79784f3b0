"""Does a run fit its device? An estimate from settings and the checkpoint's headers; no torch.

::

    peak   = weights + optimizer + reference + max(rollout, gradients + scoring)

    weights    4 P bytes; with precision bfloat16 2 bytes for each frozen one
    optimizer  8 T: AdamW's two moments of the T parameters that learn
    gradients  4 T
    reference  4 P where beta > 0 without lora, else 0
    rollout    N (L + C) layers 2 kv_heads head_dim b: the cache of all completions of a step
    scoring    M (L + C) a + 2 M C V b: activations and the scored logits with their gradient
    a          layers (6 H + 3 I) b, or layers H b with gradient checkpointing

P parameters of the thinker, N completions of a step on one process, M of a micro-batch, L tokens of
the longest prompt's media, C ``max_new_tokens``, V vocabulary, H hidden size, I intermediate size,
b bytes of a number in a forward (4, with bfloat16 2). It leaves out text, towers, workspaces and
the runtime: what it refuses does not fit, what it lets pass may not fit either. Under FSDP weights,
moments and gradients are shared among the processes.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.family import published_name
from omni_grpo_core.grpo.prompt_estimate import read_config
from omni_grpo_core.grpo.train_config import TOWER_PREFIX, LoraConfig, Tower, TrainConfig

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of one process."""

    weights: int
    optimizer: int
    reference: int
    rollout: int
    gradients: int
    scoring: int

    @property
    def peak(self) -> int:
        """At the worst moment of a step."""
        busy = max(self.rollout, self.gradients + self.scoring)
        return self.weights + self.optimizer + self.reference + busy

    def __str__(self) -> str:
        parts = {name: getattr(self, name) / GIB for name in self.__slots__}
        return ", ".join(f"{name} {size:.3g}" for name, size in parts.items() if size)


def check_memory(config: TrainConfig, prompt: int, *, world: int, memory: int | None) -> None:
    """Raises ``ConfigError`` where the estimate exceeds ``memory`` bytes of the device.

    ``prompt``: tokens of the longest prompt, at the least. ``memory`` ``None``: not known. The
    processes of a run share the memory of a CPU; each has a CUDA device of its own.
    """
    shapes = thinker_shapes(Path(config.checkpoint))
    if memory is None or not shapes:
        return
    found = estimate(config, shapes, prompt, world=world)
    needed = found.peak * (world if config.device == "cpu" else 1)
    if needed > memory:
        raise ConfigError(
            "memory",
            got=f"{needed / GIB:.3g} GiB needed at the least (GiB: {found}"
            f"{f'; {world} processes' if world > 1 else ''})",
            want=f"the {memory / GIB:.3g} GiB of the {config.device}",
            fix="for rollout lower batch_size (all its completions are sampled at once) or "
            "settings: max_new_tokens; for scoring lower micro_batch_size or set "
            "gradient_checkpointing; for optimizer and gradients use lora or freeze",
        )


def estimate(
    config: TrainConfig, shapes: Mapping[str, tuple[int, ...]], prompt: int, *, world: int
) -> Estimate:
    """The module's formula. ``shapes``: of the thinker's parameters, by name."""
    whole = read_config(Path(config.checkpoint))
    text = whole.get("thinker_config", whole).get("text_config", {})
    layers, hidden = int(text["num_hidden_layers"]), int(text["hidden_size"])
    heads = int(text["num_attention_heads"])
    head = int(text.get("head_dim") or hidden // heads)
    number = 2 if config.precision == "bfloat16" else 4
    every = sum(map(math.prod, shapes.values()))
    learning = learning_parameters(shapes, config.freeze, config.lora)
    frozen = every - learning if config.lora is None else every
    completions = config.batch_size // world
    length = prompt + config.settings.max_new_tokens
    wide = 0 if config.gradient_checkpointing else 6 * hidden + 3 * _intermediate(text)
    scored = config.micro_batch_size * config.settings.max_new_tokens * int(text["vocab_size"])
    ranks = world if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else 1
    return Estimate(
        weights=(number * frozen + 4 * learning) // ranks,
        optimizer=8 * learning // ranks,
        reference=4 * every // ranks if config.loss.beta > 0 and config.lora is None else 0,
        rollout=completions
        * length
        * layers
        * 2
        * int(text["num_key_value_heads"])
        * head
        * number,
        gradients=4 * learning // ranks,
        scoring=number
        * (config.micro_batch_size * length * layers * (wide or hidden) + 2 * scored),
    )


def _intermediate(text: Mapping[str, Any]) -> int:
    """Of a token's way through one layer: of a mixture, the experts that it visits."""
    if text.get("num_experts_per_tok"):
        return int(text["num_experts_per_tok"]) * int(text.get("moe_intermediate_size", 0))
    return int(text.get("intermediate_size", 0))


def learning_parameters(
    shapes: Mapping[str, tuple[int, ...]], freeze: tuple[Tower, ...], lora: LoraConfig | None
) -> int:
    """How many parameters learn: with lora ``rank (in + out)`` for every layer it sits on.

    >>> shapes = {"model.layers.0.mlp.up_proj.weight": (8, 4), "visual.x.weight": (2, 2)}
    >>> learning_parameters(shapes, (), None), learning_parameters(shapes, ("image",), None)
    (36, 32)
    >>> learning_parameters(shapes, (), LoraConfig(rank=2))
    24
    """
    if lora is not None:
        names = "|".join(map(re.escape, lora.target_modules))
        target = re.compile(rf"model\.layers\.\d+\..*\.({names})\.weight")
        return sum(
            lora.rank * sum(shape) for name, shape in shapes.items() if target.fullmatch(name)
        )
    stuck = tuple(prefix for tower in freeze for prefix in TOWER_PREFIX[tower])
    return sum(math.prod(s) for n, s in shapes.items() if not (stuck and n.startswith(stuck)))


def thinker_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the thinker's parameters, by their published names, from the headers of its
    safetensors files; empty where there are none. A full checkpoint's talker is not loaded and
    does not count."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
        except (OSError, ValueError, struct.error, MemoryError, OverflowError):
            return {}  # loading it says what is wrong
        shapes |= {
            published_name(name.removeprefix("thinker.")): tuple(entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__"
            and not name.startswith(("talker.", "token2wav.", "code2wav."))
        }
    return shapes


def device_memory(device: str) -> int | None:
    """Bytes of the device, ``None`` where they cannot be told: of the CPU what the machine has and
    the control group lets us have, of CUDA the smallest device's."""
    if device == "cpu":
        sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
        limit = Path("/sys/fs/cgroup/memory.max")
        if limit.is_file() and (told := limit.read_text().strip()).isdigit():
            sizes.append(int(told))
        return min(sizes)
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True, timeout=1,
        ).stdout  # fmt: skip
        return min(int(line) for line in told.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
