"""How a clean loop is set up: data, sizes, and the common ways to train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LoopAudio = Literal["interleaved", "separate", "off"]

ROWS: Mapping[LoopAudio, Mapping[str, tuple[int, ...]]] = {
    "interleaved": {
        "video": (0, 1, 2, 5, 7, 8, 9, 13),
        "long": (12, 13, 11),
        "image": (16, 17),
        "text": (20, 21),
    },
    "separate": {
        "video": (3, 4, 6, 10, 2, 7),
        "long": (12, 11, 13),
        "image": (16, 17),
        "audio": (18, 19),
        "text": (20, 21),
    },
    "off": {
        "video": (0, 2, 7, 8, 14, 15),
        "long": (9, 12),
        "image": (16, 17),
        "text": (20, 21),
    },
}
"""Shipped rows (by number) that fit one batch-wide audio-in-video flag, by what they show.

An interleaved batch cannot hold a clip without a track, nor a row that lists the audio beside its
clip: transformers takes one flag for a whole call. ``long``: clips of 2 and 3 s with longer prompts
than the others, so that a batch of both is padded.
"""


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """One way to run the loop.

    ``audio``: the batch-wide decision. ``rows``: numbers of shipped rows, the prompts of one
    micro-batch. ``group_size``: completions per prompt. ``iterations``: optimizer steps on one
    rollout. ``accumulation``: micro-batches per step; later micro-batches and steps use other rows
    of the same kind. ``checkpointing``: of activations in the scoring forward. ``lora``: only
    adapters are trained. ``beta``: weight of the KL term. ``partial``: a partial reward acts only
    on the tokens of the context. ``freeze_towers``: only the text model is trained.
    """

    audio: LoopAudio = "interleaved"
    rows: tuple[int, ...] = (0, 5)
    group_size: int = 4
    temperature: float = 1.7
    max_new_tokens: int = 48
    dtype: Literal["float32", "bfloat16"] = "float32"
    iterations: int = 1
    accumulation: int = 1
    checkpointing: bool = False
    lora: bool = False
    beta: float = 0.0
    epsilon: float = 0.2
    loss_type: Literal["grpo", "dapo"] = "grpo"
    partial: bool = False
    freeze_towers: bool = True
    learning_rate: float = 1e-3
    seed: int = 0
