"""A handwritten trace of a two-row batch: small enough to check by eye, with every kind of value.

Row 0 is a clip with eight video and four audio tokens, row 1 is text only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from omni_grpo_core.types import (
    Batch,
    Check,
    Completion,
    Embeddings,
    Logits,
    Malformed,
    Parsed,
    Positions,
    Prompt,
    Rollout,
    Row,
    Score,
    Section,
    Span,
    Stage,
    StageRecord,
    Trace,
)

VOCABULARY = {
    0: "<|endoftext|>",
    1: "<|im_start|>",
    2: "<|im_end|>",
    3: "<|VIDEO|>",
    4: "<|AUDIO|>",
    5: "user",
    6: "\n",
    7: "which",
    8: " colour",
    9: "?",
    10: "red",
}
CLIP_IDS = (1, 5, 6, *[3] * 8, *[4] * 4, 7, 8, 9, 2, 6)
TEXT_IDS = (1, 5, 6, 7, 8, 9, 2, 6)


def decode(ids: Sequence[int]) -> str:
    return "".join(VOCABULARY[i] for i in ids)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def patches() -> torch.Tensor:
    """(40, 60): forty patches of sixty numbers."""
    return noise(40, 60)


def small_batch(pixels: torch.Tensor | None = None) -> Batch:
    tensors = {
        "pixel_values_videos": patches() if pixels is None else pixels,
        "video_grid_thw": torch.tensor([[2, 4, 5]]),
        "video_second_per_grid": torch.tensor([0.5]),
    }
    spans = (Span("video", 0, 3, 8), Span("audio", 0, 11, 4))
    clip = Row("clip", torch.tensor(CLIP_IDS), "interleaved", spans, tensors)
    text = Row("text", torch.tensor(TEXT_IDS), "off", (), {})
    pad = len(CLIP_IDS) - len(TEXT_IDS)
    return Batch(
        rows=(clip, text),
        input_ids=torch.tensor([CLIP_IDS, [0] * pad + list(TEXT_IDS)]),
        attention_mask=torch.tensor([[1] * len(CLIP_IDS), [0] * pad + [1] * len(TEXT_IDS)]),
        tensors=tensors,
    )


def small_trace(batch: Batch | None = None) -> Trace:
    batch = batch or small_batch()
    width = batch.input_ids.shape[1]
    answer = Completion("clip", 0, (10, 2), "red", "stop", (-0.25, -0.125))
    values: dict[Stage, object] = {
        "text": (Prompt("clip", "which colour?\nred or blue", {"video": 1, "audio": 1}),),
        "batch": batch,
        "embeddings": Embeddings(
            noise(2, width, 8), ((noise(8, 8, seed=1), noise(4, 8, seed=2)), ())
        ),
        "positions": Positions(
            torch.arange(width).expand(3, 2, width).contiguous(), torch.tensor([0, -12])
        ),
        "logits": Logits(noise(2, len(VOCABULARY), seed=3)),
        "completion": Rollout((answer,), group_size=1, temperature=1.0, seed=7),
        "parsed": (
            Parsed(Section("c", 9, 10), Section("t", 27, 28), Section("red", 44, 47)),
            Malformed("no <answer>", 0),
        ),
        "reward": {"format": (Score(1.0, "well-formed"), Score(None, "judge unreachable"))},
    }
    checks = (Check("looked at", True, "by eye"),)
    return Trace(
        header={"torch": torch.__version__, "device": "cpu"},
        stages=tuple(StageRecord(stage, value, checks, 0.5) for stage, value in values.items()),
    )


def with_value(trace: Trace, stage: Stage, value: object) -> Trace:
    """``trace`` with its value at one stage replaced."""
    return replace(
        trace,
        stages=tuple(replace(r, value=value) if r.stage == stage else r for r in trace.stages),
    )
