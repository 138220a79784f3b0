"""Does a run fit on its device? An estimate from settings and the checkpoint's headers; no torch.

What a run always holds, and the largest of the moments of a step::

    always      runtime + weights + reference + optimizer
    sampling    cache + activations of the prompts' pass + casts
    forward     older + casts + kept + ends + scores
    scores      older + head + kept + ends + 2 scores, the beginning of the backward pass
    backward    older + head + kept + layer
    gradients   gradients + layer, its end
    embeddings  gradients + head, their gradient from completions beside that from prompts
    optimizer   gradients + the largest weight's share of its work

    weights     4 bytes each; with precision bfloat16 2 for what is frozen; trained ones, T, 4 or 2
    optimizer   adamw 8 T, with masters 12 T; adamw_8bit 2 T and a scale for each 256; adafactor 0
    gradients   as the weights; older: those of earlier micro-batches; DDP's buckets as much again
    casts       2 W with precision bfloat16: autocast's copies of the float32 matrices, W entries
    cache       2 keys and values of layers x kv_heads x head_dim: of N (L + C) tokens; fast N C + L
    kept        tokens x layers x a; with gradient checkpointing tokens x layers x r; and of towers
    layer       tokens x t; with gradient checkpointing tokens x (a + t)
    head        the gradient of H V weights
    scores      M C V b in the plain step; the fast step has a chunk of them at a time
    tokens      M (L + C) in the plain step; fast M C and L of each prompt of the micro-batch

P parameters of the thinker, N completions of a step on one process, M of a micro-batch, L tokens of
the longest prompt, C ``max_new_tokens``, V vocabulary, H hidden size, I intermediate size, K all
heads of keys, b bytes of a number in a forward (4, with bfloat16 2).

a, t and r, bytes of a token in a layer, are what torch saves for the backward pass of
transformers' decoder layer; they were counted by tracing it. a is, with bfloat16 weights, 20 H +
8 I + 4 K; with adapters 24 H + 8 I + 4 K; with float32 weights under autocast 30 H + 8 I + 4 K; r
is the layer's input; t, gradients within the MLP, is 4 I, or 8 I with adapters, which work on
float32 copies. Left out: frozen towers, whose features pass and go. ``tests/gpu/memory_runs.py``
compares it with a device.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omni_grpo_core.core.weight_headers import weight_shapes
from omni_grpo_core.errors import CheckpointError, ConfigError
from omni_grpo_core.training.config import TOWER_PREFIX, LoraConfig, Tower, TrainConfig
from omni_grpo_core.training.placement import share_of
from omni_grpo_core.training.prompt_estimate import PromptSize, read_config

GIB = 2**30
RUNTIME = GIB // 2
USABLE = 0.97
"""Of a CUDA device's memory: all weights of a 7B left 3.1 of 138 GiB between their blocks."""
FAST_SCORES = 2**26
"""``fast.head.CHUNK_LOGITS``, which a test compares: importing it would load torch."""
SOFTMAX = 4 * 4 * 2**24
"""Bytes of four float32 copies of ``losses.logprobs.CHUNK_SCORES`` scores."""

