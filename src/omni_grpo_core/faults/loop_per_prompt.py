"""A correct GRPO loop as a gist has it: one prompt at a time, and everything by hand.

The processor is called with a batch of one, its output tiled for the group; completions of all
prompts are padded together; a group is scored in chunks, and each group has its own backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_grpo_core.core.conversation import build_conversation
from omni_grpo_core.core.dialect import switch_checkpointing
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.faults.config import ROWS, LoopConfig
from omni_grpo_core.faults.fixtures import Clips, Drawn, rows_of
from omni_grpo_core.faults.scoring import Recall
from omni_grpo_core.faults.seams import Calls, Messages, Notebook, Rolled, StepOutcome, outcome_of
from omni_grpo_core.io.extras import extra
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.trace.calls import AdvantageSeen, LossSeen, SamplesSeen
from omni_grpo_core.types import Media

CHUNK = 2
"""Rows of one scoring forward."""


class PerPromptLoop(Calls):
    """See the module. Notes at most its rows, and the loss with its settings."""

    def __init__(self, policy: Policy, config: LoopConfig) -> None:
        self.config, self.policy, self.clips = config, policy, Clips.shared()
        self.processor = copy.copy(policy.processor)
        self.model: Any = copy.deepcopy(policy.model)
        self.reference: Any = None
        if config.beta and not config.lora:
            self.reference = copy.deepcopy(policy.model).eval().requires_grad_(False)
        self.eos, self.pad = list(policy.eos_token_ids), policy.pad_token_id
        self.suppressed: list[int] = policy.suppressed.nonzero().flatten().tolist()
        self.use_audio_in_video = config.audio == "interleaved"
        self.reward_funcs: list[Callable[..., list[float | None]]] = [
            Format(), Accuracy(), Recall(),
        ]  # fmt: skip
        self.reward_weights = [1.0, 1.0, 1.0]
        self.steps_done = 0
        if config.freeze_towers:
            for name, parameter in self.model.named_parameters():
                if "visual." in name or "audio_tower." in name:
                    parameter.requires_grad = False
        if config.lora:
            self.model = _adapted(self.model, config.seed)
        if config.checkpointing:
            switch_checkpointing(self.model, True)
        self.model.train()
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> torch.optim.Optimizer:
        learned = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.Adam(learned, lr=self.config.learning_rate)

    @property
    def thinker(self) -> Any:
        return self.model.base_model.model if self.config.lora else self.model

    # ----------------------------------------------------------------- rows to inputs

    def draw(self, micro: int) -> list[Drawn]:
        per_micro = len(self.config.rows)
        others = [n for numbers in ROWS[self.config.audio].values() for n in numbers]
        order = [*self.config.rows, *(n for n in others if n not in self.config.rows)]
        first = (self.steps_done * self.config.accumulation + micro) * per_micro
        return [rows_of()[order[n % len(order)]] for n in range(first, first + per_micro)]

    def conversation(self, drawn: Drawn) -> Messages:
        tracks = {path: self.has_track(path) for path in drawn.videos}
        built = build_conversation(drawn.sample, audio_in_video=self.config.audio, tracks=tracks)
        system, *rest = self.clips.messages(built)
        return [{"role": "system", "content": system["content"][0]["text"]}, *rest]

    def render(self, conversations: list[Messages]) -> list[str]:
        return [
            self.processor.apply_chat_template(one, tokenize=False, add_generation_prompt=True)
            for one in conversations
        ]

    def repeat(self, values: list[Any]) -> list[Any]:
        return [values[place // self.config.group_size]
                for place in range(len(values) * self.config.group_size)]  # fmt: skip

    def processor_keywords(self, media: Sequence[Media]) -> dict[str, Any]:
        keywords: dict[str, Any] = {"return_tensors": "pt", "padding": True, "do_resize": False}
        (one,) = media
        if one.videos:
            keywords["fps"] = one.videos[0].sample_fps
        if self.use_audio_in_video and not hasattr(self.processor, "load_audio_from_video"):
            keywords["use_audio_in_video"] = True
        elif self.use_audio_in_video:
            keywords["load_audio_from_video"] = True
            keywords["audio_from_video_indices"] = [audio.from_video for audio in one.audios]
        return keywords

    def process(self, texts: list[str], media: list[Media]) -> dict[str, Tensor]:
        given: dict[str, Any] = {"text": texts}
        (one,) = media
        if one.images:
            given["images"] = [image.pixels for image in one.images]
        if one.videos:
            given["videos"] = [video.frames for video in one.videos]
        if one.audios:
            given["audio"] = [audio.samples.numpy() for audio in one.audios]
        made = dict(self.call_processor(**given, **self.processor_keywords(media)))
        dtype = self.policy.model.dtype
        return {
            name: torch.as_tensor(value).to(dtype)
            if name.startswith(("pixel_", "input_features"))
            else torch.as_tensor(value)
            for name, value in made.items()
        }

    def expand(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Everything of the one prompt G times."""
        size = self.config.group_size
        return {k: v.repeat(size, *[1] * (v.dim() - 1)) for k, v in inputs.items()}

    # ----------------------------------------------------------------- completions

    def generation_keywords(self) -> dict[str, Any]:
        return {
            "do_sample": True, "temperature": self.config.temperature, "top_p": 1.0, "top_k": 0,
            "max_new_tokens": self.config.max_new_tokens, "eos_token_id": self.eos,
            "pad_token_id": self.pad, "suppress_tokens": self.suppressed,
            "use_audio_in_video": self.use_audio_in_video,
        }  # fmt: skip

    def generate(self, inputs: dict[str, Tensor]) -> Tensor:
        self.model.eval()
        try:
            with torch.no_grad():
                return self.call_generate({**inputs, **self.generation_keywords()})
        finally:
            self.model.train()

    def call_generate(self, keywords: dict[str, Any]) -> Tensor:
        made: Tensor = self.model.generate(**keywords)
        return made

    def cut(self, sequences: Tensor, prompt_length: int) -> tuple[Tensor, Tensor]:
        ids = sequences[:, prompt_length:]
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, tokens in enumerate(ids.tolist()):
            ends = [place for place, token in enumerate(tokens) if token in self.eos]
            mask[row, : ends[0] + 1 if ends else len(tokens)] = True
        return ids, mask

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        texts = []
        for tokens, kept in zip(ids.tolist(), mask.sum(1).tolist(), strict=True):
            own = [token for token in tokens[:kept] if token not in self.eos]
            texts.append(self.policy.decode(own))
        return texts

    # ----------------------------------------------------------------- rewards

    def columns(self, drawn: list[Drawn]) -> dict[str, list[Any]]:
        names = ("problem", "options", "problem_type", "solution")
        return {name: [one.row[name] for one in drawn] for name in names}

    def score(self, prompts: list[str], texts: list[str], drawn: list[Drawn]) -> Tensor:
        rewards = torch.full((len(texts), len(self.reward_funcs)), torch.nan)
        for column, function in enumerate(self.reward_funcs):
            values = function(prompts=prompts, completions=texts, **self.columns(drawn))
            for row, value in enumerate(values):
                if value is not None:
                    rewards[row, column] = value
        return rewards

    def group_ids(self, drawn: list[Drawn]) -> list[str]:
        return [str(place // self.config.group_size) for place in range(len(drawn))]

    def normalise(self, rewards: Tensor, groups: Sequence[str]) -> Tensor:
        made = torch.zeros_like(rewards)
        for place, group in enumerate(groups):
            peers = [float(rewards[n]) for n, other in enumerate(groups) if other == group]
            mean = sum(peers) / len(peers)
            squares = sum((value - mean) ** 2 for value in peers)
            deviation = (squares / max(len(peers) - 1, 1)) ** 0.5
            made[place] = (float(rewards[place]) - mean) / (deviation + 1e-4)
        return made

    def advantages(
        self, rewards: Tensor, drawn: list[Drawn], ids: Tensor, mask: Tensor
    ) -> AdvantageSeen:
        groups = self.group_ids(drawn)
        weighted = rewards.nan_to_num() * torch.tensor(self.reward_weights)
        parts = weighted[:, :-1] if self.config.partial else weighted
        total = parts.sum(1)
        values, spans = self.normalise(total, groups), {}
        if self.config.partial:
            spans["recall"] = self.partial_spans(ids, mask)
            extra_values = self.normalise(weighted[:, -1], groups)
            values = (values[:, None] + extra_values[:, None] * spans["recall"]) * mask
        return AdvantageSeen(total, tuple(groups), values, "group", {}, spans)

    # ----------------------------------------------------------------- loss

    def scoring_inputs(self, rolled: Rolled) -> dict[str, Any]:
        prompt = rolled.inputs
        attended = rolled.mask.to(prompt["attention_mask"].dtype)
        return {
            **prompt,
            "input_ids": torch.cat((prompt["input_ids"], rolled.ids), dim=1),
            "attention_mask": torch.cat((prompt["attention_mask"], attended), dim=1),
            "use_audio_in_video": self.use_audio_in_video,
        }

    def completion_logits(self, logits: Tensor, length: int) -> Tensor:
        return logits[:, :-1][:, -length:]

    def log_softmax(self, logits: Tensor) -> Tensor:
        scaled = logits.float() / self.config.temperature
        scaled[..., self.suppressed] = -torch.inf
        return F.log_softmax(scaled, dim=-1)

    def logprobs(self, model: Any, rolled: Rolled) -> Tensor:
        """Of a few rows at a time."""
        keywords = self.scoring_inputs(rolled)
        rows, made = len(rolled.ids), []
        for first in range(0, rows, CHUNK):
            last = min(first + CHUNK, rows)
            ids = rolled.ids[first:last]
            output = self.forward(model, _rows(keywords, first, last, rows))
            logits = self.completion_logits(output.logits, ids.shape[1])
            losses = F.nll_loss(
                self.log_softmax(logits).flatten(0, 1), ids.flatten(), reduction="none"
            )
            made.append(-losses.view(ids.shape))
        return torch.cat(made)

    def reference_logprobs(self, rolled: Rolled) -> Tensor:
        with torch.no_grad():
            if self.reference is not None:
                return self.logprobs(self.reference, rolled)
            with self.model.disable_adapter():
                return self.logprobs(self.model, rolled)

    def token_loss(self, logprobs: Tensor, rolled: Rolled) -> tuple[Tensor, dict[str, float]]:
        before = logprobs.detach() if rolled.old is None else rolled.old
        ratio = (logprobs - before).exp()
        advantages = rolled.advantages.view(len(ratio), -1)
        bounded = ratio.clamp(1 - self.config.epsilon, 1 + self.config.epsilon)
        loss = -torch.min(ratio * advantages, bounded * advantages)
        clipped = self.clipped(ratio.detach(), advantages)
        metrics = {"clip_ratio": float(clipped[rolled.mask].float().mean())}
        if rolled.reference is not None:
            loss = loss + self.config.beta * self.kl(logprobs, rolled.reference)
        return loss, metrics

    def clipped(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        wide = 1 + self.config.epsilon < ratio
        narrow = ratio < 1 - self.config.epsilon
        return torch.where(advantages > 0, wide, narrow & (advantages < 0))

    def kl(self, logprobs: Tensor, reference: Tensor) -> Tensor:
        return (reference - logprobs).exp() - 1 - (reference - logprobs)

    def reduce(self, per_token: Tensor, mask: Tensor, rolled: Sequence[Rolled]) -> Tensor:
        if self.config.loss_type == "dapo":
            return (per_token * mask).sum() / sum(int(one.mask.sum()) for one in rolled)
        means = [values[kept].mean() for values, kept in zip(per_token, mask, strict=True)]
        return torch.stack(means).mean() / len(rolled)

    def settings(self) -> dict[str, Any]:
        c = self.config
        return {
            "beta": c.beta, "epsilon": c.epsilon, "temperature": c.temperature,
            "num_generations": c.group_size, "loss_type": c.loss_type,
            "num_iterations": c.iterations,
            "gradient_accumulation_steps": c.accumulation * len(c.rows),
        }  # fmt: skip

    # ----------------------------------------------------------------- the step

    def rollout(self, micro: int, notebook: Notebook | None) -> list[Rolled]:
        """One entry a prompt."""
        rows = self.draw(micro)
        if notebook is not None:
            names = tuple(str(row.row["sample_id"]) for row in rows)
            notebook.note(SamplesSeen(tuple(row.row for row in rows), names))
        conversations = [self.conversation(row) for row in rows]
        prompts = self.render(conversations)
        asked: list[dict[str, Tensor]] = []
        answered: list[tuple[Tensor, Tensor]] = []
        for prompt, messages in zip(prompts, conversations, strict=True):
            inputs = self.expand(self.process([prompt], [self.load(messages)]))
            sequences = self.generate(inputs)
            asked.append(inputs)
            answered.append(self.cut(sequences, inputs["input_ids"].shape[1]))
        longest = max(ids.shape[1] for ids, _ in answered)
        ids = torch.cat([_padded(ids, longest, self.pad) for ids, _ in answered])
        mask = torch.cat([_padded(mask, longest, 0) for _, mask in answered])
        texts, drawn = self.decode(ids, mask), self.repeat(rows)
        rewards = self.score(self.repeat(prompts), texts, drawn)
        seen = self.advantages(rewards, drawn, ids, mask)
        if notebook is not None:
            notebook.note(seen)
        values = seen.advantages
        groups, start = [], 0
        for inputs, (own, _) in zip(asked, answered, strict=True):
            part = slice(start, start + len(own))
            groups.append(
                Rolled(drawn[part], inputs, ids[part], mask[part], texts[part], rewards[part],
                       values[part])
            )  # fmt: skip
            start = part.stop
        return groups

    def learn(self, one: Rolled, rolled: Sequence[Rolled], notebook: Notebook | None) -> float:
        logprobs = self.logprobs(self.model, one)
        per_token, metrics = self.token_loss(logprobs, one)
        mask = self.loss_mask(one)
        loss = self.reduce(per_token, mask, rolled)
        if notebook is not None:
            notebook.note(
                LossSeen(
                    one.ids, mask, logprobs.detach(), one.old, one.reference, one.advantages,
                    float(loss.detach()), loss.requires_grad, self.settings(), metrics,
                )
            )  # fmt: skip
        self.backward(loss)
        return float(loss.detach())

    def update(self) -> None:
        """With the gradient's norm clipped to 1."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, notebook: Notebook | None = None) -> StepOutcome:
        torch.manual_seed(self.config.seed + 1000 * self.steps_done)
        rolled: list[Rolled] = []
        for micro in range(self.config.accumulation):
            rolled += self.rollout(micro, notebook)
        if self.config.iterations > 1:
            for one in rolled:
                with torch.no_grad():
                    one.old = self.logprobs(self.model, one)
        losses = []
        for again in range(self.config.iterations):
            for one in rolled:
                if self.config.beta and not again:
                    one.reference = self.reference_logprobs(one)
                losses.append(self.learn(one, rolled, notebook))
            self.update()
        self.steps_done += 1
        return outcome_of(losses, rolled)


def _adapted(model: Any, seed: int) -> Any:
    with extra("train"):
        from peft import LoraConfig, get_peft_model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        names = r"model\.(language_model\.)?layers\.\d+\.mlp\.(up|down)_proj"
        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names))


def _padded(values: Tensor, length: int, value: int) -> Tensor:
    return F.pad(values, (0, length - values.shape[1]), value=value)


def _rows(keywords: Mapping[str, Any], first: int, last: int, rows: int) -> dict[str, Any]:
    """Rows ``first`` to ``last`` of ``rows``; every row has as many patches, clips and sounds."""
    return {
        name: value[first * len(value) // rows : last * len(value) // rows]
        if isinstance(value, Tensor)
        else value
        for name, value in keywords.items()
    }
