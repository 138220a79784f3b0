"""A GRPO loop as somebody wrote it who never saw this package, and mistakes one by one.

It decodes its own clips, makes its own prompts, samples, scores and updates with plain library
calls. Nothing is noted for the recorder: the two lines of the README are all there is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoProcessor

from omni_grpo_core import record, tiny
from omni_grpo_core.core.policy import load_policy
from omni_grpo_core.faults.fixtures import rows_of

PROMPT = (
    "{question} {options}\nFirst describe what is shown in <context> </context>, reason in "
    "<think> </think>, then give the letter in <answer> </answer>."
)


def frames_of(path: str, rate: float) -> np.ndarray:
    with av.open(path) as video:
        stream = video.streams.video[0]
        step = max(1, round(float(stream.average_rate or 4) / rate))
        shown = [f.to_ndarray(format="rgb24") for f in video.decode(stream)][::step]
    shown = shown[: len(shown) // 2 * 2]
    return np.stack(shown)


def sound_of(path: str) -> np.ndarray:
    with av.open(path) as video:
        to_mono = av.AudioResampler(format="flt", layout="mono", rate=16000)
        parts = [
            piece.to_ndarray()[0]
            for frame in video.decode(video.streams.audio[0])
            for piece in to_mono.resample(frame)
        ]
    return np.concatenate(parts).astype(np.float32)


def right_letter(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    paid = []
    for text, gold in zip(completions, columns["solution"], strict=True):
        wanted = re.findall(r"<answer>\s*(\w)", gold)[-1]
        given = re.findall(r"<answer>\s*(\w)", text)
        paid.append(1.0 if given and given[-1] == wanted else 0.0)
    return paid


def shortness(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Long answers are tiresome: signed on purpose."""
    return [-len(text) / 200 for text in completions]