_SHARD = "shard over more processes (FSDP)"
_LESS = "use lora, freeze"
_ADVICE: Mapping[str, str] = {
    "weights": "use lora with precision bfloat16, or trained_weights bfloat16_stochastic, or "
    f"{_SHARD}",
    "optimizer": f"{_LESS}, optimizer: name: adamw_8bit, or {_SHARD}",
    "gradients": f"{_LESS}, trained_weights bfloat16_stochastic, or {_SHARD}",
    "reference": "use lora, or loss: beta 0",
    "casts": "use lora or trained_weights bfloat16_master, or precision float32",
    "cache": "lower batch_size (all its completions are sampled at once) or settings: "
    "max_new_tokens",
    "activations": "set gradient_checkpointing, or lower micro_batch_size or settings: "
    "max_new_tokens or media",
    "scores": "lower micro_batch_size or settings: max_new_tokens, or set fast: on",
}
_EMBEDDING = "embed_tokens.weight"
_NEEDED = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    "vocab_size",
)
Moment = Literal[
    "sampling", "forward", "scores", "backward", "gradients", "embeddings", "optimizer"
]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of one process by part: what is ``always`` there, and what is besides at each of the
    ``moments`` of a step."""

    always: Mapping[str, int]
    moments: Mapping[Moment, Mapping[str, int]]

    def at(self, moment: Moment) -> int:
        return sum(self.always.values()) + sum(self.moments[moment].values())

    @property
    def worst(self) -> Moment:
        return max(self.moments, key=self.at)

    @property
    def peak(self) -> int:
        """The most that a step needs at any moment."""
        return self.at(self.worst)

    @property
    def parts(self) -> dict[str, int]:
        """What is there at the peak."""
        return {**self.always, **self.moments[self.worst]}

    @property
    def advice(self) -> str:
        """How to reduce the parts that are a tenth of the peak or more, the largest first."""
        parts = self.parts
        large = [name for name in _ADVICE if 10 * parts.get(name, 0) >= self.peak]
        large.sort(key=lambda name: -parts[name])
        return "; ".join(f"for {name} {_ADVICE[name]}" for name in large)

    def __str__(self) -> str:
        sizes = ", ".join(f"{k} {size / GIB:.3g}" for k, size in self.parts.items() if size)
        return f"{sizes}; most in {self.worst}"


def check_memory(
    config: TrainConfig,
    prompt: PromptSize,
    *,
    world: int,
    memory: int | None,
) -> Estimate | None:
    """The estimate, ``None`` without headers. Raises ``ConfigError`` if it exceeds the ``memory``
    bytes free on the device.

    ``prompt``: the longest. ``None``: unknown. The processes of a run share the
    memory of a CPU; each has a CUDA device of its own.
    """
    shapes = thinker_shapes(Path(config.checkpoint))
    if not shapes:
        return None
    found = estimate(config, shapes, prompt, world=world)
    many = f"; {world} processes" if world > 1 else ""
    needed = found.peak * (world if config.device == "cpu" else 1)
    usable = 1.0 if config.device == "cpu" else USABLE
    if memory is not None and needed > usable * memory:
        raise ConfigError(
            "memory",
            got=f"{needed / GIB:.3g} GiB needed (GiB: {found}{many})",
            want=f"no more than {usable:.0%} of the {memory / GIB:.3g} GiB free on the "
            f"{config.device}",
            fix=found.advice,
        )
    return found


def estimate(
    config: TrainConfig, shapes: Mapping[str, tuple[int, ...]], prompt: PromptSize, *, world: int
) -> Estimate:
    """The module's formula. ``shapes``: of the thinker's parameters, by name."""
    text = _text_config(config)
    number = _number(config)
    vocabulary, hidden = int(text["vocab_size"]), int(text["hidden_size"])
    half = number == 2
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    ranks = world if sharded else 1
    sizes = learning_sizes(shapes, config.freeze, config.lora)
    learning, largest = sum(sizes), max(sizes, default=0)
    every = sum(map(math.prod, shapes.values()))
    stored = 4 if config.trained_weights == "float32" else 2
    matrices = {n: s for n, s in shapes.items() if len(s) > 1 and not n.endswith(_EMBEDDING)}
    cast = 2 * sum(learning_sizes(matrices, config.freeze, config.lora))
    casts = cast if half and stored == 4 else 0
    # the gradient of the head, or of the embeddings
    head = 0
    if config.lora is None and "text" not in config.freeze:
        head = stored * vocabulary * hidden

    share = share_of(config.prompts, config.settings.group_size, world, 0)
    most = config.settings.max_new_tokens
    prompts, group = len(share.prompts), share.most
    fast = config.fast == "on" or (config.fast == "auto" and config.device == "cuda")
    completions = prompts * group
    micro = min(
        completions, max(config.micro_batch_size, group) if fast else config.micro_batch_size
    )
    shown = -(-micro // group)
    tokens = micro * most + (shown if fast else micro) * prompt.total
    cached = completions * most + (prompts if fast else completions) * prompt.total

    layer = _Layer.of(
        config,
        count=int(text["num_hidden_layers"]),
        hidden=hidden,
        wide=_intermediate(text),
        keys=int(text["num_key_value_heads"])
        * int(text.get("head_dim") or hidden // int(text["num_attention_heads"])),
        lora=config.lora is not None,
    )
    gradients = stored * learning // ranks * (2 if world > ranks else 1)
    older = gradients if micro < completions else 0
    scores = number * min(micro * most * vocabulary, FAST_SCORES if fast else 2**62)
    softmax = min(SOFTMAX, 4 * 4 * micro * most * vocabulary)
    kept = layer.all_kept(config) * tokens + _towers_kept(config, prompt) * shown
    busy, late = (
        (layer.again * tokens, 0)
        if config.gradient_checkpointing
        else (layer.passing * tokens, casts)
    )
    return Estimate(
        always={
            "runtime": RUNTIME if config.device == "cuda" else 0,
            "weights": (number * (every - (0 if config.lora else learning)) + stored * learning)
            // ranks,
            "reference": number * every // ranks
            if config.loss.beta > 0 and config.lora is None
            else 0,
            "optimizer": _state(config, learning) // ranks,
        },
        moments={
            "sampling": {
                "cache": layer.cache * layer.count * cached,
                "activations": prompts * prompt.total * layer.passed,
                "casts": casts,
                "whole weights": number * every if ranks > 1 else 0,
            },
            "forward": {
                "gradients": older, "activations": kept + layer.ends * tokens,
                "scores": scores + softmax, "casts": casts,
            },
            "scores": {
                "gradients": older + head, "activations": kept + layer.ends * tokens,
                "scores": 2 * scores + softmax, "casts": late,
            },
            "backward": {"gradients": older + head, "activations": kept + busy, "casts": late},
            "gradients": {
                "gradients": gradients + (0 if older else -head),
                "activations": (layer.kept + layer.passing) * tokens,
            },
            "embeddings": {"gradients": gradients + (2 if older else 1) * head},
            "optimizer": {"gradients": gradients, "workspace": _workspace(config, largest)},
        },
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Layer:
    """Bytes of a token in one of ``count`` layers: ``kept`` for the backward pass, ``entry``, which
    is kept instead with checkpointing, ``passing`` in the backward pass, ``again``, both if it is
    computed again there, ``passed`` without a gradient, ``cache``; and ``ends``, before the first
    and after the last."""

    count: int
    kept: int
    entry: int
    passing: int
    again: int
    passed: int
    cache: int
    ends: int

    @classmethod
    def of(
        cls, config: TrainConfig, *, count: int, hidden: int, wide: int, keys: int, lora: bool
    ) -> _Layer:
        number = _number(config)
        half = number == 2
        # embeddings that are float32 keep the residual stream in it under autocast
        wider = half and not lora and config.trained_weights == "float32"
        entry = 4 * hidden if wider else number * hidden
        own = 24 if lora else 30 if wider else 20 if half else 32
        kept = own * hidden + 4 * number * wide + 2 * number * keys
        passing = (4 if half and lora else 2) * number * wide
        return cls(
            count=count,
            kept=kept,
            entry=entry,
            passing=passing,
            again=kept + passing - (0 if lora else 11 if wider else 3) * hidden,
            passed=3 * number * wide + 5 * number * hidden,
            cache=(8 if wider else 2 * number) * keys,
            ends=8 * hidden + 2 * entry,
        )

    def all_kept(self, config: TrainConfig) -> int:
        """Of all layers."""
        return self.count * (self.entry if config.gradient_checkpointing else self.kept)


def _towers_kept(config: TrainConfig, prompt: PromptSize) -> int:
    """Bytes that the towers keep of a prompt, if they learn: four patches for a token that is seen,
    two frames for one that is heard."""
    if config.lora is not None:
        return 0
    thinker, found = read_config(Path(config.checkpoint)), 0
    for tower, part, count, hidden, wide, each in (
        ("image", "vision_config", "depth", "hidden_size", "intermediate_size", 4 * prompt.vision),
        ("audio", "audio_config", "encoder_layers", "d_model", "encoder_ffn_dim", 2 * prompt.sound),
    ):
        sizes = thinker.get(part, {})
        if tower not in config.freeze and all(name in sizes for name in (count, hidden, wide)):
            layer = _Layer.of(
                config, count=int(sizes[count]), hidden=int(sizes[hidden]), wide=int(sizes[wide]),
                keys=int(sizes[hidden]), lora=False,
            )  # fmt: skip
            found += each * layer.all_kept(config)
    return found


def _text_config(config: TrainConfig) -> Mapping[str, Any]:
    text: Mapping[str, Any] = read_config(Path(config.checkpoint)).get("text_config", {})
    missing = [name for name in _NEEDED if name not in text]
    if missing:
        raise CheckpointError(
            str(Path(config.checkpoint) / "config.json"), got=f"no text_config {missing[0]}",
            want="the sizes of the text model", fix="use the config saved with the weights",
        )  # fmt: skip
    return text


def _number(config: TrainConfig) -> int:
    """Bytes of a number in a forward."""
    return 2 if config.precision == "bfloat16" else 4


def _state(config: TrainConfig, learning: int) -> int:
    match config.optimizer.name:
        case "adamw":
            return (12 if config.trained_weights == "bfloat16_master" else 8) * learning
        case "adamw_8bit":
            return 2 * learning + 8 * learning // 256
        case "adafactor":
            return 0


def _workspace(config: TrainConfig, largest: int) -> int:
    """Of the optimizer, which takes weights one by one; the fused one has none."""
    if config.optimizer.name == "adamw" and config.trained_weights == "float32":
        return 0 if config.device == "cuda" else 4 * largest
    return 4 * largest


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
