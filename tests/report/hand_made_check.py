"""A check result small enough to verify by hand: two rows, one with a video and its interleaved
track in two chunks, one text-only. No model has run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch

from omni_grpo_core.pipeline.ablation import ModalityProof
from omni_grpo_core.pipeline.check import CheckResult, Health
from omni_grpo_core.pipeline.stages import Values
from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.types import (
    STAGES,
    Audio,
    Batch,
    Check,
    Completion,
    Media,
    MediaRef,
    Positions,
    Prompt,
    Rollout,
    Row,
    Sample,
    Score,
    Span,
    StageRecord,
    Trace,
    Video,
)

WORDS: Mapping[int, str] = {
    0: "<|im_start|>", 1: "user", 2: "\n", 3: "<|VIDEO|>", 4: "<|AUDIO|>", 5: "What", 6: "?",
    7: "<|im_end|>",
}  # fmt: skip
GOOD = "<context>a man waves</context><think>he greets</think><answer>B</answer>"
GOLD = "<context>c</context><think>t</think><answer>B</answer>"
HOSTILE = "</details></pre><script>alert(1)</script><img src=http://evil.example/x> [red]x[/red]"
_SPANS = (Span("video", 0, 2, 2), Span("audio", 0, 4, 3), Span("video", 0, 7, 2),
          Span("audio", 0, 9, 1))  # fmt: skip


def decode(ids: Sequence[int]) -> str:
    return "".join(WORDS[token] for token in ids)


def media_row(sample_id: str = "rows.json:1") -> Row:
    """12 tokens: start, user, 2 video, 3 audio, 2 video, 1 audio, What, ?."""
    mask = torch.zeros(1, 20, dtype=torch.int64)
    mask[0, :16] = 1
    tensors = {
        "video_grid_thw": torch.tensor([[2, 4, 2]]),
        "input_features": torch.linspace(-1, 1, 4 * 20).reshape(1, 4, 20),
        "feature_attention_mask": mask,
    }
    ids = torch.tensor([0, 1, 3, 3, 4, 4, 4, 3, 3, 4, 5, 6])
    return Row(sample_id, ids, "interleaved", _SPANS, tensors)


def text_row(sample_id: str = "rows.json:2") -> Row:
    return Row(sample_id, torch.tensor([0, 1, 2, 5, 6, 7]), "off", (), {})


def clip_media(sample_id: str = "rows.json:1") -> Media:
    """Three frames of 6 × 4 pixels, red brighter in each, at 2 fps, and 0.16 s of sound."""
    frames = torch.zeros(3, 3, 4, 6)
    frames[:, 0] = torch.tensor([10.0, 100.0, 250.0])[:, None, None]
    video = Video(frames, sample_fps=2.0, source_fps=25.0, duration=1.5)
    sound = Audio(torch.sin(torch.arange(2560) / 8) / 2, from_video=0)
    return Media(sample_id, (), (video,), (sound,), "hand 1.0")


def sample(sample_id: str, question: str, media: tuple[MediaRef, ...] = ()) -> Sample:
    options = ("A. yes", "B. no")
    return Sample(sample_id, question, "multiple choice", options, GOLD, media, sample_id)


def completion(group: str, text: str, index: int = 0) -> Completion:
    return Completion(group, index, (5, 6, 7), text, "stop", (-0.1, -0.2, -0.3))


def result(
    greedy: Sequence[str] = (GOOD, "B"),
    *,
    verdict: Literal["pass", "fail"] = "pass",
    failing: Mapping[str, Check] | None = None,
    extra: Sequence[StageRecord[object]] = (),
    shift: float = 0.5,
    question: str = "What happens?",
) -> CheckResult:
    """``failing``: a check by the stage to add it to. ``extra``: stages appended at the end."""
    rows = (media_row(), text_row())
    names = [row.sample_id for row in rows]
    ids = torch.full((2, 12), 7)
    ids[0], ids[1, 6:] = rows[0].input_ids, rows[1].input_ids
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :6] = 0
    positions = torch.arange(12).expand(3, 2, 12).clone()
    positions[:, 1, 6:] = torch.arange(6)
    rolled = tuple(completion(n, text) for n, text in zip(names, greedy, strict=True))
    sampled = tuple(completion(n, f"sampled {n} {i}", i) for n in names for i in range(2))
    values: Values = {
        "sample": (sample(names[0], question, (MediaRef("video", "a.mp4"),)),
                   sample(names[1], "And then?")),
        "text": tuple(Prompt(n, f"<|im_start|>user {n}", {}) for n in names),
        "media": (clip_media(), Media(names[1], (), (), (), "hand 1.0")),
        "batch": Batch(rows, ids, mask, {}),
        "positions": Positions(positions, torch.zeros(2, dtype=torch.int64)),
        "completion": Rollout(rolled, 1, 0.0, 0),
        "sampled": Rollout(sampled, 2, 1.0, 7),
        "parsed": tuple(parse(text) for text in greedy),
        "reward": {"format": (Score(1.0, "well formed"), Score(0.0, "text outside the tags")),
                   "accuracy": (Score(1.0, "B is B"), Score(None, "judge unreachable"))},
    }  # fmt: skip
    records = []
    for name in STAGES:
        if name not in values:
            continue
        checks: tuple[Check, ...] = (Check(f"{name} looked at", True, f"seen {name}"),)
        if failing and name in failing:
            checks += (failing[name],)
        records.append(StageRecord(name, values.get(name), checks, 0.25))
    header = {"torch": "9.9", "checkpoint": "/some/where", "device": "cpu", "dtype": "float32"}
    proofs = (
        ModalityProof("video", 1, 1.0, 0.0, 0.5, 1.0, shift),
        ModalityProof("audio", 1, 1.0, 1.0, 1.0, 0.0, 0.25),
    )
    health = Health(0.5, 0.5, 0.25, 1.0, 0.0, 42.5, 0.75)
    return CheckResult(verdict, Trace(header, (*records, *extra)), values, proofs, health)


def many_rows(count: int) -> CheckResult:
    """``count`` rows: text, except the last, which has media."""
    base = result()
    names = [f"rows.json:{i + 1}" for i in range(count)]
    rows = (*(text_row(name) for name in names[:-1]), media_row(names[-1]))
    values: Values = {
        "sample": tuple(sample(name, f"Question of {name}") for name in names),
        "text": tuple(Prompt(name, "p", {}) for name in names),
        "media": (*(Media(n, (), (), (), "hand 1.0") for n in names[:-1]), clip_media(names[-1])),
        "batch": Batch(rows, torch.full((count, 12), 7), torch.ones(count, 12), {}),
        "completion": Rollout(tuple(completion(n, GOOD) for n in names), 1, 0.0, 0),
        "parsed": tuple(parse(GOOD) for _ in names),
        "reward": {},
    }
    records = tuple(record for record in base.trace.stages if record.stage in values)
    return replace(base, trace=Trace(base.trace.header, records), values=values)


def long_clips(count: int) -> CheckResult:
    """``count`` rows of the same 30 s clip: 60 frames, 1,800 video and 600 audio tokens."""
    base = many_rows(count)
    across, down = torch.linspace(0, 200, 448), torch.linspace(0, 50, 252)
    noise = torch.randn(252, 448, generator=torch.Generator().manual_seed(0)) * 3
    picture = (across + down[:, None] + noise).clamp(0, 255).expand(60, 3, 252, 448)
    sound = torch.sin(torch.arange(480_000) / 8)
    tensors = {
        "video_grid_thw": torch.tensor([[30, 18, 32]]),
        "input_features": torch.rand(1, 128, 3000, generator=torch.Generator().manual_seed(0)),
    }
    spans = (Span("video", 0, 0, 1800), Span("audio", 0, 1800, 600))
    ids = torch.tensor([3] * 1800 + [4] * 600)
    rows, media = [], []
    for old in base.values["batch"].rows:
        rows.append(Row(old.sample_id, ids, "interleaved", spans, tensors))
        clip = Video(picture, 2.0, 25.0, 30.0)
        media.append(Media(old.sample_id, (), (clip,), (Audio(sound, 0),), "hand 1.0"))
    batch = Batch(tuple(rows), ids.expand(count, -1), torch.ones(count, 2400), {})
    values: Values = {**base.values, "batch": batch, "media": tuple(media)}
    return replace(base, values=values)
