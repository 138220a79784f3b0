"""A correct GRPO loop of TRL's shape: roll out a whole generation batch, then train on a buffer.

Rows are repeated first, all of them batched and generated together; logprobs before the update come
from a pass of their own; then rows are shuffled and cut into micro-batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain, islice, pairwise
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.dialect import switch_checkpointing
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.faults.config import ROWS, LoopConfig
from omni_grpo_core.faults.fixtures import Clips, Drawn, rows_of
from omni_grpo_core.faults.scoring import Recall
from omni_grpo_core.faults.seams import Calls, Notebook, Rolled, StepOutcome, outcome_of
from omni_grpo_core.io.extras import extra
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.trace.calls import AdvantageSeen, LossSeen, SamplesSeen
from omni_grpo_core.types import Media

PATCHES = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
OF = {"image_grid_thw": "images", "video_grid_thw": "videos", "video_second_per_grid": "videos",
      "input_features": "audios", "feature_attention_mask": "audios"}  # fmt: skip
"""Which media of a conversation each output of the processor has a row for."""


class BufferedLoop(Calls):
    """See the module. Notes what ``attach`` notes of TRL's trainer."""

    def __init__(self, policy: Policy, config: LoopConfig) -> None:
        self.config = config
        self.policy = policy
        self.clips = Clips.shared()
        self.processor = copy.copy(policy.processor)
        self.model: Any = copy.deepcopy(policy.model)
        self.reference: Any = copy.deepcopy(policy.model).eval() if config.beta else None
        self.eos = list(policy.eos_token_ids)
        self.pad = policy.pad_token_id
        self.suppressed = [i for i, never in enumerate(policy.suppressed.tolist()) if never]
        self.use_audio_in_video = config.audio == "interleaved"
        self.reward_funcs: list[Callable[..., list[float | None]]] = [
            Format(), Accuracy(), Recall(),
        ]  # fmt: skip
        self.reward_weights = [1.0, 1.0, 1.0]
        self.steps_done = 0
        self._media: list[Media] = []
        self.model.requires_grad_(True)
        if config.freeze_towers:
            towers = [m for n, m in self.model.named_modules() if n.endswith(("visual", "tower"))]
            for tower in towers:
                tower.requires_grad_(False)
        if config.lora:
            with extra("train"):
                from peft import LoraConfig, get_peft_model

            names = r".*(?<!audio_tower\.)layers\.\d+\.self_attn\.(k|v|o)_proj"
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                self.model = get_peft_model(self.model, LoraConfig(r=2, target_modules=names))
        if config.checkpointing:
            switch_checkpointing(self.model, True)
        self.model.train()
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Two groups, as the trainers of transformers make them: biases and norms don't decay."""
        learned = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in learned if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0},
        ]
        held = [group for group in groups if group["params"]]
        return torch.optim.AdamW(held, lr=self.config.learning_rate)

    @property
    def thinker(self) -> Any:
        return self.model.get_base_model() if self.config.lora else self.model

    # ----------------------------------------------------------------- rows to inputs

    def draw(self, micro: int) -> list[Drawn]:
        wanted = self.config.rows
        fitting = chain(wanted, chain.from_iterable(ROWS[self.config.audio].values()))
        data = [rows_of()[number] for number in dict.fromkeys(fitting)]
        place = (self.steps_done * self.config.accumulation + micro) * len(wanted) % len(data)
        return (data * 2)[place : place + len(wanted)]

    def repeat(self, values: list[Any]) -> list[Any]:
        return list(chain.from_iterable([value] * self.config.group_size for value in values))

    def processor_keywords(self, media: Sequence[Media]) -> dict[str, Any]:
        keywords: dict[str, Any] = {"padding": True, "return_tensors": "pt", "do_resize": False}
        clips = [clip for one in media for clip in one.videos]
        if clips:
            keywords["fps"] = clips[0].sample_fps
        if self.use_audio_in_video:
            if not hasattr(self.processor, "load_audio_from_video"):
                return {**keywords, "use_audio_in_video": True}
            starts = accumulate((len(one.videos) for one in media), initial=0)
            keywords["load_audio_from_video"] = True
            keywords["audio_from_video_indices"] = [
                None if sound.from_video is None else start + sound.from_video
                for start, one in zip(starts, media, strict=False)
                for sound in one.audios
            ]
        return keywords

    def process(self, texts: list[str], media: list[Media]) -> dict[str, Tensor]:
        self._media = media
        images = [image.pixels.numpy() for one in media for image in one.images]
        videos = [video.frames for one in media for video in one.videos]
        audio = [sound.samples.numpy() for one in media for sound in one.audios]
        made = self.call_processor(
            text=texts,
            images=images or None,
            videos=videos or None,
            audio=audio or None,
            **self.processor_keywords(media),
        )
        inputs = {name: torch.as_tensor(value) for name, value in made.items()}
        for name in {*PATCHES, "input_features"} & set(inputs):
            inputs[name] = inputs[name].to(self.model.dtype)
        return inputs

    def expand(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """As they are: rows were repeated at the start."""
        return inputs

    # ----------------------------------------------------------------- completions

    def generation_keywords(self) -> dict[str, Any]:
        return {
            "do_sample": True, "temperature": self.config.temperature, "top_k": 0, "top_p": 1.0,
            "max_new_tokens": self.config.max_new_tokens, "eos_token_id": self.eos,
            "pad_token_id": self.pad, "suppress_tokens": self.suppressed,
            "use_audio_in_video": self.use_audio_in_video,
        }  # fmt: skip

    @torch.no_grad()
    def generate(self, inputs: dict[str, Tensor]) -> Tensor:
        self.model.eval()
        try:
            return self.call_generate({**inputs, **self.generation_keywords()})
        finally:
            self.model.train()

    def call_generate(self, keywords: dict[str, Any]) -> Tensor:
        """With the sampling keywords in a configuration object."""
        config = copy.deepcopy(self.thinker.generation_config)
        rest = config.update(**keywords)
        made: Tensor = self.model.generate(**rest, generation_config=config)
        return made

    def cut(self, sequences: Tensor, prompt_length: int) -> tuple[Tensor, Tensor]:
        ids = sequences[:, prompt_length:]
        is_end = torch.isin(ids, torch.tensor(self.eos))
        last = torch.full((len(ids),), ids.shape[1])
        last[is_end.any(1)] = is_end.int().argmax(1)[is_end.any(1)]
        return ids, torch.arange(ids.shape[1]).expand_as(ids) <= last[:, None]

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        texts: list[str] = self.processor.batch_decode(
            ids.masked_fill(~mask, self.pad),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return texts

    # ----------------------------------------------------------------- rewards

    def columns(self, drawn: list[Drawn]) -> dict[str, list[Any]]:
        shared = set.intersection(*(set(one.row) for one in drawn))
        return {name: [one.row[name] for one in drawn] for name in sorted(shared)}

    def score(self, prompts: list[str], texts: list[str], drawn: list[Drawn]) -> Tensor:
        columns = self.columns(drawn)
        paid = [f(prompts=prompts, completions=texts, **columns) for f in self.reward_funcs]
        table = [[torch.nan if value is None else value for value in values] for values in paid]
        return torch.tensor(table, dtype=torch.float32).T

    def group_ids(self, drawn: list[Drawn]) -> list[str]:
        return [str(place // self.config.group_size) for place in range(len(drawn))]

    def normalise(self, rewards: Tensor, groups: Sequence[str]) -> Tensor:
        places = {name: place for place, name in enumerate(dict.fromkeys(groups))}
        one_hot = torch.zeros(len(rewards), len(places))
        one_hot[range(len(rewards)), [places[group] for group in groups]] = 1.0
        sizes = one_hot.sum(0)
        centred = rewards - one_hot @ ((rewards @ one_hot) / sizes)
        squares = (centred**2) @ one_hot
        return centred / (one_hot @ (squares / (sizes - 1).clamp(min=1)).sqrt() + 1e-4)

    def advantages(
        self, rewards: Tensor, drawn: list[Drawn], ids: Tensor, mask: Tensor
    ) -> AdvantageSeen:
        groups = self.group_ids(drawn)
        weights = torch.tensor(self.reward_weights)
        names = [getattr(f, "__name__", "reward") for f in self.reward_funcs]
        spans: dict[str, Tensor] = {}
        total = (rewards * weights).nansum(1)
        if self.config.partial:
            total = (rewards * weights)[:, :-1].nansum(1)
            spans["recall"] = self.partial_spans(ids, mask)
        values = self.normalise(total, groups)
        if spans:
            own = self.normalise((rewards * weights)[:, -1].nan_to_num(), groups)
            values = torch.where(spans["recall"], (values + own)[:, None], values[:, None]) * mask
        return AdvantageSeen(
            total, tuple(groups), values, "group",
            dict(zip(names, self.reward_weights, strict=True)), spans,
        )  # fmt: skip

    # ----------------------------------------------------------------- loss

    def scoring_inputs(self, rolled: Rolled) -> dict[str, Any]:
        names = ("input_ids", "attention_mask")
        ids, mask = (rolled.inputs[name] for name in names)
        media = {name: value for name, value in rolled.inputs.items() if name not in names}
        return {
            "input_ids": torch.cat([ids, rolled.ids], dim=1),
            "attention_mask": torch.cat([mask, rolled.mask.to(mask.dtype)], dim=1),
            **media,
            "use_audio_in_video": self.use_audio_in_video,
            "use_cache": False,
        }

    def completion_logits(self, logits: Tensor, length: int) -> Tensor:
        return logits[:, :-1, :][:, -length:, :]

    def log_softmax(self, logits: Tensor) -> Tensor:
        blocked = torch.zeros(logits.shape[-1])
        blocked[self.suppressed] = -torch.inf
        scores = logits.float() / self.config.temperature + blocked
        return scores - scores.logsumexp(-1, keepdim=True)

    def logprobs(self, model: Any, rolled: Rolled) -> Tensor:
        logits = self.forward(model, self.scoring_inputs(rolled)).logits
        scores = self.log_softmax(self.completion_logits(logits, rolled.ids.shape[1]))
        return scores.gather(2, rolled.ids.unsqueeze(2)).squeeze(2)

    def reference_logprobs(self, rolled: Rolled) -> Tensor:
        if self.config.lora:
            with self.model.disable_adapter():
                return self.logprobs(self.model, rolled)
        return self.logprobs(self.reference, rolled)

    def token_loss(self, logprobs: Tensor, rolled: Rolled) -> tuple[Tensor, dict[str, float]]:
        old = logprobs.detach() if rolled.old is None else rolled.old
        advantages = rolled.advantages
        if advantages.dim() == 1:
            advantages = advantages.unsqueeze(1)
        ratio = torch.exp(logprobs - old)
        near = torch.clamp(ratio, 1 - self.config.epsilon, 1 + self.config.epsilon)
        loss = -torch.min(ratio * advantages, near * advantages)
        counted = rolled.mask.float()
        clipped = self.clipped(ratio.detach(), advantages).float()
        metrics = {"clip_ratio": float((clipped * counted).sum() / counted.sum())}
        if rolled.reference is not None:
            kl = self.kl(logprobs, rolled.reference)
            loss = loss + self.config.beta * kl
            metrics["kl"] = float((kl.detach() * counted).sum() / counted.sum())
        return loss, metrics

    def clipped(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        low = (ratio < 1 - self.config.epsilon) & (advantages < 0)
        high = (ratio > 1 + self.config.epsilon) & (advantages > 0)
        return low | high

    def kl(self, logprobs: Tensor, reference: Tensor) -> Tensor:
        return torch.exp(reference - logprobs) - (reference - logprobs) - 1

    def reduce(self, per_token: Tensor, mask: Tensor, rolled: Sequence[Rolled]) -> Tensor:
        if self.config.loss_type == "dapo":
            return (per_token * mask).sum() / sum(one.mask.sum() for one in rolled)
        means = (per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
        return means.mean() / len(rolled)

    def settings(self) -> dict[str, Any]:
        c = self.config
        return {
            "beta": c.beta, "epsilon": c.epsilon, "temperature": c.temperature,
            "num_generations": c.group_size, "loss_type": c.loss_type, "scale_rewards": "group",
            "num_iterations": c.iterations, "gradient_accumulation_steps": c.accumulation,
            "max_completion_length": c.max_new_tokens,
            "per_device_train_batch_size": len(c.rows) * c.group_size,
        }  # fmt: skip

    # ----------------------------------------------------------------- the step

    def rollout(self, micro: int, notebook: Notebook | None) -> list[Rolled]:
        """The whole step's generation batch, as shuffled micro-batches."""
        rows = [row for part in range(self.config.accumulation) for row in self.draw(part)]
        if notebook is not None:
            # by position, as attach finds them
            groups = tuple(str(place) for place in range(len(rows)))
            notebook.note(SamplesSeen(tuple(row.row for row in rows), groups))
        drawn = self.repeat(rows)
        conversations = self.repeat([self.conversation(row) for row in rows])
        prompts = self.render(conversations)
        inputs = self.expand(self.process(prompts, [self.load(one) for one in conversations]))
        sequences = self.generate(inputs)
        ids, mask = self.cut(sequences, inputs["input_ids"].shape[1])
        texts = self.decode(ids, mask)
        rewards = self.score(prompts, texts, drawn)
        seen = self.advantages(rewards, drawn, ids, mask)
        if notebook is not None:
            notebook.note(seen)
        whole = Rolled(drawn, inputs, ids, mask, texts, rewards, seen.advantages)
        with torch.no_grad():
            whole.old = self.logprobs(self.model, whole)
            if self.config.beta:
                whole.reference = self.reference_logprobs(whole)
        order = torch.randperm(len(ids))
        return [self._taken(whole, part) for part in order.chunk(self.config.accumulation)]

    def _taken(self, whole: Rolled, places: Tensor) -> Rolled:
        """Some rows with their media."""
        rows = places.tolist()
        return replace(
            whole,
            drawn=[whole.drawn[row] for row in rows],
            inputs=self._inputs_of(whole.inputs, rows),
            ids=whole.ids[places],
            mask=whole.mask[places],
            texts=[whole.texts[row] for row in rows],
            rewards=whole.rewards[places],
            advantages=whole.advantages[places],
            old=None if whole.old is None else whole.old[places],
            reference=None if whole.reference is None else whole.reference[places],
        )

    def _inputs_of(self, inputs: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
        copies = len(inputs["input_ids"]) // len(self._media)
        taken: dict[str, Tensor] = {}
        for name, values in inputs.items():
            kind = OF.get(PATCHES.get(name, name))
            if kind is None:
                taken[name] = values[list(rows)]
                continue
            sizes = [len(getattr(one, kind)) for one in self._media for _ in range(copies)]
            if name in PATCHES:
                patches = iter(inputs[PATCHES[name]].prod(-1).tolist())
                sizes = [sum(islice(patches, size)) for size in sizes]
            spans = list(pairwise(accumulate(sizes, initial=0)))
            held = torch.cat([values[slice(*spans[row])] for row in rows])
            # the towers fail on none at all
            if len(held):
                taken[name] = held
        return taken

    def learn(self, one: Rolled, rolled: Sequence[Rolled], notebook: Notebook | None) -> float:
        logprobs = self.logprobs(self.model, one)
        per_token, metrics = self.token_loss(logprobs, one)
        mask = self.loss_mask(one)
        loss = self.reduce(per_token, mask, rolled)
        if notebook is not None:
            notebook.note(
                LossSeen(
                    completion_ids=one.ids, mask=mask, logprobs=logprobs.detach(),
                    old_logprobs=one.old, ref_logprobs=one.reference, advantages=one.advantages,
                    loss=loss.item(), requires_grad=loss.requires_grad, settings=self.settings(),
                    metrics=metrics,
                )
            )  # fmt: skip
        self.backward(loss)
        return loss.item()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, notebook: Notebook | None = None) -> StepOutcome:
        torch.manual_seed(self.config.seed + 1000 * self.steps_done)
        buffer = self.rollout(0, notebook)
        losses = []
        for _ in range(self.config.iterations):
            for one in buffer:
                losses.append(self.learn(one, buffer, notebook))
            self.update()
        self.steps_done += 1
        return outcome_of(losses, buffer)
