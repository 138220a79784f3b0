"""Loops over pictures: several a row, in every form a processor takes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from PIL import Image
from qwen_omni_utils import process_mm_info

from omni_grpo_core.faults.healthy.world import World


def two_a_row(world: World) -> None:
    """Rows of two pictures and of one in one call; rewards in several ranges; vLLM-like lists."""
    model, proc, G = world.model, world.processor, 2
    one, two = (row["image"] for row in world.rows("image", 2))
    rows = [
        {"images": [one, two], "question": "Are both bars of one colour?", "label": "no"},
        {"images": [two], "question": "Which colour is it?", "label": "green"},
    ]
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def label(prompts: Any, completions: Any, label: Any, **_: Any) -> list[float]:
        return [10.0 * (name in c.lower()) for name, c in zip(label, completions, strict=True)]

    def shape(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [float(c.startswith("<context>")) - float("</" not in c) for c in completions]

    funcs: list[Any] = [label, shape]
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        flat = [row for row in rows for _ in range(G)]
        texts = [
            proc.apply_chat_template(
                [{"role": "user", "content": [
                    *({"type": "image", "image": path} for path in row["images"]),
                    {"type": "text", "text": row["question"]},
                ]}], tokenize=False, add_generation_prompt=True,
            ) for row in flat
        ]  # fmt: skip
        pictures = [Image.open(path).convert("RGB") for row in flat for path in row["images"]]
        enc = proc(text=texts, images=pictures, padding=True, return_tensors="pt").to(model.dtype)
        with torch.no_grad():
            out = model.eval().generate(
                **enc, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=40
            )
        P = enc["input_ids"].shape[1]
        comp = out[:, P:]
        done = torch.isin(comp, torch.tensor([551, 549])).long()
        mask = done.cumsum(1) - done == 0
        said = proc.batch_decode(comp, skip_special_tokens=True)
        columns = {"label": [row["label"] for row in flat]}
        r = torch.tensor([f(texts, said, **columns) for f in funcs]).sum(0).view(-1, G)
        adv = (r - r.mean(1, keepdim=True)).view(-1) / 10
        enc["attention_mask"] = torch.cat([enc["attention_mask"], mask.long()], 1)
        enc["input_ids"] = out
        lp = model.train()(**enc).logits[:, P - 1 : -1].float().log_softmax(-1)
        lp = lp.gather(-1, comp[..., None])[..., 0]
        opt.zero_grad()
        (-(lp * adv[:, None] * mask).sum(1) / mask.sum(1)).mean().backward()
        opt.step()


def generated_in_micro_batches(world: World) -> None:
    """All prompts are rendered and processed at once; generation runs two rows at a time, the
    completions are padded to one width, and scoring runs three rows at a time."""
    model, proc, G = world.model, world.processor, 3
    rows = [row for row in world.rows("image", 2) for _ in range(G)]
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)
    pad = proc.tokenizer.pad_token_id

    def letter(prompts: Any, completions: Any, answer: Any, **_: Any) -> list[float]:
        return [
            float(c[-10:].count(a)) + len(c) / 300 for c, a in zip(completions, answer, strict=True)
        ]

    funcs: list[Any] = [letter]
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        chats = [
            [{"role": "user", "content": [
                {"type": "text", "text": row["problem"]}, {"type": "image", "image": row["image"]},
            ]}] for row in rows
        ]  # fmt: skip
        texts = proc.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        _, images, _ = process_mm_info(chats, use_audio_in_video=False)
        enc = proc(text=texts, images=images, padding=True, return_tensors="pt", do_resize=False)
        pixels = enc["pixel_values"].to(model.dtype)
        patches = enc["image_grid_thw"].prod(1)
        ends = patches.cumsum(0)

        def part(start: int, stop: int) -> dict[str, Any]:
            return {
                "pixel_values": pixels[int(ends[start] - patches[start]) : int(ends[stop - 1])],
                "image_grid_thw": enc["image_grid_thw"][start:stop],
            }

        P = enc["input_ids"].shape[1]
        pieces = []
        model.eval()
        for i in range(0, len(rows), 2):
            with torch.no_grad():
                got = model.generate(
                    input_ids=enc["input_ids"][i : i + 2],
                    attention_mask=enc["attention_mask"][i : i + 2],
                    **part(i, i + 2), do_sample=True, temperature=1.0, top_k=0, max_new_tokens=40,
                )  # fmt: skip
            pieces += list(got[:, P:])
        width = max(len(p) for p in pieces)
        comp = torch.stack(
            [torch.nn.functional.pad(p, (0, width - len(p)), value=pad) for p in pieces]
        )
        end = torch.isin(comp, torch.tensor([551, 549])).long()
        mask = end.cumsum(1) - end == 0
        said = proc.batch_decode(comp, skip_special_tokens=True)
        r = torch.tensor(funcs[0](texts, said, answer=[row["answer"] for row in rows])).view(-1, G)
        adv = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)).view(-1)
        ids = torch.cat([enc["input_ids"], comp], 1)
        attention = torch.cat([enc["attention_mask"], mask.long()], 1)
        model.train()
        for i in range(0, len(rows), 3):
            at = slice(i, i + 3)
            lg = model(input_ids=ids[at], attention_mask=attention[at], **part(i, i + 3)).logits
            lp = lg[:, P - 1 : -1].float().log_softmax(-1).gather(-1, comp[at, :, None])[..., 0]
            loss = -((lp * adv[at, None] * mask[at]).sum(1) / mask[at].sum(1)).sum() / len(rows)
            loss.backward()
        opt.step()
        opt.zero_grad()


def written_as_data_urls(world: World) -> None:
    """The conversation holds the pictures themselves; rows come from JSON lines; numpy pictures;
    the reward reads JSON (a box) as grounding tasks do."""
    model, proc, G = world.model, world.processor, 4
    lines = [
        json.dumps({"img": r["image"], "bbox": [0, 0, 28, 28]}) for r in world.rows("image", 2)
    ]
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def iou(prompts: Any, completions: Any, solution: Any, **_: Any) -> list[float]:
        out = []
        for text, gold in zip(completions, solution, strict=True):
            try:
                x0, y0, x1, y1 = json.loads(text[text.index("[") : text.index("]") + 1])
                inner = max(0, min(x1, gold[2]) - max(x0, gold[0]))
                out.append(inner * max(0, min(y1, gold[3]) - max(y0, gold[1])) / 784)
            except (ValueError, TypeError):
                out.append(0.0)
        return out

    def digits(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [sum(x.isdigit() for x in c) * 0.1 - len(c) * 0.001 for c in completions]

    funcs: list[Any] = [iou, digits]
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        for line in lines:
            row = json.loads(line)
            picture = Image.open(row["img"]).convert("RGB").resize((84, 84))
            chat = [{"role": "user", "content": [
                {"type": "image", "image": picture},
                {"type": "text", "text": "Give the bar's box as JSON [x0, y0, x1, y1]."},
            ]}]  # fmt: skip
            text = proc.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            enc = proc(text=[text] * G, images=[np.array(picture)] * G, return_tensors="pt")
            enc = enc.to(model.dtype)
            with torch.no_grad():
                out = model.eval().generate(
                    **enc, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=40
                )
            P = enc["input_ids"].shape[1]
            comp = out[:, P:]
            stop = torch.isin(comp, torch.tensor([551, 549])).long()
            mask = stop.cumsum(1) - stop == 0
            said = proc.batch_decode(comp, skip_special_tokens=True)
            r = torch.tensor([f([text] * G, said, solution=[row["bbox"]] * G) for f in funcs]).sum(
                0
            )
            adv = (r - r.mean()) / (r.std() + 1e-4)
            enc["attention_mask"] = torch.cat([enc["attention_mask"], mask.long()], 1)
            enc["input_ids"] = out
            lp = model.train()(**enc, use_cache=False).logits[:, P - 1 : -1].float()
            lp = lp.log_softmax(-1).gather(-1, comp[..., None])[..., 0]
            opt.zero_grad()
            (-(lp * adv[:, None] * mask).sum(1) / mask.sum(1)).mean().backward()
            opt.step()
