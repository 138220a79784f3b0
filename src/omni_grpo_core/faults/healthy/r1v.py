"""Loops as in R1-V, open-r1-multimodal and VLM-R1: a trainer's ``compute_loss`` does everything."""

from __future__ import annotations

import copy
import re
from datetime import datetime
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig

from omni_grpo_core.faults.healthy.world import World

QUESTION_TEMPLATE = (
    "{Question}  Output the thinking process in <think> </think> and final answer in "
    "<answer> </answer> tags."
)


def r1_v(world: World) -> None:
    """One prompt a step, sampled G times in a row with a generation config of its own; media
    tensors repeated by hand for scoring; KL to a deep copy; sequence mean."""
    G, beta = 3, 0.04
    model, processing_class = world.model, world.processor
    ref_model = copy.deepcopy(model).eval().requires_grad_(False)

    def accuracy_reward(completions: Any, solution: Any, **kwargs: Any) -> list[float]:
        contents = [completion[0]["content"] for completion in completions]
        rewards = []
        for content, sol in zip(contents, solution, strict=True):
            sol_match = re.search(r"<answer>(.*?)</answer>", sol)
            ground_truth = sol_match.group(1).strip() if sol_match else sol.strip()
            content_match = re.search(r"<answer>(.*?)</answer>", content)
            student = content_match.group(1).strip() if content_match else content.strip()
            rewards.append(1.0 if student == ground_truth else 0.0)
        return rewards

    def format_reward(completions: Any, **kwargs: Any) -> list[float]:
        pattern = r".*<think>.*?</think>\s*<answer>.*?</answer>"
        contents = [completion[0]["content"] for completion in completions]
        return [1.0 if re.fullmatch(pattern, c, re.DOTALL) else 0.0 for c in contents]

    reward_funcs: list[Any] = [accuracy_reward, format_reward]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    config = GenerationConfig(
        max_new_tokens=64, do_sample=True, temperature=1, num_return_sequences=1,
        pad_token_id=processing_class.tokenizer.pad_token_id, eos_token_id=[551, 549], top_k=0,
    )  # fmt: skip

    def per_token_logps(which: Any, input_ids: Any, mask: Any, **media: Any) -> Any:
        logits = which(input_ids, attention_mask=mask, **media).logits[:, :-1, :]
        rows = []
        for row_logits, row_ids in zip(logits, input_ids[:, 1:], strict=True):
            log_probs = row_logits.float().log_softmax(dim=-1)
            rows.append(torch.gather(log_probs, dim=1, index=row_ids.unsqueeze(1)).squeeze(1))
        return torch.stack(rows)

    def compute_loss(row: dict[str, Any]) -> Any:
        question = QUESTION_TEMPLATE.format(Question=row["problem"])
        prompt = [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": question}],
            }
        ]
        prompts_text = [
            processing_class.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ]
        inputs = processing_class(
            text=prompts_text, images=[Image.open(row["image"])], return_tensors="pt",
            padding=True, padding_side="left", add_special_tokens=False,
        )  # fmt: skip
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        completions = []
        for _ in range(G):
            with torch.no_grad():
                completions.append(model.eval().generate(**inputs, generation_config=config))
        longest = max(c.size(1) for c in completions)
        pad = processing_class.tokenizer.pad_token_id
        padded = [
            torch.cat([c, torch.full((1, longest - c.size(1)), pad)], dim=1) for c in completions
        ]
        ids = torch.cat(padded, dim=0)
        prompt_length = inputs["input_ids"].size(1)
        completion_ids = ids[:, prompt_length:]
        is_eos = torch.isin(completion_ids, torch.tensor([551, 549]))
        eos_idx = torch.full((G,), is_eos.size(1), dtype=torch.long)
        eos_idx[is_eos.any(dim=1)] = is_eos.int().argmax(dim=1)[is_eos.any(dim=1)]
        places = torch.arange(is_eos.size(1)).expand(G, -1)
        completion_mask = (places <= eos_idx.unsqueeze(1)).int()
        prompt_mask = inputs["attention_mask"].repeat_interleave(G, dim=0)
        attention_mask = torch.cat([prompt_mask, completion_mask], dim=1)
        media = {
            "pixel_values": inputs["pixel_values"].repeat(G, 1),
            "image_grid_thw": inputs["image_grid_thw"].repeat_interleave(G, dim=0),
        }
        model.train()
        logps = per_token_logps(model, ids, attention_mask, **media)[:, prompt_length - 1 :]
        with torch.inference_mode():
            ref = per_token_logps(ref_model, ids, attention_mask, **media)[:, prompt_length - 1 :]
        ref = ref.clone()
        kl = torch.exp(ref - logps) - (ref - logps) - 1
        texts = processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        chats = [[{"role": "assistant", "content": text}] for text in texts]
        rewards = torch.zeros(G, len(reward_funcs))
        for i, func in enumerate(reward_funcs):
            outputs = func(prompts=[prompt] * G, completions=chats, solution=[row["solution"]] * G)
            rewards[:, i] = torch.tensor(outputs)
        total = rewards.sum(dim=1)
        advantages = (total - total.mean()) / (total.std() + 1e-4)
        per_token = torch.exp(logps - logps.detach()) * advantages.unsqueeze(1)
        per_token = -(per_token - beta * kl)
        return ((per_token * completion_mask).sum(1) / completion_mask.sum(1)).mean()

    with world.record(model=model, processor=processing_class, reward_funcs=reward_funcs):
        for row in world.rows("image", 2):
            compute_loss(row).backward()
            optimizer.step()
            optimizer.zero_grad()