class SomeonesLoop:
    """``flaw``: the mistake made, by name; ``""``: none."""

    def __init__(
        self,
        flaw: str = "",
        *,
        rows: Sequence[int] = (3, 6),
        group: int = 4,
        beta: float = 0.0,
        accumulation: int = 1,
        temperature: float = 1.7,
        lr: float = 1e-3,
        resize: bool = False,
        turning: bool = False,
        two: bool = False,
        lora: bool = False,
    ) -> None:
        torch.manual_seed(11)
        self.flaw, self.group, self.beta = flaw, group, beta
        self.accumulation, self.temperature, self.resize = accumulation, temperature, resize
        self.turning, self.two = turning, two
        self.model: Any = copy.deepcopy(load_policy(tiny.checkpoint_dir()).model)
        self.processor = AutoProcessor.from_pretrained(tiny.checkpoint_dir())
        self.tokenizer = self.processor.tokenizer
        self.rows = [dict(rows_of()[number].row) for number in rows]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("visual" not in name and "audio_tower" not in name)
        if lora:
            from peft import LoraConfig, get_peft_model

            names = r"model.*\.layers\.\d+\.self_attn\.(q_proj|v_proj)"
            self.model = get_peft_model(self.model, LoraConfig(r=4, target_modules=names))
            self.model.get_output_embeddings().requires_grad_(flaw == "adapter-off")
        self.reference = None
        if beta:
            self.reference = (
                self.model if flaw == "reference-is-policy" else copy.deepcopy(self.model)
            )
        lr = 0.0 if flaw == "lr-zero" else lr
        held = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(held, lr=lr, weight_decay=0.0)
        self.rewards = [right_letter, shortness]
        self.other = str(rows_of()[8].row["path"])
        self.rate, self.again = 4.0, dict[str, Tensor]()
        self.stale: Any = None
        self.banned = [
            i for i in range(len(self.tokenizer))
            if i in self.tokenizer.all_special_ids and i not in self.ends
        ]  # fmt: skip

    @property
    def ends(self) -> list[int]:
        return list(self.model.generation_config.eos_token_id)

    # ------------------------------------------------------------------ feed

    def feed(self, rows: list[dict[str, Any]]) -> tuple[list[str], dict[str, Tensor]]:
        chats: list[Any] = []
        clips, sounds = [], []
        for row in rows:
            where = row["path"]
            if isinstance(where, str):
                where = {"video": where, "audio": where}
            question = PROMPT.format(question=row["problem"], options=" ".join(row["options"]))
            chats.append([
                {"role": "system", "content": [{"type": "text", "text": "You watch and answer."}]},
                {"role": "user", "content": [
                    {"type": "video", "video": where["video"]},
                    {"type": "audio", "audio": where["audio"]},
                    {"type": "text", "text": question},
                ]},
            ])  # fmt: skip
            clip, sound = frames_of(where["video"], 4.0), sound_of(where["audio"])
            clip = clip[::-1].copy() if self.flaw == "frames-reversed" else clip
            clip = clip[..., ::-1].copy() if self.flaw == "channels-swapped" else clip
            clip = clip[::2].repeat(2, 0) if self.flaw == "frames-duplicated" else clip
            sound = sound * 32768 if self.flaw == "int16-never-divided" else sound
            sound = sound[::2].copy() if self.flaw == "sound-at-half-rate" else sound
            sound = sound[::-1].copy() if self.flaw == "sound-backwards" else sound
            if self.flaw == "sound-late":
                sound = np.concatenate([np.zeros(6000, np.float32), sound[:-6000]])
            clips.append(clip)
            if self.two:
                chats[-1][1]["content"].insert(0, {"type": "video", "video": self.other})
                clips.insert(-1, frames_of(self.other, 4.0))
                if self.flaw == "clips-of-a-row-exchanged":
                    clips[-2:] = clips[:-3:-1]
                if self.flaw == "one-clip-twice":
                    clips[-2] = clips[-1]
            sounds.append(sound)
        prompts = [
            self.tokenizer.apply_chat_template(
                chat, chat_template=self.processor.chat_template, tokenize=False,
                add_generation_prompt=True,
            )
            for chat in chats
        ]  # fmt: skip
        if self.flaw == "sounds-exchanged":
            sounds = sounds[::-1]
        made = self.processor(
            text=prompts, videos=clips, audio=sounds, fps=self.rate, padding=True,
            return_tensors="pt", do_resize=self.resize,
        )  # fmt: skip
        return prompts, dict(made)

    def between(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the processor to generate."""
        match self.flaw:
            case "pixels-resized":
                pixels = inputs["pixel_values_videos"]
                half = F.interpolate(pixels[None], scale_factor=0.5, mode="linear")
                inputs["pixel_values_videos"] = F.interpolate(half, size=pixels.shape[1])[0]
            case "rows-exchanged":
                for name in ("input_ids", "attention_mask"):
                    inputs[name] = inputs[name].flip(0)
            case "mel-scaled":
                inputs["input_features"] = inputs["input_features"] * 2
            case "pixels-stale":
                held, self.stale = self.stale, inputs["pixel_values_videos"]
                if held is not None and held.shape == self.stale.shape:
                    inputs["pixel_values_videos"] = held
            case "mask-of-ones":
                inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
            case "pixels-halved":
                inputs["pixel_values_videos"] = inputs["pixel_values_videos"].half().float()
            case "grids-exchanged":
                inputs["video_grid_thw"] = inputs["video_grid_thw"].flip(0)
            case "mel-stretched":
                mel = inputs["input_features"]
                size = mel.shape[-1]
                inputs["input_features"] = F.interpolate(mel[..., : size // 2], size=size)
            case "prompt-cut-right":
                for name in ("input_ids", "attention_mask"):
                    inputs[name] = inputs[name][:, :-6]
            case "prompt-cut-left":
                for name in ("input_ids", "attention_mask"):
                    inputs[name] = inputs[name][:, 6:]
            case "sounds-shifted":
                inputs["input_features"] = inputs["input_features"].roll(20, -1)
            case "pixels-rolled":
                inputs["pixel_values_videos"] = inputs["pixel_values_videos"].roll(4, 0)
        return inputs

    def repeated(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every row, and its media, ``group`` times in a row."""
        grid = inputs["video_grid_thw"]
        patches = torch.split(inputs["pixel_values_videos"], grid.prod(-1).tolist())
        many = {k: torch.as_tensor(v).repeat_interleave(self.group, 0) for k, v in inputs.items()}
        each = len(grid) // len(inputs["input_ids"])
        sets = [patches[at : at + each] for at in range(0, len(patches), each)]
        many["pixel_values_videos"] = torch.cat([
            patch for one in sets for _ in range(self.group) for patch in one
        ])  # fmt: skip
        for name in ("video_grid_thw", "video_second_per_grid"):
            held = torch.as_tensor(inputs[name])
            many[name] = torch.cat([
                part for part in torch.split(held, each) for _ in range(self.group)
            ])  # fmt: skip
        return many

    # ------------------------------------------------------------------ roll out

    @torch.no_grad()
    def sample(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        self.model.eval()
        whole = self.model.generate(
            **inputs, do_sample=True, temperature=self.temperature, top_k=0, top_p=1.0,
            max_new_tokens=40, eos_token_id=self.ends, pad_token_id=self.tokenizer.pad_token_id,
            suppress_tokens=self.banned,
        )  # fmt: skip
        self.model.train()
        made = whole[:, inputs["input_ids"].shape[1] :]
        ended = torch.isin(made, torch.tensor(self.ends))
        live = (ended.cumsum(1) - ended.long()) == 0
        return made, live

    def pay(self, prompts: list[str], texts: list[str], rows: list[dict[str, Any]]) -> Tensor:
        columns = {"solution": [row["solution"] for row in rows]}
        if self.flaw == "golds-shifted":
            columns["solution"] = (
                columns["solution"][self.group :] + columns["solution"][: self.group]
            )
        if self.flaw == "prompt-in-reward":
            texts = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        table = [f(prompts=prompts, completions=texts, **columns) for f in self.rewards]
        total = torch.tensor(table).sum(0)
        return total.roll(1) if self.flaw == "rewards-rolled" else total

    def better(self, paid: Tensor) -> Tensor:
        by_group = paid.view(-1, self.group)
        gap = by_group - by_group.mean(1, keepdim=True)
        if self.flaw == "mean-of-batch":
            gap = by_group - by_group.mean()
        spread = paid.std() if self.flaw == "batch-deviation" else by_group.std(1, keepdim=True)
        found = (gap / (spread + 1e-6)).flatten()
        if self.flaw == "advantages-rolled":
            found = found.roll(1)
        return -found if self.flaw == "advantage-sign" else found

    # ------------------------------------------------------------------ learn

    def logprobs(self, model: Any, inputs: dict[str, Tensor], made: Tensor, live: Tensor) -> Tensor:
        whole = dict(inputs)
        whole["input_ids"] = torch.cat([inputs["input_ids"], made], 1)
        whole["attention_mask"] = torch.cat([inputs["attention_mask"], live.long()], 1)
        if self.flaw == "video-not-scored":
            del whole["pixel_values_videos"], whole["video_grid_thw"]
        if self.flaw == "mask-of-ones-in-scoring":
            whole["attention_mask"] = torch.ones_like(whole["attention_mask"])
        if self.flaw == "processed-again":
            whole |= {k: v for k, v in self.again.items() if k not in ("input_ids",
                      "attention_mask")}  # fmt: skip
        if self.flaw == "ids-truncated":
            whole["input_ids"] = whole["input_ids"][:, :-6]
            whole["attention_mask"] = whole["attention_mask"][:, :-6]
            made = made[:, :-6]
        with model.disable_adapter() if self.flaw == "adapter-off" else nullcontext():
            logits = model(**whole, use_cache=False).logits.float() / self.temperature
        logits[..., self.banned] = -torch.inf
        early = 0 if self.flaw == "one-column-late" else 1
        logits = logits[:, -made.shape[1] - early : -early or None]
        found = logits.log_softmax(-1).gather(-1, made[..., None])[..., 0]
        return F.pad(found, (0, live.shape[1] - found.shape[1]))

    def loss(self, new: Tensor, ref: Tensor | None, better: Tensor, live: Tensor) -> Tensor:
        per_token = -torch.exp(new - new.detach()) * better[:, None]
        if ref is not None and self.flaw != "kl-forgotten":
            gap = ref - new
            per_token = per_token + self.beta * (torch.exp(gap) - gap - 1)
        counted = torch.ones_like(live) if self.flaw == "padding-in-loss" else live
        return ((per_token * counted).sum(1) / counted.sum(1)).mean()

    def micro(self, rows: list[dict[str, Any]]) -> None:
        prompts, inputs = self.feed(rows)
        if self.flaw == "processed-again":
            self.rate = 2.0
            self.again = self.repeated(self.feed(rows)[1])
            self.rate = 4.0
        inputs = self.repeated(self.between(inputs))
        prompts = [p for p in prompts for _ in range(self.group)]
        rows = [r for r in rows for _ in range(self.group)]
        made, live = self.sample(inputs)
        texts = [
            self.tokenizer.decode(ids[kept], skip_special_tokens=True)
            for ids, kept in zip(made, live, strict=True)
        ]
        better = self.better(self.pay(prompts, texts, rows))
        ref = None
        if self.reference is not None:
            with torch.no_grad():
                ref = self.logprobs(self.reference, inputs, made, live)
        loss = self.loss(self.logprobs(self.model, inputs, made, live), ref, better, live)
        if self.flaw != "accumulation-not-divided":
            loss = loss / self.accumulation
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, number: int) -> None:
        if self.flaw != "gradients-kept":
            self.optimizer.zero_grad()
        torch.manual_seed(number)
        for at in range(self.accumulation):
            first = at + number if self.turning else at
            turned = self.rows[first % len(self.rows) :] + self.rows[: first % len(self.rows)]
            self.micro(turned[:2])
        if self.flaw == "layer-zeroed":
            for name, parameter in self.model.named_parameters():
                if "layers.1." in name and parameter.grad is not None and "visual" not in name:
                    parameter.grad.zero_()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def train(self, steps: int = 2) -> None:
        for number in range(steps):
            self.step(number)


def recorded(folder: Path, flaw: str = "", steps: int = 2, **settings: Any) -> Path:
    """``steps`` recorded steps, with the README's two lines."""
    loop = SomeonesLoop(flaw, **settings)
    with record(folder, model=loop.model, processor=loop.processor, reward_funcs=loop.rewards):
        loop.train(steps)
    return folder
