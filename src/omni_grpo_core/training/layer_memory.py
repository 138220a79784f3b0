"""What a transformer layer holds of a token, in bytes; no torch. A part of ``memory.py``.

It is what torch saves for the backward pass of transformers' decoder layer, and was counted by
tracing it (``tests/training/test_traced_memory.py``). Hidden size H, intermediate size I, all heads
of keys K, with bfloat16 weights: 20 H + 8 I + 4 K; with adapters 24 H + 8 I + 4 K, since frozen
matrices keep no inputs and adapters keep copies of theirs; with float32 weights under autocast,
whose residual stream is float32, 30 H + 8 I + 4 K. With checkpointing only the layer's input. In
the backward pass come the gradients within the MLP, 4 I, with adapters, which work on float32
copies, 8 I.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_grpo_core.errors import CheckpointError
from omni_grpo_core.training.config import TrainConfig
from omni_grpo_core.training.prompt_estimate import PromptSize, read_config

_NEEDED = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    "vocab_size",
)


@dataclass(frozen=True, slots=True)
class Layer:
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
    def of_text(cls, config: TrainConfig, text: Mapping[str, Any]) -> Layer:
        hidden = int(text["hidden_size"])
        head = int(text.get("head_dim") or hidden // int(text["num_attention_heads"]))
        return cls.of(
            config,
            count=int(text["num_hidden_layers"]),
            hidden=hidden,
            wide=_intermediate(text),
            keys=int(text["num_key_value_heads"]) * head,
            lora=config.lora is not None,
        )

    @classmethod
    def of(
        cls, config: TrainConfig, *, count: int, hidden: int, wide: int, keys: int, lora: bool
    ) -> Layer:
        number = number_size(config)
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


def towers_kept(config: TrainConfig, prompt: PromptSize) -> int:
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
            layer = Layer.of(
                config, count=int(sizes[count]), hidden=int(sizes[hidden]), wide=int(sizes[wide]),
                keys=int(sizes[hidden]), lora=False,
            )  # fmt: skip
            found += each * layer.all_kept(config)
    return found


def text_config(config: TrainConfig) -> Mapping[str, Any]:
    text: Mapping[str, Any] = read_config(Path(config.checkpoint)).get("text_config", {})
    missing = [name for name in _NEEDED if name not in text]
    if missing:
        raise CheckpointError(
            str(Path(config.checkpoint) / "config.json"), got=f"no text_config {missing[0]}",
            want="the sizes of the text model", fix="use the config saved with the weights",
        )  # fmt: skip
    return text


def number_size(config: TrainConfig) -> int:
    """Bytes of a number in a forward."""
    return 2 if config.precision == "bfloat16" else 4


def _intermediate(text: Mapping[str, Any]) -> int:
    """Intermediate size that one token uses in a layer: in a mixture, of the experts it visits."""
    if text.get("num_experts_per_tok"):
        return int(text["num_experts_per_tok"]) * int(text.get("moe_intermediate_size", 0))
    return int(text.get("intermediate_size", 0))
