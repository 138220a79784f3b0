"""Does a run fit on its device? An estimate from settings and the checkpoint's headers; no torch.

::

    peak   = runtime + weights + optimizer + reference + max(rollout + casts + whole,
                                                             gradients + scoring + casts)

    runtime    0.5 GiB on a CUDA device: context and libraries
    weights    4 P bytes; with precision bfloat16 2 bytes for each frozen one
    optimizer  8 T: AdamW's two moments of the T trainable parameters, from the first step on
    gradients  4 T, and the largest twice if micro-batches accumulate
    reference  4 P if beta > 0 without lora, else 0
    casts      2 W with precision bfloat16: autocast's copies of the W entries of trained matrices
    whole      b P under FSDP: sampling gathers the weights
    rollout    N (L + C) layers 2 kv_heads head_dim b: the cache of all completions of a step
    scoring    M (L + C) a + 2 M C V b: activations and the scored logits with their gradient
    a          layers (6 H + 3 I) b, or layers H b with gradient checkpointing

P parameters of the thinker, N completions of a step on one process, M of a micro-batch, L media
tokens of the longest prompt, C ``max_new_tokens``, V vocabulary, H hidden size, I intermediate
size, b bytes of a number in a forward (4, with bfloat16 2). Text, towers and workspaces are left
out: what is refused does not fit; what is accepted may still not fit. On CUDA AdamW is the fused
one, which makes no copies; the other would hold 4 T more within its step. Under FSDP the processes
share weights, moments and gradients. Of a CUDA device's memory 97 % is usable: all weights of a 7B
left 3.1 of 138 GiB between their blocks on an H200. A model bound for a CUDA device is loaded into
the machine's own memory first, 4 P bytes for each process.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_grpo_core.core.weight_headers import weight_shapes
from omni_grpo_core.errors import CheckpointError, ConfigError
from omni_grpo_core.training.config import TOWER_PREFIX, LoraConfig, Tower, TrainConfig
from omni_grpo_core.training.placement import share_of
from omni_grpo_core.training.prompt_estimate import read_config

GIB = 2**30
RUNTIME = GIB // 2
USABLE = 0.97
_ADVICE: Mapping[str, str] = {
    "weights": "shard them over processes (FSDP), or use lora with precision bfloat16",
    "optimizer": "use lora or freeze",
    "gradients": "use lora or freeze",
    "reference": "use lora, or loss: beta 0",
    "casts": "use lora, or precision float32",
    "rollout": "lower batch_size (all its completions are sampled at once) or settings: "
    "max_new_tokens",
    "scoring": "lower micro_batch_size or settings: max_new_tokens, or set gradient_checkpointing",
}
_NEEDED = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    "vocab_size",
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of one process."""

    weights: int
    optimizer: int
    reference: int
    rollout: int
    gradients: int
    scoring: int
    casts: int = 0
    whole: int = 0
    runtime: int = 0

    @property
    def peak(self) -> int:
        """The most that a step needs at any moment."""
        busy = max(self.rollout + self.whole, self.gradients + self.scoring) + self.casts
        return self.runtime + self.weights + self.optimizer + self.reference + busy

    @property
    def advice(self) -> str:
        """How to reduce the parts that are a tenth of the peak or more, the largest first."""
        large = [part for part in _ADVICE if 10 * getattr(self, part) >= self.peak]
        grouped: dict[str, list[str]] = {}
        for part in sorted(large, key=lambda part: -int(getattr(self, part))):
            grouped.setdefault(_ADVICE[part], []).append(part)
        return "; ".join(f"for {' and '.join(parts)} {advice}" for advice, parts in grouped.items())

    def __str__(self) -> str:
        parts = {name: getattr(self, name) / GIB for name in self.__slots__}
        return ", ".join(f"{name} {size:.3g}" for name, size in parts.items() if size)


def check_memory(
    config: TrainConfig, prompt: int, *, world: int, memory: int | None, host: int | None = None
) -> None:
    """Raises ``ConfigError`` if the estimate exceeds the ``memory`` bytes free on the device, or
    loading the weights the ``host`` bytes free on the machine.

    ``prompt``: least number of tokens of the longest prompt. ``None``: unknown. The processes of a
    run share the memory of a CPU; each has a CUDA device of its own.
    """
    shapes = thinker_shapes(Path(config.checkpoint))
    if not shapes:
        return
    found = estimate(config, shapes, prompt, world=world)
    many = f"; {world} processes" if world > 1 else ""
    needed = found.peak * (world if config.device == "cpu" else 1)
    usable = 1.0 if config.device == "cpu" else USABLE
    if memory is not None and needed > usable * memory:
        raise ConfigError(
            "memory",
            got=f"at least {needed / GIB:.3g} GiB needed (GiB: {found}{many})",
            want=f"no more than the {memory / GIB:.3g} GiB free on the {config.device}",
            fix=found.advice,
        )
    loading = 4 * sum(map(math.prod, shapes.values())) * world
    if config.device != "cpu" and host is not None and loading > host:
        raise ConfigError(
            "memory of the machine",
            got=f"{loading / GIB:.3g} GiB needed to load the weights{many}",
            want=f"no more than the {host / GIB:.3g} GiB that are free",
            fix="free some, or start fewer processes on this machine",
        )


