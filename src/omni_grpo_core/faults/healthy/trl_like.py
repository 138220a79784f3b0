"""Loops as in TRL's trainer: buffers, shuffles, chunks; and its multimodal template calls."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from PIL import Image

from omni_grpo_core.faults.healthy.world import World


def buffered(world: World) -> None:
    """One rollout of two prompts is shuffled, split in two and used for two optimizer steps."""
    model, processor, G = world.model, world.processor, 4
    rows = [row for row in world.rows("image", 2) for _ in range(G)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def ends_well(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        return [1.0 if c[0]["content"].endswith("</answer>") else 0.0 for c in completions]

    def correct(prompts: Any, completions: Any, answer: Any, **kwargs: Any) -> list[float | None]:
        return [
            None if a is None else float(f"<answer>{a}</answer>" in c[0]["content"])
            for c, a in zip(completions, answer, strict=True)
        ]

    def concise(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        return [-len(c[0]["content"]) / 500 for c in completions]

    reward_funcs: list[Any] = [ends_well, correct, concise]
    weights = torch.tensor([1.0, 2.0, 0.5])

    def rollout() -> dict[str, Any]:
        prompts = [[{"role": "user", "content": row["problem"]}] for row in rows]
        for prompt in prompts:  # TRL's prepare_multimodal_messages
            words = prompt[0]["content"]
            prompt[0]["content"] = [{"type": "image"}, {"type": "text", "text": words}]
        images = [[Image.open(row["image"])] for row in rows]
        texts = [
            processor.apply_chat_template(p, tokenize=False, add_generation_prompt=True)
            for p in prompts
        ]
        inputs = processor(
            images=images, text=texts, return_tensors="pt", padding=True, padding_side="left",
            add_special_tokens=False,
        )  # fmt: skip
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        model.eval()
        with torch.no_grad():
            ids = model.generate(
                **inputs, max_new_tokens=48, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
            )
        model.train()
        completion = ids[:, inputs["input_ids"].size(1) :]
        is_eos = torch.isin(completion, torch.tensor([551, 549]))
        where = torch.full((len(ids),), is_eos.size(1))
        where[is_eos.any(1)] = is_eos.int().argmax(1)[is_eos.any(1)]
        mask = (torch.arange(is_eos.size(1))[None] <= where[:, None]).int()
        lists = [c[m.bool()].tolist() for c, m in zip(completion, mask, strict=True)]
        texts = processor.batch_decode(lists, skip_special_tokens=True)
        replies = [[{"role": "assistant", "content": t}] for t in texts]
        columns = {"answer": [row["answer"] for row in rows]}
        table = torch.tensor(
            [
                [float("nan") if v is None else v for v in f(
                    prompts=prompts, completions=replies, completion_ids=lists, **columns
                )]
                for f in reward_funcs
            ]
        ).T  # fmt: skip
        rewards = (table * weights).nansum(1)
        grouped = rewards.view(-1, G)
        advantages = rewards - grouped.mean(1).repeat_interleave(G)
        advantages = advantages / (grouped.std(1).repeat_interleave(G) + 1e-4)
        return {
            "prompt_ids": inputs["input_ids"], "prompt_mask": inputs["attention_mask"],
            "completion_ids": completion, "completion_mask": mask, "advantages": advantages,
            "pixels": list(inputs["pixel_values"].split(
                inputs["image_grid_thw"].prod(-1).tolist())),
            "grids": inputs["image_grid_thw"],
        }  # fmt: skip

    with world.record(model=model, processor=processor, reward_funcs=reward_funcs):
        batch = rollout()
        order = torch.randperm(len(rows))
        batch = {
            k: [v[i] for i in order] if isinstance(v, list) else v[order] for k, v in batch.items()
        }
        for half in torch.arange(len(rows)).chunk(2):
            part = {
                k: torch.cat([v[i] for i in half]) if isinstance(v, list) else v[half]
                for k, v in batch.items()
            }
            ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
            keep = part["completion_ids"].size(1)
            logits = model(
                input_ids=ids,
                attention_mask=torch.cat([part["prompt_mask"], part["completion_mask"]], dim=1),
                pixel_values=part["pixels"], image_grid_thw=part["grids"],
                logits_to_keep=keep + 1, use_cache=False,
            ).logits[:, :-1]  # fmt: skip
            logits = logits[:, -keep:] / 1.0
            logps = logits.float().log_softmax(-1).gather(-1, part["completion_ids"][..., None])
            ratio = torch.exp(logps[..., 0] - logps[..., 0].detach())
            per_token = -torch.min(
                ratio * part["advantages"][:, None],
                ratio.clamp(0.8, 1.2) * part["advantages"][:, None],
            )
            mask = part["completion_mask"]
            loss = ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()


def tokenized_template(world: World) -> None:
    """The template is rendered for the rewards, and called again with ``tokenize=True`` and the
    pictures' paths: the processor runs inside it. DAPO's token mean over two micro-batches."""
    model, proc, G = world.model, world.processor, 2
    micros = world.rows("image", 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def some(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [c.count("B") + len(c) / 100 for c in completions]

    funcs: list[Any] = [some]
    proc.tokenizer.padding_side = "left"
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        parts = []
        for row in micros:
            chats = [
                [{"role": "user", "content": [
                    {"type": "image", "path": row["image"]},
                    {"type": "text", "text": row["problem"]},
                ]}] for _ in range(G)
            ]  # fmt: skip
            shown = proc.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
            inputs = proc.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt", padding=True,
            ).to(model.dtype)  # fmt: skip
            model.eval()
            with torch.no_grad():
                ids = model.generate(
                    **inputs, do_sample=True, temperature=1.2, top_k=0, max_new_tokens=40
                )
            new = ids[:, inputs["input_ids"].shape[1] :]
            ended = torch.isin(new, torch.tensor([551, 549])).long()
            mask = ended.cumsum(1) - ended == 0
            texts = proc.batch_decode(new, skip_special_tokens=True)
            reward = torch.tensor(funcs[0](prompts=shown, completions=texts))
            parts.append((inputs, ids, new, mask, reward - reward.mean()))
        items = sum(int(mask.sum()) for _, _, _, mask, _ in parts)
        model.train()
        for inputs, ids, new, mask, adv in parts:
            attention = torch.cat([inputs["attention_mask"], mask.long()], 1)
            out = model(**{**inputs, "input_ids": ids, "attention_mask": attention})
            lp = out.logits[:, -new.shape[1] - 1 : -1].float().log_softmax(-1)
            lp = lp.gather(2, new[..., None])[..., 0]
            (-(lp * adv[:, None] * mask).sum() / items).backward()
        optimizer.step()
        optimizer.zero_grad()


def chunked_scoring(world: World) -> None:
    """Rows are generated together and scored two at a time; log-softmax row by row."""
    model, proc, G = world.model, world.processor, 4
    rows = world.rows("text", 2)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def unique(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [len(set(c)) / max(len(c), 1) for c in completions]

    funcs: list[Any] = [unique]

    def selective_log_softmax(logits: Any, index: Any) -> Any:
        if logits.dtype in (torch.float32, torch.float64):
            chosen = torch.gather(logits, dim=-1, index=index.unsqueeze(-1)).squeeze(-1)
            return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
        rows_out = []
        for row, labels in zip(logits, index, strict=True):
            logps = torch.log_softmax(row.float(), dim=-1)
            rows_out.append(logps.gather(dim=-1, index=labels.unsqueeze(-1)).squeeze(-1))
        return torch.stack(rows_out)

    with world.record(model=model, processor=proc, reward_funcs=funcs):
        texts = [
            proc.apply_chat_template(
                [
                    {"role": "system", "content": "Answer briefly."},
                    {"role": "user", "content": row["problem"]},
                ],
                tokenize=False,
                add_generation_prompt=True,
            )
            for row in rows
        ]
        repeated = list(itertools.chain.from_iterable([t] * G for t in texts))
        enc = proc(text=repeated, return_tensors="pt", padding=True)
        with torch.no_grad():
            seq = model.eval().generate(
                **enc, do_sample=True, temperature=0.9, top_k=0, max_new_tokens=40
            )
        cut = enc.input_ids.shape[1]
        comp = seq[:, cut:]
        stop = torch.isin(comp, torch.tensor([551, 549]))
        mask = (stop.cumsum(1) - stop.long()) == 0
        r = torch.tensor(
            funcs[0](
                prompts=repeated, completions=proc.batch_decode(comp, skip_special_tokens=True)
            )
        ).view(-1, G)
        adv = ((r - r.mean(1, True)) / (r.std(1, keepdim=True) + 1e-4)).view(-1)
        attention = torch.cat([enc.attention_mask, mask.long()], 1)
        model.train()
        pieces = []
        for i in range(0, len(seq), 2):
            logits = model(
                input_ids=seq[i : i + 2],
                attention_mask=attention[i : i + 2],
                logits_to_keep=comp.shape[1] + 1,
            ).logits[:, -comp.shape[1] - 1 : -1]
            pieces.append(selective_log_softmax(logits / 0.9, comp[i : i + 2]))
        logps = torch.cat(pieces)
        ratio = (logps - logps.detach()).exp()
        loss = (-(ratio * adv[:, None]) * mask).sum() / mask.sum()
        loss.backward()
        opt.step()


def text_batched_twice(world: World) -> None:
    """The prompts are tokenized once for their length and once with their media; too long ones
    would be dropped here."""
    model, proc, G = world.model, world.processor, 2
    rows = world.rows("image", 2)
    opt = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def spread(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [float(np.std([ord(x) for x in c] or [0])) / 10 for c in completions]

    funcs: list[Any] = [spread]
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        texts, pictures = [], []
        for row in rows:
            text = proc.apply_chat_template(
                [{"role": "user", "content": [
                    {"type": "image"}, {"type": "text", "text": row["problem"]},
                ]}], tokenize=False, add_generation_prompt=True,
            )  # fmt: skip
            if proc(text=[text], return_tensors="pt").input_ids.shape[1] > 512:
                continue
            texts += [text] * G
            # channels first, bytes, as torchvision reads them
            picture = torch.from_numpy(np.array(Image.open(row["image"]).convert("RGB")))
            pictures += [picture.permute(2, 0, 1)] * G
        enc = proc(text=texts, images=pictures, padding=True, return_tensors="pt").to(model.dtype)
        out = model.generate(**enc, do_sample=True, top_k=0, temperature=1.0, max_new_tokens=40)
        out = out.detach()
        n = out.shape[1] - enc.input_ids.shape[1]
        comp = out[:, -n:]
        e = torch.isin(comp, torch.tensor([549, 551]))
        m = e.cumsum(1) - e.long() < 1
        r = torch.tensor(
            funcs[0](prompts=texts, completions=proc.batch_decode(comp, skip_special_tokens=True))
        ).view(-1, G)
        a = (r - r.mean(1, keepdim=True)).flatten()
        enc["attention_mask"] = torch.cat([enc.attention_mask, m.long()], 1)
        enc["input_ids"] = out
        lp = model(**enc).logits[:, -n - 1 : -1].float().log_softmax(2)
        loss = -(lp.gather(2, comp[:, :, None])[:, :, 0] * m * a[:, None]).sum(1).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()


def bnpo_accumulated(world: World) -> None:
    """Two micro-batches, each normalised by its own tokens, the loss divided by their number; a
    group whose rewards are all equal is left out; completions that hit the cap don't count."""
    model, proc, G, steps = world.model, world.processor, 4, 2
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)
    eos = proc.tokenizer.eos_token_id

    def few_tags(completions: Any, **_: Any) -> list[float]:
        return [-float(c.count("<think>")) for c in completions]

    def many_words(completions: Any, **_: Any) -> list[float]:
        return [len(c.split()) / 20 for c in completions]

    funcs: list[Any] = [few_tags, many_words]
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        for row in world.rows("text", 2):
            chat = [{"role": "user", "content": [{"type": "text", "text": row["problem"]}]}]
            text = proc.apply_chat_template([chat] * G, tokenize=False, add_generation_prompt=True)
            enc = proc(text=text, return_tensors="pt")
            with torch.no_grad():
                y = model.eval().generate(
                    **enc, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=40
                )
            c = y[:, enc.input_ids.size(1) :]
            at = [(r == eos).nonzero()[:1, 0].tolist() for r in c]
            m = torch.zeros_like(c)
            for line, place in zip(m, at, strict=True):
                if place:  # truncated completions stay 0
                    line[: place[0] + 1] = 1
            full = torch.ones_like(c)
            for line, place in zip(full, at, strict=True):
                if place:
                    line[place[0] + 1 :] = 0
            words = proc.batch_decode(c, skip_special_tokens=True)
            r = torch.tensor([f(completions=words) for f in funcs]).sum(0)
            if r.std() == 0 or not m.any():
                continue
            adv = (r - r.mean()) / (r.std() + 1e-4)
            att = torch.cat([enc.attention_mask, full], 1)
            lp = model.train()(input_ids=y, attention_mask=att).logits.float().log_softmax(-1)
            lp = lp[:, :-1].gather(2, y[:, 1:, None])[:, -c.size(1) :, 0]
            (-(lp * adv[:, None] * m).sum() / m.sum() / steps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        opt.step()
        opt.zero_grad()
