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
    gradients   as the weights; older: those of earlier micro-batches; DDP's buckets as much again;
                offloaded OFFLOADED_OUTSTANDING, and OFFLOADED_AT_ONCE, or one, in optimizer
    casts       2 W with precision bfloat16: autocast's copies of the float32 matrices, W entries;
                none under FSDP, which gathers them cast
    cache       2 keys and values of layers x kv_heads x head_dim: of N (L + C) tokens; fast N C + L
    kept        tokens x layers x a; with gradient checkpointing tokens x layers x r; and of towers
    layer       tokens x t; with gradient checkpointing tokens x (a + t)
    head        the gradient of H V weights
    whole       under FSDP: sampling gathers all weights; an update, twice, those outside layers,
                or with fsdp_reshard_after_forward false has all of sampling's until its end
    scores      M C V b in the plain step; the fast step has a chunk of them at a time
    tokens      M (L + C) in the plain step; fast M C and L of each prompt of the micro-batch

P parameters of the thinker, N completions of a step on one process, M of a micro-batch, L tokens of
the longest prompt, C ``max_new_tokens``, V vocabulary, H hidden size, I intermediate size, K all
heads of keys, b bytes of a number in a forward (4, with bfloat16 2).

a, t and r, bytes of a token in a layer: :mod:`~omni_grpo_core.training.layer_memory`. Left out:
frozen towers, whose features pass and go. ``tests/gpu/memory_runs.py`` compares all with a device.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omni_grpo_core.core.weight_headers import weight_shapes
from omni_grpo_core.errors import CheckpointError
from omni_grpo_core.fast import obstacles
from omni_grpo_core.training.config import TOWER_PREFIX, LoraConfig, Tower, TrainConfig
from omni_grpo_core.training.launcher import is_on
from omni_grpo_core.training.layer_memory import Layer, number_size, text_config, towers_kept
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
OFFLOADED_OUTSTANDING = 2 * GIB
"""Bytes of gradients that wait on a CUDA device until they are copied to the host."""
OFFLOADED_AT_ONCE = GIB
"""Bytes of gradients that come back for the optimizer at a time."""

