"""A GRPO loop written by hand, with every part of its loss a choice, and nothing noted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omni_grpo_core import record
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.doctor.checks.run import in_order
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.load import as_cases, read_traces
from omni_grpo_core.losses import LossConfig
from omni_grpo_core.losses.advantages import group_advantages
from omni_grpo_core.losses.logprobs import completion_logprobs, predicting_logits
from omni_grpo_core.training.micro_batches import MicroBatch
from omni_grpo_core.training.step import SingleProcess, StepPlan, optimize

GROUP, LONGEST = 4, 16


@dataclass(frozen=True)
class Written:
    """How the loss is made. ``ends``: ids that end a completion, so many that lengths differ."""

    loss_type: str = "grpo"
    beta: float = 0.0
    entropy: float = 0.0
    updates: int = 1
    accumulation: int = 1
    divided: bool = True
    temperature: float = 1.0
    scored_at: float | None = None
    scale: str = "group"
    base: str = "group"
    sign: float = 1.0
    rolled: int = 0
    eos_counts: bool = True
    padding_counts: bool = False
    early: int = 0
    dtype: torch.dtype = torch.float32
    own_reference: bool = False
    kl_used: bool = True
    detached: bool = False
    rate: float = 1e-4


@dataclass
class _Micro:
    ids: Tensor
    attention: Tensor
    completion: Tensor
    start: int
    advantages: Tensor
    mask: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None


def letters(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


class WrittenLoop:
    def __init__(self, policy: Policy, how: Written) -> None:
        self.policy, self.how = policy, how
        self.model = copy.deepcopy(policy.model).eval().to(how.dtype)
        self.reference = self.model if how.own_reference else copy.deepcopy(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=how.rate)
        self.rewards: list[Callable[..., list[float]]] = [letters]
        self.ends = [
            *policy.eos_token_ids,
            *range(0, policy.model.config.text_config.vocab_size, 9),
        ]

    def run(self, folder: Path, steps: int = 2) -> tuple[Case, ...]:
        with record(
            folder,
            model=self.model,
            processor=self.policy.processor,
            reward_funcs=self.rewards,
            steps=steps * self.how.updates,
            probe_rewards=False,
        ):
            for step in range(steps):
                self.step(step)
        return in_order(as_cases(read_traces(folder)))

    def step(self, step: int) -> None:
        how = self.how
        micros = [self.rollout(5 * step + number + 1) for number in range(how.accumulation)]
        with torch.no_grad():
            for one in micros:
                one.old = self.scores(self.model, one)[0] if how.updates > 1 else None
                one.reference = self.scores(self.reference, one)[0] if how.beta else None
        for _ in range(how.updates):
            for one in micros:
                loss = self.loss(one, micros)
                loss = loss.detach().requires_grad_() if how.detached else loss
                torch.autograd.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def rollout(self, seed: int) -> _Micro:
        how = self.how
        torch.manual_seed(seed)
        texts = []
        for question in (f"What is {seed}?", f"Who is {seed}? Tell me."):
            message = {"role": "user", "content": [{"type": "text", "text": question}]}
            text = self.policy.processor.apply_chat_template(
                [message], add_generation_prompt=True, tokenize=False
            )
            texts += [text if isinstance(text, str) else text[0]] * GROUP
        batch = self.policy.processor(
            text=texts, padding=True, padding_side="left", return_tensors="pt"
        )
        ids = self.model.generate(
            **batch, do_sample=True, temperature=how.temperature, top_k=0, max_new_tokens=LONGEST,
            eos_token_id=self.ends, pad_token_id=self.policy.pad_token_id,
        )  # fmt: skip
        start = batch["input_ids"].shape[1]
        completion = ids[:, start:]
        ended = torch.isin(completion, torch.tensor(self.ends))
        mask = (ended.long().cumsum(1) - ended.long()) == 0
        tokenizer = self.policy.processor.tokenizer
        answers = tokenizer.batch_decode(
            [row[kept] for row, kept in zip(completion, mask & ~ended, strict=True)],
            skip_special_tokens=True,
        )
        rewards = torch.tensor(self.rewards[0](prompts=texts, completions=answers))
        attention = torch.cat([batch["attention_mask"], mask.long()], 1)
        mask = mask if how.eos_counts else mask & ~ended
        mask = torch.ones_like(mask) if how.padding_counts else mask
        return _Micro(ids, attention, completion, start, self.advantages(rewards), mask)

    def advantages(self, rewards: Tensor) -> Tensor:
        groups = rewards.view(-1, GROUP)
        base = groups.mean(1, keepdim=True) if self.how.base == "group" else rewards.mean()
        by = {"group": groups.std(1, keepdim=True) + 1e-4, "batch": rewards.std() + 1e-4}
        values = (groups - base) / by.get(self.how.scale, torch.tensor(1.0))
        return self.how.sign * values.flatten().roll(self.how.rolled)

    def scores(self, model: Any, one: _Micro) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=one.ids, attention_mask=one.attention).logits.float()
        logits = logits / (self.how.scored_at or self.how.temperature)
        first = one.start - 1 - self.how.early
        logits = logits[:, first : first + one.completion.shape[1]].log_softmax(-1)
        return logits.gather(-1, one.completion[..., None])[..., 0], logits

    def loss(self, one: _Micro, micros: list[_Micro]) -> Tensor:
        how, advantages = self.how, one.advantages[:, None]
        logprobs, every = self.scores(self.model, one)
        gap = logprobs - (logprobs.detach() if one.old is None else one.old)
        if how.loss_type == "gspo":
            gap = ((gap * one.mask).sum(1) / one.mask.sum(1))[:, None].expand_as(gap)
        ratio = gap.exp()
        if how.loss_type == "cispo":
            tokens = -ratio.clamp(max=1.2).detach() * advantages * logprobs
        else:
            bounded = ratio.clamp(0.8, 1.2)
            tokens = -torch.minimum(ratio * advantages, bounded * advantages)
        if one.reference is not None and how.kl_used:
            away = one.reference - logprobs
            tokens = tokens + how.beta * (away.exp() - away - 1)
        tokens = tokens + how.entropy * (every.exp() * every).sum(-1)
        tokens = tokens * one.mask
        parts = how.accumulation if how.divided else 1
        match how.loss_type:
            case "dapo" | "cispo":
                return tokens.sum() / sum(micro.mask.sum() for micro in micros)
            case "bnpo":
                return tokens.sum() / one.mask.sum() / parts
            case "dr_grpo":
                return tokens.sum() / (len(tokens) * LONGEST) / parts
        return (tokens.sum(1) / one.mask.sum(1)).mean() / parts


class _Logits(nn.Module):
    """A scorer as our own step has it, on logits that the model's own forward returns."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, one: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(input_ids=one.ids, attention_mask=one.attention).logits
        scored = completion_logprobs(
            predicting_logits(logits, ids.shape[1]), ids, mask, temperature=self.temperature
        )
        return scored.logprobs, scored.entropy


