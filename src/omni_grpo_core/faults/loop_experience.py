"""A correct GRPO loop of verl's and OpenRLHF's shape: a rollout becomes experiences, which an own
collator batches again for scoring.

Prompts are padded to a multiple, responses to the cap; an experience holds one row without padding
and with its own media. Experiences are balanced by length, so rows are scored in another order than
they were sampled in. The loss is the mean over all tokens of the step. It notes nothing.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from omni_grpo_core.core.dialect import switch_checkpointing
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.faults.config import ROWS, LoopConfig
from omni_grpo_core.faults.experience import IDS, MASK, Experience, by_row, collated
from omni_grpo_core.faults.fixtures import Clips, Drawn, rows_of
from omni_grpo_core.faults.scoring import Recall
from omni_grpo_core.faults.seams import Calls, Notebook, Rolled, StepOutcome, outcome_of
from omni_grpo_core.io.extras import extra
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.trace.calls import AdvantageSeen
from omni_grpo_core.types import Media

MULTIPLE = 16
"""Tokens of which the padded prompts' length is a multiple."""


class ExperienceLoop(Calls):
    """See the module."""

    def __init__(self, policy: Policy, config: LoopConfig) -> None:
        self.config = config
        self.policy = policy
        self.clips = Clips.shared()
        self.processor = copy.copy(policy.processor)
        self.model: Any = copy.deepcopy(policy.model)
        self.reference: Any = copy.deepcopy(policy.model).eval() if config.beta else None
        self.eos = [*policy.eos_token_ids]
        self.pad = policy.pad_token_id
        self.suppressed = torch.arange(len(policy.suppressed))[policy.suppressed].tolist()
        self.use_audio_in_video = config.audio == "interleaved"
        self.reward_funcs: list[Callable[..., list[float | None]]] = [
            Format(), Accuracy(), Recall(),
        ]  # fmt: skip
        self.reward_weights = [1.0, 1.0, 1.0]
        self.steps_done = 0
        self._media: list[Media] = []
        for name, parameter in self.model.named_parameters():
            tower = {"visual", "audio_tower"} & {*name.split(".")}
            parameter.requires_grad_(not (tower and config.freeze_towers))
        if config.lora:
            self.model = _with_adapters(self.model, config.seed)
        if config.checkpointing:
            switch_checkpointing(self.model, True)
        self.model.train()
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> torch.optim.Optimizer:
        learned = filter(lambda p: p.requires_grad, self.model.parameters())
        return torch.optim.AdamW(
            learned, lr=self.config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
        )

    @property
    def thinker(self) -> Any:
        return self.model.get_base_model() if self.config.lora else self.model

    # ----------------------------------------------------------------- rows to inputs

    def draw(self, micro: int) -> list[Drawn]:
        size = len(self.config.rows)
        order = list(self.config.rows)
        for numbers in ROWS[self.config.audio].values():
            order += [number for number in numbers if number not in order]
        batch = self.steps_done * self.config.accumulation + micro
        return [rows_of()[order[(batch * size + n) % len(order)]] for n in range(size)]

    def repeat(self, values: list[Any]) -> list[Any]:
        return [value for value in values for _ in range(self.config.group_size)]

    def processor_keywords(self, media: Sequence[Media]) -> dict[str, Any]:
        keywords: dict[str, Any] = {"do_resize": False, "padding": True, "return_tensors": "pt"}
        keywords.update(("fps", clip.sample_fps) for one in media for clip in one.videos)
        if self.use_audio_in_video and hasattr(self.processor, "load_audio_from_video"):
            owners, clips = list[int | None](), 0
            for one in media:
                for sound in one.audios:
                    of = sound.from_video
                    owners.append(None if of is None else clips + of)
                clips += len(one.videos)
            keywords |= {"load_audio_from_video": True, "audio_from_video_indices": owners}
        elif self.use_audio_in_video:
            keywords["use_audio_in_video"] = True
        return keywords

    def process(self, texts: list[str], media: list[Media]) -> dict[str, Tensor]:
        self._media = media
        given: dict[str, list[Any]] = defaultdict(list)
        for one in media:
            given["images"] += [image.pixels.permute(1, 2, 0).numpy() for image in one.images]
            given["videos"] += [clip.frames.permute(0, 2, 3, 1).numpy() for clip in one.videos]
            given["audio"] += [sound.samples.numpy() for sound in one.audios]
        held = {kind: values for kind, values in given.items() if values}
        made = self.call_processor(text=texts, **held, **self.processor_keywords(media))
        inputs = {name: torch.as_tensor(value) for name, value in made.items()}
        cast = {"pixel_values", "pixel_values_videos", "input_features"} & inputs.keys()
        return inputs | {name: inputs[name].to(self.model.dtype) for name in cast}

    def expand(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Padded on the left to a multiple; rows were repeated before."""
        more = -inputs[IDS].shape[1] % MULTIPLE
        ids, mask = pad(inputs[IDS], (more, 0), value=self.pad), pad(inputs[MASK], (more, 0))
        return {**inputs, IDS: ids, MASK: mask}

    # ----------------------------------------------------------------- completions

    def generation_keywords(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.config.max_new_tokens, "do_sample": True, "top_p": 1.0,
            "top_k": 0, "temperature": self.config.temperature, "eos_token_id": self.eos,
            "pad_token_id": self.pad, "suppress_tokens": self.suppressed,
            "use_audio_in_video": self.use_audio_in_video,
        }  # fmt: skip

    @torch.no_grad()
    def generate(self, inputs: dict[str, Tensor]) -> Tensor:
        self.model.eval()
        sequences = self.call_generate(inputs | self.generation_keywords())
        self.model.train()
        return sequences

    def call_generate(self, keywords: dict[str, Any]) -> Tensor:
        """With a configuration made from the keywords alone."""
        made = type(self.thinker.generation_config)
        known = made()
        config = {name: value for name, value in keywords.items() if hasattr(known, name)}
        rest = {name: value for name, value in keywords.items() if name not in config}
        sequences: Tensor = self.model.generate(
            **rest, generation_config=made(**config, return_dict_in_generate=True)
        ).sequences
        return sequences

    def cut(self, sequences: Tensor, prompt_length: int) -> tuple[Tensor, Tensor]:
        """Padded to the cap."""
        ids = sequences[:, prompt_length:]
        ended = sum((ids == eos for eos in self.eos), torch.zeros_like(ids))
        mask = (ended.cumsum(1) - ended) == 0
        more = (0, max(self.config.max_new_tokens - ids.shape[1], 0))
        return pad(ids, more, value=self.pad), pad(mask, more, value=False)

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        said = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        texts: list[str] = self.processor.tokenizer.batch_decode(
            [tokens[:-1] if tokens[-1:] and tokens[-1] in self.eos else tokens for tokens in said],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return texts

    # ----------------------------------------------------------------- rewards

    def columns(self, drawn: list[Drawn]) -> dict[str, list[Any]]:
        names = dict.fromkeys(name for one in drawn for name in one.row)
        return {name: [one.row.get(name) for one in drawn] for name in names}

    def score(self, prompts: list[str], texts: list[str], drawn: list[Drawn]) -> Tensor:
        columns = self.columns(drawn)
        paid = torch.empty(len(texts), 0)
        for function in self.reward_funcs:
            values = function(prompts=prompts, completions=texts, **columns)
            told = [float("nan") if value is None else float(value) for value in values]
            paid = torch.column_stack([paid, torch.tensor(told)])
        return paid

    def group_ids(self, drawn: list[Drawn]) -> list[str]:
        return [f"uid-{place // self.config.group_size}" for place, _ in enumerate(drawn)]

    def normalise(self, rewards: Tensor, groups: Sequence[str]) -> Tensor:
        scores: dict[str, list[float]] = defaultdict(list)
        for group, reward in zip(groups, rewards.tolist(), strict=True):
            scores[group].append(reward)
        mean = {group: fmean(held) for group, held in scores.items()}
        spread = {group: stdev(held) if len(held) > 1 else 1.0 for group, held in scores.items()}
        pairs = zip(groups, rewards.tolist(), strict=True)
        return torch.tensor([(r - mean[group]) / (spread[group] + 1e-6) for group, r in pairs])

    def advantages(
        self, rewards: Tensor, drawn: list[Drawn], ids: Tensor, mask: Tensor
    ) -> AdvantageSeen:
        uids = self.group_ids(drawn)
        paid = rewards.nan_to_num(0.0) @ torch.diag(torch.tensor(self.reward_weights))
        if not self.config.partial:
            total = paid.sum(1)
            return AdvantageSeen(total, tuple(uids), self.normalise(total, uids), "group", {}, {})
        total, spans = paid[:, :-1].sum(1), self.partial_spans(ids, mask)
        values = self.normalise(total, uids)[:, None].expand_as(mask).clone()
        values += self.normalise(paid[:, -1], uids)[:, None] * spans
        return AdvantageSeen(total, tuple(uids), values * mask, "group", {}, {"recall": spans})

    # ----------------------------------------------------------------- experiences

    def rollout(self, micro: int, notebook: Notebook | None) -> list[Rolled]:
        rows = self.draw(micro)
        drawn, conversations = self.repeat(rows), [self.conversation(row) for row in rows]
        prompts = self.repeat(self.render(conversations))
        media = self.repeat([self.load(messages) for messages in conversations])
        inputs = self.expand(self.process(prompts, media))
        sequences = self.generate(inputs)
        ids, mask = self.cut(sequences, inputs[IDS].shape[1])
        texts = self.decode(ids, mask)
        rewards = self.score(prompts, texts, drawn)
        values = self.advantages(rewards, drawn, ids, mask).advantages
        made = map(
            Experience, drawn, by_row(inputs, self._media), ids, mask, texts, rewards, values
        )  # fmt: skip
        batch = collated(sorted(made, key=len, reverse=True), self.pad)
        with torch.no_grad():
            self.model.eval()
            batch.old = self.logprobs(self.model, batch)
            if self.config.beta:
                batch.reference = self.reference_logprobs(batch)
            self.model.train()
        return [batch]

    # ----------------------------------------------------------------- loss

    def scoring_inputs(self, rolled: Rolled) -> dict[str, Any]:
        inputs: dict[str, Any] = {**rolled.inputs, "use_audio_in_video": self.use_audio_in_video}
        for name, more in ((IDS, rolled.ids), (MASK, rolled.mask)):
            inputs[name] = torch.hstack([inputs[name], more.to(inputs[name].dtype)])
        return inputs | {"use_cache": False}

    def completion_logits(self, logits: Tensor, length: int) -> Tensor:
        return logits.narrow(1, logits.shape[1] - length - 1, length)

    def log_softmax(self, logits: Tensor) -> Tensor:
        never = torch.zeros(logits.shape[-1], dtype=torch.bool)
        never[self.suppressed] = True
        scaled = logits.float().div(self.config.temperature).masked_fill(never, -torch.inf)
        return torch.log_softmax(scaled, dim=-1)

    def logprobs(self, model: Any, rolled: Rolled) -> Tensor:
        logits = self.forward(model, self.scoring_inputs(rolled)).logits
        table = self.log_softmax(self.completion_logits(logits, rolled.ids.shape[1]))
        return torch.take_along_dim(table, rolled.ids[..., None], dim=-1).squeeze(-1)

    def reference_logprobs(self, rolled: Rolled) -> Tensor:
        lora = self.config.lora
        with torch.no_grad(), self.model.disable_adapter() if lora else nullcontext():
            return self.logprobs(self.model if lora else self.reference, rolled)

    def token_loss(self, logprobs: Tensor, rolled: Rolled) -> tuple[Tensor, dict[str, float]]:
        old = logprobs.detach() if rolled.old is None else rolled.old
        ratio = torch.exp(logprobs - old)
        values = rolled.advantages.reshape(len(ratio), -1)
        near = ratio.clamp(1 - self.config.epsilon, 1 + self.config.epsilon)
        loss = torch.maximum(-values * ratio, -values * near)
        if rolled.reference is not None:
            loss = loss + self.config.beta * self.kl(logprobs, rolled.reference)
        return loss, {}

    def clipped(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        near = ratio.clamp(1 - self.config.epsilon, 1 + self.config.epsilon)
        return -advantages * near > -advantages * ratio

    def kl(self, logprobs: Tensor, reference: Tensor) -> Tensor:
        gap = (reference - logprobs).clamp(-20, 20)
        return (gap.exp() - gap - 1).clamp(max=10)

    def reduce(self, per_token: Tensor, mask: Tensor, rolled: Sequence[Rolled]) -> Tensor:
        if self.config.loss_type == "grpo":
            rows = sum(len(one.ids) for one in rolled)
            return sum(((v * m).sum() / m.sum().clamp(min=1) for v, m in zip(
                per_token, mask, strict=True)), torch.zeros(())) / rows  # fmt: skip
        tokens = sum(int(one.mask.sum()) for one in rolled)
        return per_token.masked_select(mask).sum() / tokens

    def settings(self) -> dict[str, Any]:
        return {"beta": self.config.beta, "gradient_accumulation_steps": self.config.accumulation}

    # ----------------------------------------------------------------- the step

    def learn(self, one: Rolled, rolled: Sequence[Rolled], notebook: Notebook | None) -> float:
        per_token, _ = self.token_loss(self.logprobs(self.model, one), one)
        loss = self.reduce(per_token, self.loss_mask(one), rolled)
        self.backward(loss)
        return loss.item()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, notebook: Notebook | None = None) -> StepOutcome:
        torch.manual_seed(self.config.seed + 1000 * self.steps_done)
        batches: list[Rolled] = []
        for micro in range(self.config.accumulation):
            batches.extend(self.rollout(micro, notebook))
        losses = []
        for _ in range(self.config.iterations):
            losses += [self.learn(batch, batches, notebook) for batch in batches]
            self.update()
        self.steps_done += 1
        return outcome_of(losses, batches)


def _with_adapters(model: Any, seed: int) -> Any:
    with extra("train"):
        from peft import LoraConfig, get_peft_model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        names = r".*(?<!audio_tower\.)layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)"
        return get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=names))
