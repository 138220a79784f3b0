"""How a clean loop is set up: data, sizes, and the ways of training that people choose from."""

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
"""Shipped rows (by number) that one batch-wide audio-in-video flag can carry, by what they show.

A clip without a track cannot ride in an interleaved batch, nor can a row that lists the sound
beside its clip: transformers takes one flag for a whole call. ``long``: clips of 2 and 3 s, whose
prompts are longer than those of the others, so that a batch of both is padded.
"""


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """One way to run the loop.

    ``audio``: the batch-wide decision. ``rows``: numbers of shipped rows, the prompts of one
    micro-batch. ``group_size``: completions a prompt. ``iterations``: optimizer steps on one
    rollout. ``accumulation``: micro-batches a step; after the first, and after the first
    step, other rows of the same kind follow. ``checkpointing``: of activations in the scoring
    forward. ``lora``: adapters learn, all else is frozen. ``beta``: weight of the KL term.
    ``partial``: a partial reward acts on the tokens of the context alone. ``freeze_towers``: the
    text model learns alone.
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