class OwnStepLoop(WrittenLoop):
    """The same rollouts, with the package's own training step: totals, log-probabilities, loss,
    clipping and updates are those of ``omni-grpo train``."""

    def advantages(self, rewards: Tensor) -> Tensor:
        groups = [place // GROUP for place in range(len(rewards))]
        return group_advantages(rewards.tolist(), groups, "group").values

    def step(self, step: int) -> None:
        how = self.how
        micros = [self.rollout(5 * step + number + 1) for number in range(how.accumulation)]
        plan = StepPlan(
            LossConfig(
                loss_type=how.loss_type,  # type: ignore[arg-type]
                beta=how.beta,
                max_completion_length=LONGEST if how.loss_type == "dr_grpo" else None,
            ),
            None,
            iterations=how.updates,
            max_grad_norm=1e9,
            gradient_checkpointing=False,
        )
        scorer, other = (_Logits(m, how.temperature) for m in (self.model, self.reference))

        def reference(micro: Any) -> Tensor:
            with torch.no_grad():
                logprobs, _ = other(micro.batch, micro.ids, micro.mask)
                return logprobs  # type: ignore[no-any-return]

        window = [
            MicroBatch(one, one.completion, one.mask, one.mask, one.advantages,  # type: ignore[arg-type]
                       torch.zeros(one.mask.shape))
            for one in micros
        ]  # fmt: skip
        optimize(
            plan, SingleProcess(), scorer, self.model, self.optimizer, window,
            reference=reference if how.beta else None,
        )  # fmt: skip
