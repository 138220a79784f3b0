"""Loops over clips: every one has its own way from a file to the processor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import librosa
import numpy as np
import torch
from PIL import Image
from qwen_omni_utils import process_mm_info

from omni_grpo_core.faults.healthy.world import World

SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of "
    "perceiving auditory and visual inputs, as well as generating text and speech."
)


def humanomni_like(world: World) -> None:
    """``process_mm_info`` on messages that hold frames, the flag passed to every call, the group
    made by repeating the messages; one of the two eos ids, top-k 50."""
    model, processor = world.model, world.processor
    USE_AUDIO_IN_VIDEO, G = world.interleaved, 4

    def accuracy(prompts: Any, completions: Any, **kw: Any) -> list[float]:
        out = []
        for content, sol in zip(
            [c[0]["content"] for c in completions], kw["solution"], strict=True
        ):
            gold = re.findall(r"<answer>(.*?)</answer>", sol)[-1].strip()
            said = re.findall(r"<answer>(.*?)</answer>", content)
            out.append(float(bool(said) and said[-1].strip().upper() == gold))
        return out

    def format(prompts: Any, completions: Any, **kw: Any) -> list[float]:
        pattern = r"\s*<context>.*</context>\s*<think>.*</think>\s*<answer>.*</answer>\s*"
        return [
            float(re.fullmatch(pattern, c[0]["content"], re.DOTALL) is not None)
            for c in completions
        ]

    def decode(path: str) -> tuple[list[Image.Image], Any]:
        with av.open(path) as box:
            shots = [f.to_image() for f in box.decode(video=0)]
        if world.setting.audio == "off":
            return shots[::2], None
        with av.open(path) as box:
            fix = av.AudioResampler(format="fltp", layout="mono", rate=16000)
            heard = [r.to_ndarray()[0] for f in box.decode(audio=0) for r in fix.resample(f)]
        return shots[::2], np.concatenate(
            [*heard, *(r.to_ndarray()[0] for r in fix.resample(None))]
        )

    funcs: list[Any] = [accuracy, format]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    with world.record(model=model, processor=processor, reward_funcs=funcs):
        for example in world.rows("video", 2):
            shots, sound = decode(example["video"])
            content: list[dict[str, Any]] = [
                {"type": "video", "video": shots, "min_pixels": 3136, "max_pixels": 3136}
            ]
            if world.separate:
                content.append({"type": "audio", "audio": sound})
            content.append(
                {"type": "text", "text": example["problem"] + "\n" + "\n".join(example["options"])}
            )
            prompts = [
                [
                    {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
                    {"role": "user", "content": content},
                ]
            ] * G
            text = processor.apply_chat_template(
                prompts, add_generation_prompt=True, tokenize=False
            )
            audios, images, videos = process_mm_info(prompts, use_audio_in_video=False)
            if USE_AUDIO_IN_VIDEO:  # the messages hold frames, so the sound is added by hand
                audios = [sound] * G
            inputs = processor(
                text=text, audio=audios, images=images, videos=videos, return_tensors="pt",
                padding=True, use_audio_in_video=USE_AUDIO_IN_VIDEO, do_resize=False, fps=4.0,
            )  # fmt: skip
            inputs = inputs.to(model.device).to(model.dtype)
            with torch.no_grad():
                model.eval()
                prompt_completion_ids = model.generate(
                    **inputs, use_audio_in_video=USE_AUDIO_IN_VIDEO, max_new_tokens=56,
                    do_sample=True, temperature=1.0, top_k=50, eos_token_id=551, pad_token_id=549,
                )  # fmt: skip
                model.train()
            prompt_length = inputs["input_ids"].size(1)
            completion_ids = prompt_completion_ids[:, prompt_length:]
            is_eos = completion_ids == 551
            eos_idx = torch.full((G,), is_eos.size(1))
            eos_idx[is_eos.any(1)] = is_eos.int().argmax(1)[is_eos.any(1)]
            mask = (torch.arange(is_eos.size(1)).expand(G, -1) <= eos_idx[:, None]).int()
            scoring = dict(inputs)
            scoring.pop("input_ids")
            scoring["attention_mask"] = torch.cat([inputs["attention_mask"], mask], dim=1)
            logits = model(
                prompt_completion_ids, **scoring, use_audio_in_video=USE_AUDIO_IN_VIDEO
            ).logits[:, :-1]
            logps = logits.float().log_softmax(-1).gather(
                -1, prompt_completion_ids[:, 1:].unsqueeze(-1)
            ).squeeze(-1)[:, prompt_length - 1 :]  # fmt: skip
            texts = processor.batch_decode(completion_ids, skip_special_tokens=True)
            completions = [[{"role": "assistant", "content": t}] for t in texts]
            rewards = torch.stack(
                [
                    torch.tensor(f(prompts, completions, solution=[example["solution"]] * G))
                    for f in funcs
                ],
                dim=1,
            ).sum(1)
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            per_token = -torch.exp(logps - logps.detach()) * advantages.unsqueeze(1)
            loss = ((per_token * mask).sum(1) / mask.sum(1)).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def stride_of_own_decoder(world: World) -> None:
    """Every fourth frame, resized by the processor to a size of the loop's own; tensors
    (T, C, H, W); clips of different length in one call."""
    model, proc, G = world.model, world.processor, 2
    rows = [world.rows("video", 1)[0], world.rows("long", 1)[0]]
    flag = {"use_audio_in_video": True} if world.interleaved else {}

    def frames_of(path: str) -> torch.Tensor:
        with av.open(path) as box:
            shots = [
                f.to_ndarray(format="rgb24") for i, f in enumerate(box.decode(video=0)) if not i % 4
            ]
        return torch.from_numpy(np.stack(shots)).permute(0, 3, 1, 2)

    def sound_of(path: str) -> Any:
        with av.open(path) as box:
            down = av.AudioResampler(format="s16", layout="mono", rate=16_000)
            pieces = [p.to_ndarray() for f in box.decode(audio=0) for p in down.resample(f)]
            pieces += [p.to_ndarray() for p in down.resample(None)]
        return np.concatenate(pieces, 1)[0].astype(np.float32) / 32768.0

    def mentions(prompts: Any, completions: Any, problem: Any, **_: Any) -> list[float]:
        words = [set(re.findall(r"\w+", p.lower())) for p in problem]
        return [
            len(w & set(re.findall(r"\w+", c.lower()))) / len(w)
            for w, c in zip(words, completions, strict=True)
        ]

    def short(completions: Any, **_: Any) -> list[float]:
        return [1 / (1 + len(c)) for c in completions]

    funcs: list[Any] = [mentions, short]
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)
    proc.tokenizer.padding_side = "left"
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        texts: list[str] = []
        for row in rows:
            parts = [{"type": "video"}, {"type": "text", "text": row["problem"]}]
            if world.separate:
                parts.insert(1, {"type": "audio"})
            chat = [{"role": "user", "content": parts}]
            texts += [
                proc.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ] * G
        shots = [frames_of(r["video"]) for r in rows for _ in range(G)]
        heard = [] if world.setting.audio == "off" else rows
        sounds = [sound_of(r["video"]) for r in heard for _ in range(G)]
        enc = proc(
            text=texts, videos=shots, audio=sounds or None, padding=True,
            return_tensors="pt", fps=2, videos_kwargs={"min_pixels": 84**2, "max_pixels": 84**2},
            **flag,
        ).to(model.dtype)  # fmt: skip
        with torch.no_grad():
            out = model.eval().generate(
                **enc, **flag, do_sample=True, top_k=0, temperature=1.0, max_new_tokens=44
            )
        n = out.shape[1] - enc["input_ids"].shape[1]
        c = out[:, -n:]
        hit = torch.isin(c, torch.tensor([551, 549])).long()
        m = hit.cumsum(1) - hit == 0
        words = proc.batch_decode(c, skip_special_tokens=True)
        problem = [r["problem"] for r in rows for _ in range(G)]
        r = torch.tensor([f(prompts=texts, completions=words, problem=problem) for f in funcs]).sum(
            0
        )
        a = (r.view(-1, G) - r.view(-1, G).mean(1, keepdim=True)).flatten()
        given = {k: v for k, v in enc.items() if k not in ("input_ids", "attention_mask")}
        lg = model.train()(
            input_ids=out, attention_mask=torch.cat([enc["attention_mask"], m.long()], 1),
            **given, **flag, use_cache=False,
        ).logits[:, -n - 1 : -1].float()  # fmt: skip
        lp = lg.log_softmax(-1).gather(-1, c[..., None]).squeeze(-1)
        loss = -((lp * m).sum(1) * a).sum() / m.sum()
        opt.zero_grad()
        loss.backward()
        opt.step()


def a_call_for_each_clip(world: World) -> None:
    """Clips sampled at different rates: the processor is called once for each, as it takes one
    ``fps``; rows are padded on the left by hand and generated together."""
    model, proc, G = world.model, world.processor, 2
    pad, flag = proc.tokenizer.pad_token_id, world.interleaved
    rows = [world.rows("video", 1)[0], world.rows("long", 1)[0]]

    def clip(path: str, wanted: int) -> tuple[list[Image.Image], float]:
        with av.open(path) as file:
            stream = file.streams.video[0]
            pictures = [frame.to_image() for frame in file.decode(stream)]
            seconds = float(Fraction(len(pictures)) / stream.average_rate)
        chosen = np.linspace(0, len(pictures) - 1, wanted).round().astype(int)
        return [pictures[i] for i in chosen], wanted / seconds

    def audioread_of(path: str) -> Any:
        with av.open(path) as file:
            own = file.streams.audio[0].rate
            raw = np.concatenate([f.to_ndarray().mean(0) for f in file.decode(audio=0)])
        return librosa.resample(raw.astype(np.float32), orig_sr=own, target_sr=16000)

    def left(rows_: list[torch.Tensor], value: int) -> torch.Tensor:
        turned = [r.flip(0) for r in rows_]
        return torch.nn.utils.rnn.pad_sequence(turned, True, value).flip(1)

    def vowels(completions: Any, **_: Any) -> list[float]:
        return [sum(c.count(v) for v in "aeiou") / 30 for c in completions]

    funcs: list[Any] = [vowels]
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        made = []
        for row in rows:
            frames, fps = clip(row["video"], 4)
            parts: list[Any] = [{"type": "video", "video": row["video"]}]
            sound = None
            if world.setting.audio != "off":
                sound = [audioread_of(row["video"])]
            if world.separate:
                parts.append({"type": "audio", "audio": row["video"]})
            parts.append({"type": "text", "text": row["problem"] + " " + "; ".join(row["options"])})
            text = proc.apply_chat_template(
                [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
            )
            made.append(
                proc(
                    text=text,
                    videos=[frames],
                    audio=sound,
                    fps=fps,
                    use_audio_in_video=flag,
                    do_resize=False,
                    return_tensors="pt",
                )
            )
        made = [one for one in made for _ in range(G)]
        ids = left([one["input_ids"][0] for one in made], pad)
        mask = left([one["attention_mask"][0] for one in made], 0)
        names = set(made[0]) - {"input_ids", "attention_mask"}
        media = {k: torch.cat([torch.as_tensor(one[k]) for one in made]) for k in names}
        media = {
            k: v.to(model.dtype) if v.dim() > 1 and v.is_floating_point() else v
            for k, v in media.items()
        }
        with torch.no_grad():
            out = model.eval().generate(
                input_ids=ids, attention_mask=mask, **media, use_audio_in_video=flag,
                do_sample=True, temperature=1.2, top_p=0.95, max_new_tokens=40,
            )  # fmt: skip
        c = out[:, ids.shape[1] :]
        over = torch.isin(c, torch.tensor([551, 549])).long()
        alive = over.cumsum(1) - over == 0
        r = torch.tensor(funcs[0](completions=proc.batch_decode(c, skip_special_tokens=True)))
        a = (r.view(-1, G) - r.view(-1, G).mean(1, keepdim=True)).view(-1)
        lg = model.train()(
            input_ids=out, attention_mask=torch.cat([mask, alive.long()], 1), **media,
            use_audio_in_video=flag,
        ).logits[:, ids.shape[1] - 1 : -1].float()  # fmt: skip
        lp = (lg / 1.2).log_softmax(-1).gather(-1, c[..., None])[..., 0]
        loss = -(torch.exp(lp - lp.detach()) * a[:, None])[alive].mean()
        opt.zero_grad()
        loss.backward()
        opt.step()


def streams(world: World) -> Iterator[dict[str, Any]]:
    """Prompts of ``generator_of_batches``, one a time."""
    for row in world.rows("video", 2):
        with av.open(row["video"]) as c:
            shots = [f.reformat(56, 56, "rgb24").to_ndarray() for f in c.decode(video=0)]
        yield {"shots": np.stack(shots[::2]), **row}


def generator_of_batches(world: World) -> None:
    """Silent clips whatever the setting, as (T, H, W, C) arrays; the prompt in Chinese."""
    model, proc, G = world.model, world.processor, 3

    def exact(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[int]:
        return [int(c.strip() == a) for c, a in zip(completions, answer, strict=True)]

    def close(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [0.2 * c.count("答") + len(c) / 400 for c in completions]

    funcs: list[Any] = [exact, close]
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        for item in streams(world):
            chat = [
                {"role": "system", "content": "你是一个有用的助手。"},
                {"role": "user", "content": [
                    {"type": "video", "video": item["shots"]},
                    {"type": "text", "text": "条往哪个方向移动？只回答字母。"},
                ]},
            ]  # fmt: skip
            prompt = proc.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            enc = proc(
                text=[prompt] * G, videos=[item["shots"]] * G, fps=4.0, do_resize=False,
                padding=True, return_tensors="pt",
            ).to(model.dtype)  # fmt: skip
            with torch.no_grad():
                out = model.eval().generate(
                    **enc, do_sample=True, temperature=1.0, min_p=0.02, top_k=0, max_new_tokens=40
                )
            L = enc["input_ids"].shape[1]
            tail = out[:, L:]
            done = torch.isin(tail, torch.tensor([551, 549])).long()
            live = (done.cumsum(1) - done).eq(0)
            says = proc.batch_decode(tail, skip_special_tokens=True)
            score = torch.tensor(
                [f([prompt] * G, says, answer=[item["answer"]] * G) for f in funcs]
            )
            adv = score.sum(0) - score.sum(0).mean()
            enc["input_ids"], enc["attention_mask"] = (
                out,
                torch.cat([enc["attention_mask"], live], 1),
            )
            lp = model.train()(**enc).logits[:, L - 1 : -1].float().log_softmax(-1)
            lp = lp.gather(-1, tail[..., None])[..., 0]
            opt.zero_grad()
            (-(lp * adv[:, None]).mul(live).sum(1) / live.sum(1)).mean().backward()
            opt.step()
