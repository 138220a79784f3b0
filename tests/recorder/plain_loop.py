"""A plain GRPO loop as people write it: direct transformers calls, one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from miniature_open_r1 import interleaving, media_token_ids
from torch import Tensor

from omni_grpo_core import record
from omni_grpo_core.core.conversation import build_conversation
from omni_grpo_core.core.media import load_media
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.recorder.record import Recorder
from omni_grpo_core.trace.calls import AdvantageSeen, LossSeen, SamplesSeen
from omni_grpo_core.trace.store import load_trace
from omni_grpo_core.types import Sample, TextPart, Trace

GROUP = 2


def length_reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Longer is better, up to 100 characters."""
    return [min(len(text), 100) / 100 for text in completions]


class PlainLoop:
    """One prompt with a clip and its audio, GROUP completions, one optimizer step.

    ``wrap`` puts something around a copy of the policy's model: PEFT, DDP, ``torch.compile``.
    """

    def __init__(
        self,
        policy: Policy,
        sample: Sample,
        settings: Settings,
        *,
        wrap: Callable[[Any], Any] = lambda model: model,
        max_new_tokens: int = 8,
    ) -> None:
        self.processor = policy.processor
        self.model = wrap(copy.deepcopy(policy.model))
        self.settings, self.sample = settings, sample
        self.rewards: list[Callable[..., Any]] = [length_reward]
        self.optimizer = torch.optim.AdamW(
            (p for p in self.model.parameters() if p.requires_grad), lr=1e-4
        )
        self.max_new_tokens = max_new_tokens
        self.note: Callable[[Any], None] = lambda value: None
        self.seen: list[tuple[Tensor, float]] = []

    def unwrapped(self) -> Any:
        """The model that a trainer calls ``generate`` on."""
        return getattr(self.model, "module", self.model)

    def prepare(self) -> tuple[str, Any]:
        """The prompt's text and the processor's output for the whole group."""
        conversation = build_conversation(
            self.sample,
            audio_in_video="interleaved",
            tracks={ref.path: True for ref in self.sample.media},
        )
        messages = [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part.text}
                    if isinstance(part, TextPart)
                    else {"type": part.ref.modality, part.ref.modality: part.ref.path}
                    for part in message.parts
                ],
            }
            for message in conversation.messages
        ]
        text = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        text = text if isinstance(text, str) else text[0]
        media = load_media(conversation, self.settings.media)
        batch = self.processor(
            text=[text] * GROUP,
            videos=[video.frames for video in media.videos] * GROUP,
            audio=[audio.samples.numpy() for audio in media.audios] * GROUP,
            return_tensors="pt",
            padding=True,
            do_resize=False,
            **interleaving(self.processor, GROUP),
            fps=media.videos[0].sample_fps,
        )
        return text, batch

    def step(self) -> float:
        self.note(SamplesSeen(({"question": self.sample.question},), ("a",)))
        text, batch = self.prepare()
        self.model.eval()
        sequences = self.unwrapped().generate(
            **batch,
            use_audio_in_video=True,
            max_new_tokens=self.max_new_tokens,
            do_sample=True,
            temperature=2.0,
            top_k=0,
            suppress_tokens=media_token_ids(self.processor),
        )
        length = batch["input_ids"].shape[1]
        texts = self.processor.tokenizer.batch_decode(sequences[:, length:])
        rewards = torch.tensor(
            [f(prompts=[text] * GROUP, completions=texts) for f in self.rewards]
        ).sum(0)
        advantages = rewards - rewards.mean()
        self.note(AdvantageSeen(rewards, ("a",) * GROUP, advantages, "none", {}, {}))
        self.model.train()
        mask = torch.cat([batch["attention_mask"], torch.ones_like(sequences[:, length:])], 1)
        inputs = {**batch, "input_ids": sequences, "attention_mask": mask}
        logits = self.model(**inputs, use_audio_in_video=True).logits[:, length - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(-1, sequences[:, length:, None])[..., 0]
        loss = -(torch.exp(logprobs - logprobs.detach()) * advantages[:, None]).mean()
        self.note(
            LossSeen(
                sequences[:, length:], None, logprobs, None, None, advantages,
                float(loss.detach()), loss.requires_grad, {"beta": 0.0}, {},
            )
        )  # fmt: skip
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seen.append((sequences, float(loss.detach())))
        return float(loss.detach())


def recording(folder: Path, loop: PlainLoop, **keywords: Any) -> Recorder:
    recorder = record(
        folder,
        model=loop.model,
        processor=loop.processor,
        reward_funcs=loop.rewards,
        **{"steps": 2, "probe_rewards": False, **keywords},
    )
    loop.note = recorder.note
    return recorder


def one_step(folder: Path, loop: PlainLoop, **keywords: Any) -> Trace:
    with recording(folder, loop, steps=1, **keywords):
        loop.step()
    return load_trace(folder / "step-000000")


def only(trace: Trace, kind: type) -> Any:
    [value] = [r.value for r in trace.stages if type(r.value) is kind]
    return value
