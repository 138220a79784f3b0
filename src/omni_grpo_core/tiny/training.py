"""Teaching the tiny policy: next-token loss on the completions, options looked up first.

Reading a letter off shuffled options is the one thing that is slow to be learnt: an attention
pattern over two layers has to form, and next to forty easy tokens it weighs little in the loss.
Hence drills before the clips and some in every batch after (four look-ups a row, nothing else to
learn), and more weight on the letter inside ``<think>``.
"""

from __future__ import annotations

import math
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omni_grpo_core.batch import collate
from omni_grpo_core.forward import embed, positions
from omni_grpo_core.policy import Policy
from omni_grpo_core.tiny.examples import draw_clips, make_example, make_row, with_completion
from omni_grpo_core.tiny.questions import VALUES, Carry, Question, ask, reason
from omni_grpo_core.types import Row

MIX: dict[Carry, float] = {
    "interleaved": 0.38,
    "separate": 0.17,
    "off": 0.10,
    "image": 0.07,
    "audio": 0.10,
    "text": 0.18,
}
"""How the training clips are carried."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how hard to train.

    Drills go on until ``drill_goal`` of the last 50 steps' letters were right, ``drill_steps`` at
    most; then come ``steps`` on the clips, ``rehearsed`` drills in each batch.
    """

    clips: int = 1280
    questions_per_clip: int = 2
    drills: int = 3000
    drill_steps: int = 1500
    drill_goal: float = 0.96
    drill_rate: float = 4e-3
    drill_batch: int = 32
    steps: int = 1400
    rate: float = 2e-3
    batch: int = 20
    rehearsed: int = 8
    warm_up: int = 50
    letter_weight: float = 3.0


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """A row with its completion, ready to be batched. ``position_ids``: (3, length); ``weights``:
    (completion,), how much each of its tokens counts."""

    row: Row
    position_ids: Tensor
    weights: Tensor


Tell = Callable[[str, int, int, float], None]
"""Told after each unit of work: phase, done, of how many, and the loss (nan while preparing)."""


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
    policy: Policy, plan: Plan, questions: Sequence[Question], tell: Tell
) -> list[Lesson]:
    """The questions through the project's own stages: files written, decoded, processed."""
    lessons = []
    with tempfile.TemporaryDirectory() as folder:
        for number, question in enumerate(questions, 1):
            row = make_row(make_example(question, Path(folder)), policy.processor)
            lessons.append(_lesson(policy, row, question.completion, plan))
            tell("clips", number, len(questions), math.nan)
    return lessons


def drill_lessons(policy: Policy, plan: Plan, seed: int) -> list[Lesson]:
    """Nothing but look-ups: a question in words, and each of its four options with its letter."""
    rng = np.random.default_rng([seed, 1])
    lessons = []
    for clip in draw_clips("train", plan.drills, seed=seed):
        question = ask(clip, "text", rng)
        values = VALUES[question.topic]
        asked = [{"role": "user", "content": "\n".join((question.text, *question.options))}]
        text = policy.processor.apply_chat_template(
            asked, add_generation_prompt=True, tokenize=False
        )
        ids = policy.processor.tokenizer(text, return_tensors="pt")["input_ids"][0]
        told = [
            reason(question.topic, values[i], "ABCD"[question.order.index(i)])
            for i in rng.permutation(4)
        ]
        row = Row("drill", ids, "off", (), {})
        lessons.append(_lesson(policy, row, "\n".join(told), plan))
    return lessons


def _lesson(policy: Policy, row: Row, completion: str, plan: Plan) -> Lesson:
    tokenizer = policy.processor.tokenizer
    ids = [*tokenizer(completion)["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
    # " B" is a letter in the reasoning; options and answer have "B", another token
    letters = [tokenizer(f" {letter}")["input_ids"][0] for letter in "ABCD"]
    whole = with_completion(row, ids)
    return Lesson(
        row=whole,
        position_ids=positions(policy, collate([whole], policy.pad_token_id)).position_ids[:, 0],
        weights=torch.tensor([plan.letter_weight if i in letters else 1.0 for i in ids]),
    )


def train(
    policy: Policy,
    plan: Plan,
    drills: Sequence[Lesson],
    lessons: Sequence[Lesson],
    *,
    seed: int,
    tell: Tell,
) -> None:
    """Drills, then clips; the policy's weights change in place."""
    rng = np.random.default_rng([seed, 2])
    optimizer = torch.optim.AdamW(policy.model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)

    def some(pool: Sequence[Lesson], size: int) -> list[Lesson]:
        return [pool[i] for i in rng.choice(len(pool), size=size, replace=False)]

    def step(chosen: Sequence[Lesson], rate: float) -> tuple[float, float]:
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, letters = completion_loss(policy, chosen)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach()), letters

    policy.model.train()
    recent: deque[float] = deque([0.0] * 50, maxlen=50)
    for done in range(1, plan.drill_steps + 1):
        rate = plan.drill_rate * min(1.0, done / plan.warm_up)
        loss, letters = step(some(drills, plan.drill_batch), rate)
        recent.append(letters)
        tell("drills", done, plan.drill_steps, loss)
        if sum(recent) / len(recent) >= plan.drill_goal:
            break
    for done in range(1, plan.steps + 1):
        share = 0.02 + 0.49 * (1 + math.cos(math.pi * done / plan.steps))
        rate = plan.rate * share * min(1.0, done / plan.warm_up)
        loss, _ = step(some(lessons, plan.batch) + some(drills, plan.rehearsed), rate)
        tell("training", done, plan.steps, loss)
    policy.model.eval()


def completion_loss(policy: Policy, chosen: Sequence[Lesson]) -> tuple[Tensor, float]:
    """Weighted mean next-token loss over the completions of a batch, a scalar; and the share of
    letters in the reasoning that are predicted right."""
    batch = collate([lesson.row for lesson in chosen], policy.pad_token_id)
    width = batch.input_ids.shape[1]
    longest = max(len(lesson.weights) for lesson in chosen)
    position_ids = torch.ones(3, len(chosen), width, dtype=torch.int64)
    weights = torch.zeros(len(chosen), longest)
    for index, lesson in enumerate(chosen):
        position_ids[:, index, width - lesson.position_ids.shape[1] :] = lesson.position_ids
        weights[index, longest - len(lesson.weights) :] = lesson.weights
    hidden = policy.model.model(
        inputs_embeds=embed(policy, batch).inputs_embeds,
        attention_mask=batch.attention_mask.to(policy.device),
        position_ids=position_ids.to(policy.device),
        use_cache=False,
    ).last_hidden_state
    logits = policy.model.lm_head(hidden[:, -longest - 1 : -1])
    targets = batch.input_ids[:, -longest:].to(policy.device)
    weights = weights.to(policy.device)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    letters = weights > 1
    right = (logits.detach().argmax(-1) == targets)[letters].float().mean()
    return (losses * weights).sum() / weights.sum(), float(right)
