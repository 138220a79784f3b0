"""A correct GRPO step as people write it, on plain transformers calls.

One audio-in-video flag for the whole batch, every prompt repeated G times before the processor,
``model.generate``, one scoring forward over prompt and completion, rewards with TRL's signature.
Everything that people get wrong is a small method, which a fault replaces.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.dialect import switch_checkpointing
from omni_grpo_core.core.family import published_name
from omni_grpo_core.core.policy import Policy, generating
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.faults.config import LoopConfig
from omni_grpo_core.faults.feeding import Feeding
from omni_grpo_core.faults.fixtures import Clips
from omni_grpo_core.faults.scoring import Recall, Scoring
from omni_grpo_core.faults.seams import Notebook, Rolled, StepOutcome, outcome_of
from omni_grpo_core.io.extras import extra
from omni_grpo_core.recorder.hooks import patched
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.trace.calls import LossSeen, SamplesSeen


class ReferenceLoop(Feeding, Scoring):
    """A typical trainer on a copy of ``policy``'s weights.

    A recorder attaches to its ``model`` (possibly wrapped by PEFT), ``processor``, ``optimizer``
    and ``reward_funcs``. Raises ``ConfigError`` for a policy in another dtype than ``config``'s:
    casting a loaded model would also round its rotary frequencies.
    """

    def __init__(self, policy: Policy, config: LoopConfig) -> None:
        held = str(policy.model.dtype).removeprefix("torch.")
        if held != config.dtype:
            raise ConfigError(
                "loop", got=f"a policy in {held}", want=config.dtype, fix="load it in that dtype"
            )
        self.config = config
        self.policy = policy
        self.clips = Clips.shared()
        self.processor = copy.copy(policy.processor)
        self.model: Any = copy.deepcopy(policy.model)
        self.reference: Any = copy.deepcopy(policy.model).eval() if config.beta else None
        self.eos = list(policy.eos_token_ids)
        self.pad = policy.pad_token_id
        self.suppressed = [int(i) for i in policy.suppressed.nonzero()[:, 0]]
        self.use_audio_in_video = config.audio == "interleaved"
        self.reward_funcs: list[Callable[..., list[float | None]]] = [
            Format(), Accuracy(), Recall(),
        ]  # fmt: skip
        self.reward_weights = [1.0, 1.0, 1.0]
        self.steps_done = 0
        self._prepare()
        self.optimizer = self.make_optimizer()

    # ----------------------------------------------------------------- set-up

    def _prepare(self) -> None:
        config = self.config
        for name, parameter in self.model.named_parameters():
            frozen = config.freeze_towers and published_name(name).startswith(
                ("visual.", "audio_tower.")
            )
            parameter.requires_grad_(not frozen)
        if config.lora:
            with extra("train"):
                from peft import LoraConfig, get_peft_model

            names = r"model\.(language_model\.)?layers\.\d+\.self_attn\.[qv]_proj"
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                self.model = get_peft_model(self.model, LoraConfig(r=4, target_modules=names))
        if config.checkpointing:
            switch_checkpointing(self.model, True)
        self.model.train()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """An optimizer over all trainable parameters."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.config.learning_rate, weight_decay=0.0)

    @property
    def thinker(self) -> Any:
        """The model inside its wrappers."""
        return self.model.get_base_model() if self.config.lora else self.model

    def replaced(self, **methods: Callable[..., Any]) -> AbstractContextManager[None]:
        """For a fault: replaces methods of this loop, restored on exit even after an error."""
        return patched(self, **methods)

    # ----------------------------------------------------------------- generation

    def generation_keywords(self) -> dict[str, Any]:
        """The sampling keywords."""
        return {
            "do_sample": True,
            "temperature": self.config.temperature,
            "top_k": 0,
            "top_p": 1.0,
            "use_cache": True,
            "max_new_tokens": self.config.max_new_tokens,
            "eos_token_id": self.eos,
            "pad_token_id": self.pad,
            "suppress_tokens": self.suppressed,
            "use_audio_in_video": self.use_audio_in_video,
        }

    @torch.no_grad()
    def generate(self, inputs: dict[str, Tensor]) -> Tensor:
        """Prompts and completions, (N, L + C): in eval mode, with the cache, checkpointing off."""
        with generating(self.model):
            return self.call_generate({**inputs, **self.generation_keywords()})

    def call_generate(self, keywords: dict[str, Any]) -> Tensor:
        """The one call of ``generate``."""
        sequences: Tensor = self.model.generate(**keywords)
        return sequences

    def cut(self, sequences: Tensor, prompt_length: int) -> tuple[Tensor, Tensor]:
        """Completion ids and the mask of the tokens up to and including the first eos."""
        ids = sequences[:, prompt_length:]
        ended = torch.isin(ids, torch.tensor(self.eos)).long().cumsum(1)
        before = torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], dim=1)
        return ids, before == 0

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        """Completions as text: special tokens kept, the final eos removed."""
        texts = []
        for row, kept in zip(ids, mask, strict=True):
            tokens = row[kept].tolist()
            tokens = tokens[:-1] if tokens and tokens[-1] in self.eos else tokens
            texts.append(self.policy.decode(tokens))
        return texts

    # ----------------------------------------------------------------- scoring, loss

    def scoring_inputs(self, rolled: Rolled) -> dict[str, Any]:
        """Prompt and completion as inputs of one forward."""
        inputs: dict[str, Any] = dict(rolled.inputs)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], rolled.ids], dim=1)
        mask = rolled.mask.to(inputs["attention_mask"].dtype)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask], dim=1)
        return {**inputs, "use_audio_in_video": self.use_audio_in_video, "use_cache": False}

    def completion_logits(self, logits: Tensor, length: int) -> Tensor:
        """(N, C, V): those that predict each completion token."""
        return logits[:, -length - 1 : -1]

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Of the sampled distribution, in float32: same temperature and suppressed ids."""
        scores = logits.float() / self.config.temperature
        return scores.index_fill(-1, torch.tensor(self.suppressed), -torch.inf).log_softmax(-1)

    def logprobs(self, model: Any, rolled: Rolled) -> Tensor:
        """(N, C): logprobs of the completion's tokens, 0 where masked out."""
        output = self.forward(model, self.scoring_inputs(rolled))
        logits = self.completion_logits(output.logits, rolled.ids.shape[1])
        chosen = self.log_softmax(logits).gather(-1, rolled.ids[:, :, None])[:, :, 0]
        return torch.where(rolled.mask, chosen, 0.0)

    def forward(self, model: Any, keywords: dict[str, Any]) -> Any:
        """The one call of the scoring forward."""
        return model(**keywords)

    def token_loss(self, logprobs: Tensor, rolled: Rolled) -> tuple[Tensor, dict[str, float]]:
        """Loss per token, (N, C), and the metrics logged with it."""
        old = logprobs.detach() if rolled.old is None else rolled.old
        ratio = torch.exp(logprobs - old)
        advantages = rolled.advantages
        if advantages.dim() == 1:
            advantages = advantages[:, None]
        low, high = 1 - self.config.epsilon, 1 + self.config.epsilon
        loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        clipped = self.clipped(ratio, advantages).float()
        metrics = {"clip_ratio": _masked_mean(clipped, rolled.mask)}
        if rolled.reference is not None:
            kl = self.kl(logprobs, rolled.reference)
            loss = loss + self.config.beta * kl
            metrics["kl"] = _masked_mean(kl.detach(), rolled.mask)
        return loss, metrics

    def clipped(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """bool, (N, C): tokens whose gradient is removed by clipping."""
        low, high = 1 - self.config.epsilon, 1 + self.config.epsilon
        return ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))

    def kl(self, logprobs: Tensor, reference: Tensor) -> Tensor:
        """(N, C): the k3 estimate of KL(policy || reference)."""
        gap = reference - logprobs
        return torch.exp(gap) - gap - 1

    def reduce(self, per_token: Tensor, mask: Tensor, rolled: Sequence[Rolled]) -> Tensor:
        """This micro-batch's share of the step's loss; ``rolled``: all of the step."""
        kept = per_token * mask
        if self.config.loss_type == "dapo":
            return kept.sum() / sum(int(one.mask.sum()) for one in rolled)
        return (kept.sum(1) / mask.sum(1).clamp(min=1)).sum() / sum(len(one.ids) for one in rolled)

    def settings(self) -> dict[str, Any]:
        """The run's settings as it logs them."""
        c = self.config
        return {
            "loss_type": c.loss_type, "beta": c.beta, "epsilon": c.epsilon,
            "temperature": c.temperature, "num_generations": c.group_size,
            "gradient_accumulation_steps": c.accumulation, "num_iterations": c.iterations,
            "max_completion_length": c.max_new_tokens, "scale_rewards": "group",
            "per_device_train_batch_size": len(c.rows) * c.group_size,
        }  # fmt: skip

    # ----------------------------------------------------------------- the step

    def rollout(self, micro: int, notebook: Notebook | None) -> list[Rolled]:
        """From rows to advantages."""
        rows = self.draw(micro)
        if notebook is not None:
            notebook.note(SamplesSeen(tuple(row.row for row in rows), tuple(self.group_ids(rows))))
        conversations = [self.conversation(row) for row in rows]
        prompts = self.repeat(self.render(conversations))
        media = self.repeat([self.load(messages) for messages in conversations])
        drawn = self.repeat(rows)
        inputs = self.expand(self.process(prompts, media))
        sequences = self.generate(inputs)
        ids, mask = self.cut(sequences, inputs["input_ids"].shape[1])
        texts = self.decode(ids, mask)
        rewards = self.score(prompts, texts, drawn)
        seen = self.advantages(rewards, drawn, ids, mask)
        if notebook is not None:
            notebook.note(seen)
        return [Rolled(drawn, inputs, ids, mask, texts, rewards, seen.advantages)]

    def step(self, notebook: Notebook | None = None) -> StepOutcome:
        """One rollout and ``iterations`` optimizer steps on it."""
        torch.manual_seed(self.config.seed + 1000 * self.steps_done)
        rolled = [
            one
            for micro in range(self.config.accumulation)
            for one in self.rollout(micro, notebook)
        ]
        with torch.no_grad():
            for one in rolled:
                if self.config.iterations > 1:
                    one.old = self.logprobs(self.model, one)
                if self.config.beta:
                    one.reference = self.reference_logprobs(one)
        losses = []
        for _ in range(self.config.iterations):
            losses += [self.learn(one, rolled, notebook) for one in rolled]
            self.update()
        self.steps_done += 1
        return outcome_of(losses, rolled)

    def reference_logprobs(self, rolled: Rolled) -> Tensor:
        """Logprobs under the initial policy: a copy, or the model with its adapters off."""
        if not self.config.lora:
            return self.logprobs(self.reference, rolled)
        with self.model.disable_adapter():
            return self.logprobs(self.model, rolled)

    def learn(self, one: Rolled, rolled: Sequence[Rolled], notebook: Notebook | None) -> float:
        """Forward, loss and backward of one micro-batch."""
        logprobs = self.logprobs(self.model, one)
        per_token, metrics = self.token_loss(logprobs, one)
        mask = self.loss_mask(one)
        loss = self.reduce(per_token, mask, rolled)
        value = float(loss.detach())
        if notebook is not None:
            notebook.note(
                LossSeen(
                    completion_ids=one.ids,
                    mask=mask,
                    logprobs=logprobs.detach(),
                    old_logprobs=one.old,
                    ref_logprobs=one.reference,
                    advantages=one.advantages,
                    loss=value,
                    requires_grad=loss.requires_grad,
                    settings=self.settings(),
                    metrics={**metrics, "loss": value},
                )
            )
        self.backward(loss)
        return value

    def loss_mask(self, rolled: Rolled) -> Tensor:
        """bool, (N, C): tokens included in the loss."""
        return rolled.mask

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch."""
        loss.backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def answers(self) -> list[str]:
        """Greedy completions of the rows, one each: the policy's actual answers."""
        whole = self.config
        self.config = replace(whole, group_size=1)
        try:
            rows = self.draw(0)
            conversations = [self.conversation(row) for row in rows]
            media = [self.load(messages) for messages in conversations]
            inputs = self.process(self.repeat(self.render(conversations)), self.repeat(media))
            with generating(self.model), torch.no_grad():
                keywords = {**inputs, **self.generation_keywords(), "do_sample": False}
                for key in ("temperature", "top_k", "top_p"):
                    keywords.pop(key)
                sequences = self.call_generate(keywords)
            return self.decode(*self.cut(sequences, inputs["input_ids"].shape[1]))
        finally:
            self.config = whole


def _masked_mean(values: Tensor, mask: Tensor) -> float:
    return float((values * mask).sum() / mask.sum().clamp(min=1))
