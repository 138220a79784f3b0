"""Supervised training of the tiny policy: next-token loss on completions of questions about clips.

Every clip is asked about several times, with several carries, so that only the frames reveal motion
and only the sound reveals pitch. Frames are shifted randomly at every step: they wrap around, so a
shifted clip has the same attributes. Without that the training clips are memorised before motion is
learnt.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.forward import embed, positions, text_states
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.tiny.examples import draw_clips, make_example, make_row, with_completion
from omni_grpo_core.tiny.make import make_of
from omni_grpo_core.tiny.questions import Carry, Question, ask
from omni_grpo_core.types import Row

MIX: dict[Carry, float] = {
    "interleaved": 0.38,
    "separate": 0.17,
    "off": 0.10,
    "image": 0.07,
    "audio": 0.10,
    "text": 0.18,
}
"""Shares of the carries in training."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how hard to train.

    Motion is learnt last, after colour, pitch and the words. ``stop``: the step to end at early,
    which leaves an under-trained policy.
    """

    clips: int = 1000
    questions_per_clip: int = 3
    steps: int = 900
    rate: float = 3e-3
    batch: int = 24
    warm_up: int = 50
    stop: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """A row with its completion, ready to be batched. ``position_ids``: (3, length);
    ``completion``: how many of its last tokens are the completion."""

    row: Row
    position_ids: Tensor
    completion: int


OnProgress = Callable[[str, int, int, float], None]
"""Called after each unit of work: phase, done, of how many, and the loss (nan in preparation)."""


def clip_questions(plan: Plan, seed: int) -> list[Question]:
    """The questions on training clips."""
    rng = np.random.default_rng([seed, 0])
    carries = list(MIX)
    return [
        ask(clip, carries[int(rng.choice(len(carries), p=list(MIX.values())))], rng)
        for clip in draw_clips("train", plan.clips, seed=seed)
        for _ in range(plan.questions_per_clip)
    ]


def clip_lessons(
    policy: Policy, questions: Sequence[Question], on_progress: OnProgress
) -> list[Lesson]:
    """The questions through the project's own stages: files written, decoded, processed."""
    lessons = []
    with tempfile.TemporaryDirectory() as folder:
        for number, question in enumerate(questions, 1):
            example = make_example(question, Path(folder), make_of(policy.family))
            row = make_row(example, policy)
            lessons.append(_lesson(policy, row, question.completion))
            on_progress("clips", number, len(questions), math.nan)
    return lessons


def _lesson(policy: Policy, row: Row, completion: str) -> Lesson:
    tokenizer = policy.processor.tokenizer
    ids = [*tokenizer(completion)["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
    whole = with_completion(row, ids)
    batch = collate([whole], policy.pad_token_id)
    return Lesson(whole, positions(policy, batch).position_ids[:, 0], len(ids))


def train(
    policy: Policy, plan: Plan, lessons: Sequence[Lesson], *, seed: int, on_progress: OnProgress
) -> None:
    """AdamW with warm-up and cosine decay to a fiftieth; weights change in place.

    ``plan.stop`` ends it early, with the learning rates of the full training.
    """
    rng = np.random.default_rng([seed, 2])
    optimizer = torch.optim.AdamW(policy.model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    policy.model.train()
    last = plan.steps if plan.stop is None else min(plan.stop, plan.steps)
    for done in range(1, last + 1):
        share = 0.02 + 0.49 * (1 + math.cos(math.pi * done / plan.steps))
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * share * min(1.0, done / plan.warm_up)
        chosen = rng.choice(len(lessons), size=plan.batch, replace=False)
        loss = completion_loss(policy, [shifted(lessons[i], rng) for i in chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        on_progress("training", done, last, float(loss.detach()))
    policy.model.eval()


def shifted(lesson: Lesson, rng: np.random.Generator) -> Lesson:
    """The lesson with its frames shifted by a random number of pixels, wrapping around."""
    tensors = dict(lesson.row.tensors)
    for pixels, grids in (
        ("pixel_values", "image_grid_thw"),
        ("pixel_values_videos", "video_grid_thw"),
    ):
        if pixels in tensors:
            (grid,) = tensors[grids].tolist()
            images = pictures(tensors[pixels], grid)
            by = tuple(int(rng.integers(side)) for side in images.shape[-2:])
            rolled = images.roll(by, dims=(-2, -1))
            tensors[pixels] = patches(rolled, grid)
    return replace(lesson, row=replace(lesson.row, tensors=tensors))


def pictures(flat: Tensor, grid: Sequence[int]) -> Tensor:
    """Patches as the image processor lays them out, (t * h * w, 3 * 2 * p * p), back to pictures:
    (t, 2, 3, h * p, w * p). The four patches that are merged are adjacent."""
    t, h, w = grid
    p = math.isqrt(flat.shape[1] // 6)
    cut = flat.view(t, h // 2, w // 2, 2, 2, 3, 2, p, p)
    return cut.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t, 2, 3, h * p, w * p)


def patches(images: Tensor, grid: Sequence[int]) -> Tensor:
    """The inverse of :func:`pictures`."""
    t, h, w = grid
    p = images.shape[-1] // w
    cut = images.view(t, 2, 3, h // 2, 2, p, w // 2, 2, p)
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)


def completion_loss(policy: Policy, chosen: Sequence[Lesson]) -> Tensor:
    """Mean next-token loss over the completion tokens of a batch, a scalar."""
    batch = collate([lesson.row for lesson in chosen], policy.pad_token_id)
    width = batch.input_ids.shape[1]
    longest = max(lesson.completion for lesson in chosen)
    position_ids = torch.ones(3, len(chosen), width, dtype=chosen[0].position_ids.dtype)
    targets = batch.input_ids[:, -longest:].clone()
    for index, lesson in enumerate(chosen):
        position_ids[:, index, width - lesson.position_ids.shape[1] :] = lesson.position_ids
        targets[index, : longest - lesson.completion] = -100  # no loss on the prompt
    hidden = text_states(
        policy,
        batch,
        embed(policy, batch),
        attention_mask=batch.attention_mask,
        position_ids=position_ids,
    ).last_hidden_state
    logits = policy.model.lm_head(hidden[:, -longest - 1 : -1])
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten().to(policy.device), ignore_index=-100
    )