def estimate(
    config: TrainConfig, shapes: Mapping[str, tuple[int, ...]], prompt: int, *, world: int
) -> Estimate:
    """The module's formula. ``shapes``: of the thinker's parameters, by name."""
    text = read_config(Path(config.checkpoint)).get("text_config", {})
    missing = [name for name in _NEEDED if name not in text]
    if missing:
        raise CheckpointError(
            str(Path(config.checkpoint) / "config.json"), got=f"no text_config {missing[0]}",
            want="the sizes of the text model", fix="use the config saved with the weights",
        )  # fmt: skip
    layers, hidden = int(text["num_hidden_layers"]), int(text["hidden_size"])
    heads = int(text["num_attention_heads"])
    head = int(text.get("head_dim") or hidden // heads)
    number = 2 if config.precision == "bfloat16" else 4
    every = sum(map(math.prod, shapes.values()))
    sizes = learning_sizes(shapes, config.freeze, config.lora)
    learning = sum(sizes)
    frozen = every - learning if config.lora is None else every
    share = share_of(config.prompts, config.settings.group_size, world, 0)
    completions = len(share.prompts) * share.most
    length = prompt + config.settings.max_new_tokens
    wide = 0 if config.gradient_checkpointing else 6 * hidden + 3 * _intermediate(text)
    scored = config.micro_batch_size * config.settings.max_new_tokens * int(text["vocab_size"])
    embedding = "embed_tokens.weight"
    matrices = {n: s for n, s in shapes.items() if len(s) > 1 and not n.endswith(embedding)}
    cast = sum(learning_sizes(matrices, config.freeze, config.lora))
    added = max(sizes, default=0) if config.micro_batch_size < completions else 0
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
        gradients=4 * (learning + added) // ranks,
        scoring=number
        * (config.micro_batch_size * length * layers * (wide or hidden) + 2 * scored),
        casts=2 * cast if config.precision == "bfloat16" else 0,
        whole=number * every if ranks > 1 else 0,
        runtime=RUNTIME if config.device == "cuda" else 0,
    )


def _intermediate(text: Mapping[str, Any]) -> int:
    """Intermediate size that one token uses in a layer: in a mixture, of the experts it visits."""
    if text.get("num_experts_per_tok"):
        return int(text["num_experts_per_tok"]) * int(text.get("moe_intermediate_size", 0))
    return int(text.get("intermediate_size", 0))


def learning_sizes(
    shapes: Mapping[str, tuple[int, ...]], freeze: tuple[Tower, ...], lora: LoraConfig | None
) -> list[int]:
    """Entries of each trainable parameter: with lora ``rank (in + out)`` for each adapted layer.

    >>> shapes = {"model.layers.0.mlp.up_proj.weight": (8, 4), "visual.x.weight": (2, 2)}
    >>> learning_sizes(shapes, (), None), learning_sizes(shapes, ("image",), None)
    ([32, 4], [32])
    >>> learning_sizes(shapes, (), LoraConfig(rank=2))
    [24]
    """
    if lora is not None:
        return [lora.rank * sum(s) for name, s in shapes.items() if lora_target(lora, name)]
    frozen = tuple(prefix for tower in freeze for prefix in TOWER_PREFIX[tower])
    return [math.prod(s) for n, s in shapes.items() if not (frozen and n.startswith(frozen))]


def lora_target(lora: LoraConfig, name: str) -> bool:
    """Whether the weight of this published name gets an adapter."""
    modules = "|".join(map(re.escape, lora.target_modules))
    return re.fullmatch(rf"model\.layers\.\d+\..*\.({modules})\.weight", name) is not None


def thinker_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the thinker's parameters, by their published names, from the headers of its
    safetensors files; empty without any. A full checkpoint's talker is not loaded and does not
    count."""
    try:
        return weight_shapes(checkpoint)
    except CheckpointError:
        return {}  # loading it reports what is wrong