def vlm_r1(world: World) -> None:
    """The sampler has repeated the rows already; old log-probs from a pass of their own, two
    updates on one rollout, the second clipped; images as lists, one list a row."""
    model, processing_class = world.model, world.processor
    epsilon, iterations, G = 0.2, 2, 4
    rows = [row for row in world.rows("image", 2) for _ in range(G)]

    def length_reward(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        started = datetime(2025, 1, 1)  # VLM-R1 logs the time of day
        return [0.01 * len(c[0]["content"]) + 0 * started.day for c in completions]

    def letter_reward(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        texts = [c[0]["content"] for c in completions]
        return [
            2.0 * (t.rstrip().endswith(f"{a}</answer>")) - 1.0
            for t, a in zip(texts, kwargs["answer"], strict=True)
        ]

    funcs: list[Any] = [length_reward, letter_reward]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def logps(inputs: dict[str, Any], keep: int) -> Any:
        out = model(**inputs).logits[:, -keep - 1 : -1].float()
        return out.log_softmax(-1).gather(-1, inputs["input_ids"][:, -keep:, None])[..., 0]

    with world.record(model=model, processor=processing_class, reward_funcs=funcs):
        messages = [
            [{"role": "user", "content": [
                {"type": "image", "text": None}, {"type": "text", "text": row["problem"]},
            ]}] for row in rows
        ]  # fmt: skip
        prompts = [
            processing_class.apply_chat_template(m, tokenize=False, add_generation_prompt=True)
            for m in messages
        ]
        images = [[Image.open(row["image"])] for row in rows]
        batch = processing_class(
            text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt"
        )
        batch = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()}
        model.eval()
        with torch.no_grad():
            ids = model.generate(
                **batch, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=48
            )
        model.train()
        comp = ids[:, batch["input_ids"].size(1) :]
        eos = torch.isin(comp, torch.tensor([551, 549]))
        first = torch.where(eos.any(1), eos.int().argmax(1), eos.size(1))
        mask = (torch.arange(comp.size(1))[None, :] <= first[:, None]).int()
        whole = {
            **batch,
            "input_ids": ids,
            "attention_mask": torch.cat([batch["attention_mask"], mask], 1),
        }
        with torch.no_grad():
            old = logps(whole, comp.size(1))
        texts = processing_class.batch_decode(comp, skip_special_tokens=True)
        replies = [[{"role": "assistant", "content": t}] for t in texts]
        columns = {"answer": [row["answer"] for row in rows]}
        per_func = torch.tensor(
            [f(prompts=messages, completions=replies, **columns) for f in funcs]
        )
        rewards = per_func.sum(0)
        mean = rewards.view(-1, G).mean(1).repeat_interleave(G)
        std = rewards.view(-1, G).std(1).repeat_interleave(G)
        advantages = (rewards - mean) / (std + 1e-4)
        for _ in range(iterations):
            new = logps(whole, comp.size(1))
            ratio = torch.exp(new - old)
            one = ratio * advantages[:, None]
            two = ratio.clamp(1 - epsilon, 1 + epsilon) * advantages[:, None]
            per_token = -torch.min(one, two)
            loss = ((per_token * mask).sum(1) / mask.sum(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def open_r1_video(world: World) -> None:
    """Frames decoded by the loop at a stride, given as a list of arrays; sound by its setting."""
    model, processor, G = world.model, world.processor, 3

    def fmt(completions: Any, **_: Any) -> list[float]:
        return [float("<answer>" in c and "</answer>" in c) for c in completions]

    def acc(completions: Any, solution: Any, **_: Any) -> list[float]:
        tail = [s.split("<answer>")[-1][0] for s in solution]
        return [
            float(c.split("<answer>")[-1][:1] == s) for c, s in zip(completions, tail, strict=True)
        ]

    funcs: list[Any] = [fmt, acc]
    opt = torch.optim.AdamW(model.parameters(), lr=2e-5)

    def read(path: str) -> tuple[list[Any], float, Any]:
        with av.open(path) as container:
            rate = float(container.streams.video[0].average_rate)
            frames = [f.to_image() for f in container.decode(video=0)]
        sound = None
        if world.setting.audio != "off":
            with av.open(path) as container:
                resampler = av.AudioResampler(format="flt", layout="mono", rate=16000)
                parts = [
                    out.to_ndarray()[0]
                    for frame in container.decode(audio=0)
                    for out in resampler.resample(frame)
                ]
                parts += [out.to_ndarray()[0] for out in resampler.resample(None)]
            sound = np.concatenate(parts)
        return frames[:: int(rate // 2)], 2.0, sound

    with world.record(model=model, processor=processor, reward_funcs=funcs):
        for row in world.rows("video", 2):
            frames, fps, sound = read(row["video"])
            parts: list[dict[str, Any]] = [{"type": "video", "video": row["video"]}]
            if world.separate:
                parts.append({"type": "audio", "audio": row["video"]})
            parts.append(
                {"type": "text", "text": row["problem"] + "\n" + "\n".join(row["options"])}
            )
            text = processor.apply_chat_template(
                [
                    {"role": "system", "content": "Use <think></think> and <answer></answer>."},
                    {"role": "user", "content": parts},
                ],
                tokenize=False,
                add_generation_prompt=True,
            )
            # "in_video": every call of the family takes the same flag
            given = {"use_audio_in_video": world.interleaved}
            inputs = processor(
                text=[text] * G, videos=[[np.asarray(f) for f in frames]] * G,
                audio=None if sound is None else [sound] * G, fps=fps, do_resize=False,
                padding=True, return_tensors="pt", **given,
            ).to(model.dtype)  # fmt: skip
            with torch.no_grad():
                seq = model.eval().generate(
                    **inputs, **given, do_sample=True, temperature=1.1, top_k=0, max_new_tokens=48
                )
            c = seq[:, inputs.input_ids.shape[1] :]
            ended = torch.isin(c, torch.tensor([551, 549]))
            m = (ended.cumsum(1) - ended.int()) == 0
            words = processor.batch_decode(c, skip_special_tokens=True)
            r = torch.tensor([f(completions=words, solution=[row["solution"]] * G) for f in funcs])
            adv = r.sum(0) - r.sum(0).mean()
            forward = {**inputs, **given, "input_ids": seq}
            forward["attention_mask"] = torch.cat([inputs.attention_mask, m.long()], 1)
            lp = model.train()(**forward).logits[:, -c.shape[1] - 1 : -1].float().log_softmax(-1)
            lp = lp.gather(-1, c[:, :, None]).squeeze(-1)
            opt.zero_grad()
            (-(lp * adv[:, None] * m).sum() / m.sum()).backward()
            opt.step()