_EMBEDDING = "embed_tokens.weight"
Moment = Literal[
    "sampling", "forward", "scores", "backward", "gradients", "embeddings", "optimizer"
]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of one process by part: what is ``always`` there, and what is besides at each of the
    ``moments`` of a step. ``offloaded``: gradients in the memory of the host."""

    always: Mapping[str, int]
    moments: Mapping[Moment, Mapping[str, int]]
    offloaded: int

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

    def __str__(self) -> str:
        sizes = ", ".join(f"{k} {size / GIB:.3g}" for k, size in self.parts.items() if size)
        host = f"; gradients of {self.offloaded / GIB:.3g} on the host" if self.offloaded else ""
        return f"{sizes}; most in {self.worst}{host}"


def estimate(
    config: TrainConfig, shapes: Mapping[str, tuple[int, ...]], prompt: PromptSize, *, world: int
) -> Estimate:
    """The module's formula. ``shapes``: of the thinker's parameters, by name."""
    text, rows = text_config(config), _Rows.of(config, prompt, world)
    sharded = is_on(os.environ, "ACCELERATE_USE_FSDP")
    resharded = is_on(os.environ, "FSDP_RESHARD_AFTER_FORWARD", "true")
    ranks = world if sharded else 1
    number, stored = number_size(config), 4 if config.trained_weights == "float32" else 2
    every = sum(map(math.prod, shapes.values()))
    whole, outside = number * every, number * _outside_layers(shapes)
    learning = learning_sizes(shapes, config.freeze, config.lora)
    trained = sum(learning)
    frozen = every if config.lora is not None else every - trained
    copied = config.loss.beta > 0 and config.lora is None
    largest = max(learning, default=0)
    # data-parallel gradients are in buckets too
    gradients = stored * trained // ranks * (2 if world > ranks else 1)
    offloaded = config.offload_gradients and config.device == "cuda"
    back = min(gradients, max(OFFLOADED_AT_ONCE, stored * largest)) if offloaded else gradients
    matrices = {n: s for n, s in shapes.items() if len(s) > 1 and not n.endswith(_EMBEDDING)}
    casts = 0
    if number == 2 and stored == 4 and not sharded:  # FSDP gathers what is cast already
        casts = 2 * sum(learning_sizes(matrices, config.freeze, config.lora))
    head = 0
    if config.lora is None and "text" not in config.freeze:
        head = stored * int(text["vocab_size"]) * int(text["hidden_size"])
    layer = Layer.of_text(config, text)
    moments: dict[Moment, Mapping[str, int]] = {
        "sampling": {
            "cache": layer.cache * layer.count * rows.cached,
            "activations": rows.prompts * prompt.total * layer.passed,
            "casts": casts,
            "whole weights": whole if sharded else 0,
        },
        **_update(
            config,
            rows,
            layer,
            scores=rows.scored * int(text["vocab_size"]),
            towers=towers_kept(config, prompt) * rows.shown,
            gradients=min(gradients, OFFLOADED_OUTSTANDING) if offloaded else gradients,
            offloaded=offloaded,
            head=head,
            casts=casts,
            gathered=(2 * outside if resharded else whole) if sharded else 0,
            still=(2 * outside if resharded else outside) if sharded else 0,
        ),
        "optimizer": {
            "gradients": back,
            "workspace": _workspace(config, largest),
        },
    }
    return Estimate(
        always={
            "runtime": RUNTIME if config.device == "cuda" else 0,
            "weights": (number * frozen + stored * trained) // ranks,
            "reference": number * every // ranks if copied else 0,
            "optimizer": _state(config, trained) // ranks,
        },
        moments=moments,
        offloaded=gradients if offloaded else 0,
    )


def _update(
    config: TrainConfig,
    rows: _Rows,
    layer: Layer,
    *,
    scores: int,
    towers: int,
    gradients: int,
    offloaded: bool,
    head: int,
    casts: int,
    gathered: int,
    still: int,
) -> dict[Moment, Mapping[str, int]]:
    """``scores``: how many are computed; all else in bytes. ``still``: of what is ``gathered``, at
    the end."""
    number, tokens = number_size(config), rows.tokens
    softmax = min(SOFTMAX, 4 * 4 * scores)
    bytes_ = number * (min(scores, FAST_SCORES) if rows.fast else scores)
    kept = layer.all_kept(config) * tokens + towers
    busy, late = layer.passing * tokens, casts
    if config.gradient_checkpointing:
        busy, late = layer.again * tokens, 0
    older = gradients if rows.micro < rows.completions else 0
    ends = kept + layer.ends * tokens
    # the embeddings' gradient is made beside those that are counted
    apart = offloaded or older > 0
    return {
        "forward": {
            "gradients": older, "activations": ends, "scores": bytes_ + softmax, "casts": casts,
            "whole weights": gathered,
        },
        "scores": {
            "gradients": older + head, "activations": ends, "scores": 2 * bytes_ + softmax,
            "casts": late, "whole weights": gathered,
        },
        "backward": {
            "gradients": gradients if offloaded else older + head,
            "activations": kept + busy, "casts": late,
            "whole weights": gathered,
        },
        "gradients": {
            "gradients": gradients - (0 if apart else head),
            "activations": (layer.kept + layer.passing) * tokens, "whole weights": still,
        },
        "embeddings": {"gradients": gradients + (2 if apart else 1) * head},
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Rows:
    """One process's ``prompts`` and ``completions`` of a step; ``micro``: completions of a
    micro-batch, of which ``shown`` prompts, ``tokens`` in all, ``scored`` of them; ``cached``:
    tokens whose keys and values are kept when sampling."""

    fast: bool
    prompts: int
    completions: int
    micro: int
    shown: int
    tokens: int
    scored: int
    cached: int

    @classmethod
    def of(cls, config: TrainConfig, prompt: PromptSize, world: int) -> _Rows:
        share = share_of(config.prompts, config.settings.group_size, world, 0)
        prompts, group = len(share.prompts), share.most
        completions, most = prompts * group, config.settings.max_new_tokens
        fast = config.fast == "on" or (
            config.fast == "auto" and config.device == "cuda" and fast_obstacle(config) is None
        )
        # the fast step does not split a group
        micro = min(completions, max(config.micro_batch_size, group if fast else 0))
        shown = -(-micro // group)
        return cls(
            fast=fast,
            prompts=prompts,
            completions=completions,
            micro=micro,
            shown=shown,
            tokens=micro * most + (shown if fast else micro) * prompt.total,
            scored=micro * most,
            cached=completions * most + (prompts if fast else completions) * prompt.total,
        )


def fast_obstacle(config: TrainConfig) -> str | None:
    """Why a run cannot take the fast step, as far as it is known before the model is loaded."""
    text = read_config(Path(config.checkpoint)).get("text_config", {})
    return obstacles.in_library() or obstacles.in_config(text)


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


def _outside_layers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Entries that FSDP gathers at once and keeps, if it wraps each layer of the text model."""
    outside = (shape for name, shape in shapes.items() if not name.startswith("model.layers."))
    return sum(map(math.prod, outside))


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
        return [lora.rank * sum(shape) for shape in adapted(lora, shapes)]
    frozen = tuple(prefix for tower in freeze for prefix in TOWER_PREFIX[tower])
    return [math.prod(s) for n, s in shapes.items() if not (frozen and n.startswith(frozen))]


def adapted(lora: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """The shapes of the weights, by published name, that get an adapter."""
    pattern = re.compile(lora_pattern(lora, layer=r"model\.layers\.\d+") + r"\.weight")
    return (s for name, s in shapes.items() if len(s) == 2 and pattern.fullmatch(name))


def lora_pattern(lora: LoraConfig, *, layer: str) -> str:
    """Matches the names of adapted modules, the text model's layers being named ``layer``."""
    modules = "|".join(map(re.escape, lora.target_modules))
    return rf"{layer}\.(?!mlp\.experts\.).*\.({modules})"


def thinker_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the thinker's parameters, by their published names, from the headers of its
    safetensors files; empty without any. A full checkpoint's talker is not loaded and does not
    count."""
    try:
        return weight_shapes(checkpoint)
    except CheckpointError:
        return {}  # loading it reports what is wrong
