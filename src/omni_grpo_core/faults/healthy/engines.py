"""Loops built like larger trainers: data loaders, workers, experience buffers, templates of their
own."""

from __future__ import annotations

import asyncio
import collections
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from omni_grpo_core.faults.healthy.world import World


class Rows(Dataset[Any]):
    """The data set of ``processor_in_loader``: processed when it is drawn."""

    def __init__(self, rows: Sequence[dict[str, Any]], processor: Any) -> None:
        self.rows, self.processor = rows, processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        chat = [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": row["problem"]}],
            }
        ]
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        enc = self.processor(text=text, images=Image.open(row["image"]), return_tensors="pt")
        return {**enc, "row": row}


def processor_in_loader(world: World) -> None:
    """Rows are processed in a loader's workers, where no recorder sees them."""
    model, proc, G = world.model, world.processor, 4
    loader = DataLoader(
        Rows(world.rows("image", 2), proc), batch_size=1, collate_fn=lambda items: items[0],
        num_workers=1, multiprocessing_context="fork",
    )  # fmt: skip
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def wordy(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [len(c.split()) / 10 for c in completions]

    funcs: list[Any] = [wordy]
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        for item in loader:
            ids = item["input_ids"].repeat(G, 1)
            media = {
                "pixel_values": item["pixel_values"].repeat(G, 1).to(model.dtype),
                "image_grid_thw": item["image_grid_thw"].repeat(G, 1),
            }
            with torch.no_grad():
                out = model.eval().generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), **media, do_sample=True,
                    temperature=1.0, top_k=0, max_new_tokens=40,
                )  # fmt: skip
            comp = out[:, ids.shape[1] :]
            e = torch.isin(comp, torch.tensor([551, 549])).long()
            m = e.cumsum(1) - e == 0
            said = proc.batch_decode(comp, skip_special_tokens=True)
            r = torch.tensor(funcs[0]([item["row"]["problem"]] * G, said))
            am = torch.cat([torch.ones_like(ids), m.long()], 1)
            lp = model.train()(input_ids=out, attention_mask=am, **media).logits
            lp = lp[:, ids.shape[1] - 1 : -1].float().log_softmax(-1).gather(-1, comp[..., None])
            loss = -(lp[..., 0] * (r - r.mean())[:, None] * m).sum() / m.sum()
            opt.zero_grad()
            loss.backward()
            opt.step()


@dataclass
class Experience:
    """One row of ``experience_buffer``."""

    prompt: torch.Tensor
    response: torch.Tensor
    old: torch.Tensor
    reward: float
    group: int
    advantage: float = 0.0


@dataclass
class Buffer:
    """``experience_buffer``'s rows, with group statistics."""

    rows: list[Experience] = field(default_factory=list)

    def finish(self) -> None:
        by_group = collections.defaultdict(list)
        for row in self.rows:
            by_group[row.group].append(row)
        for members in by_group.values():
            values = np.array([m.reward for m in members])
            for m in members:
                m.advantage = float((m.reward - values.mean()) / (values.std() + 1e-6))


def experience_buffer(world: World) -> None:
    """As in verl: prompts padded left and responses right to fixed lengths, two epochs of two
    shuffled mini-batches each on one rollout, position ids made from the mask."""
    model, proc, G, PROMPT, RESPONSE = world.model, world.processor, 4, 80, 40
    tok = proc.tokenizer
    pad, rng = tok.pad_token_id, np.random.default_rng(world.setting.seed)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def compute_score(solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
        if "<answer>" not in solution_str:
            return -1.0 + 0.001 * len(solution_str)
        return float(solution_str.split("<answer>")[1].startswith(ground_truth))

    funcs: list[Any] = [compute_score]

    def fixed(rows: list[Experience]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids = torch.full((len(rows), PROMPT + RESPONSE), pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            p, n = len(row.prompt), len(row.response)
            ids[i, PROMPT - p : PROMPT + n] = torch.cat([row.prompt, row.response])
            mask[i, PROMPT - p : PROMPT + n] = 1
        return ids, mask, torch.clip(mask.cumsum(1) - 1, min=0)

    def forward(rows: list[Experience]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask, where = fixed(rows)
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=where.expand(3, -1, -1),
            use_cache=False,
        ).logits[:, PROMPT - 1 : -1]
        lp = torch.log_softmax(logits.float(), -1).gather(-1, ids[:, PROMPT:, None])[..., 0]
        return lp, mask[:, PROMPT:]

    with world.record(model=model, processor=proc, reward_funcs=funcs):
        buffer = Buffer()
        model.eval()
        for group, row in enumerate(world.rows("text", 2)):
            text = tok.apply_chat_template(
                [{"role": "user", "content": row["problem"]}], tokenize=False,
                add_generation_prompt=True,
            )  # fmt: skip
            prompt = tok(text, return_tensors="pt", add_special_tokens=False).input_ids
            out = model.generate(
                prompt.repeat(G, 1), attention_mask=torch.ones_like(prompt).repeat(G, 1),
                do_sample=True, temperature=1.0, top_k=0, max_new_tokens=RESPONSE,
            ).detach()[:, prompt.shape[1] :]  # fmt: skip
            for line in out:
                ends = torch.isin(line, torch.tensor([551, 549])).nonzero()
                n = int(ends[0]) + 1 if len(ends) else len(line)
                words = tok.decode(line[:n], skip_special_tokens=True)
                reward = funcs[0](words, row["answer"])
                buffer.rows.append(Experience(prompt[0], line[:n], torch.empty(0), reward, group))
        with torch.no_grad():
            old, held = forward(buffer.rows)
        for row_, lp, keep in zip(buffer.rows, old, held, strict=True):
            row_.old = lp[keep.bool()]
        buffer.finish()
        model.train()
        for _ in range(2):
            order = rng.permutation(len(buffer.rows))
            for half in np.split(order, 2):
                rows = [buffer.rows[i] for i in half]
                new, keep = forward(rows)
                was = pad_sequence([r.old for r in rows], True)
                was = torch.nn.functional.pad(was, (0, new.shape[1] - was.shape[1]))
                adv = torch.tensor([r.advantage for r in rows])[:, None]
                ratio = torch.exp((new - was).clamp(-20, 20))
                loss = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.28))
                loss = (loss * keep).sum() / keep.sum()
                opt.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()


def rendered_by_hand(world: World) -> None:
    """As in ms-swift: an own template writes ChatML, encodes each row alone with its pictures, and
    a collator pads on the left; texts reach the rewards through an asynchronous call."""
    model, proc, G = world.model, world.processor, 3
    tok = proc.tokenizer
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)

    async def remote(completions: Any, **_: Any) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(c) % 7) for c in completions]

    async def second(completions: Any, **_: Any) -> list[float]:
        return [c.count("<") / 10 for c in completions]

    funcs: list[Any] = [remote, second]

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"<|vision_bos|><|IMAGE|><|vision_eos|>{row['problem']}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        media = proc.image_processor(images=[Image.open(row["image"])], return_tensors="pt")
        tokens = int(media["image_grid_thw"].prod()) // 4
        ids = tok(text.replace("<|IMAGE|>", "<|IMAGE|>" * tokens))["input_ids"]
        return {"input_ids": ids, **media}

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(b["input_ids"]) for b in batch)
        gaps = [longest - len(b["input_ids"]) for b in batch]
        return {
            "input_ids": torch.tensor(
                [[tok.pad_token_id] * g + b["input_ids"] for g, b in zip(gaps, batch, strict=True)]
            ),
            "attention_mask": torch.tensor([[0] * g + [1] * (longest - g) for g in gaps]),
            "pixel_values": torch.cat([b["pixel_values"] for b in batch]).to(model.dtype),
            "image_grid_thw": torch.cat([b["image_grid_thw"] for b in batch]),
        }

    async def all_rewards(words: list[str]) -> torch.Tensor:
        return torch.tensor(await asyncio.gather(*(f(completions=words) for f in funcs)))

    with world.record(model=model, processor=proc, reward_funcs=funcs):
        rows = [encode(r) for r in world.rows("image", 2) for _ in range(G)]
        batch = collate(rows)
        with torch.no_grad():
            out = model.eval().generate(
                **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=40
            )
        P = batch["input_ids"].shape[1]
        comp = out[:, P:]
        e = torch.isin(comp, torch.tensor([551, 549])).long()
        m = e.cumsum(1) - e == 0
        words = [tok.decode(c[k], skip_special_tokens=True) for c, k in zip(comp, m, strict=True)]
        r = (asyncio.run(all_rewards(words)) * torch.tensor([[0.1], [1.0]])).sum(0).view(-1, G)
        adv = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)).view(-1)
        # encoded a second time, now with the completion
        again = [
            {**row, "input_ids": row["input_ids"] + c[k].tolist()}
            for row, c, k in zip(rows, comp, m, strict=True)
        ]
        scored = collate(again)
        lp = model.train()(**scored).logits[:, :-1].float().log_softmax(-1)
        lp = lp.gather(-1, scored["input_ids"][:, 1:, None])[..., 0]
        counts = m.sum(1)
        places = torch.arange(lp.shape[1])[None] >= lp.shape[1] - counts[:, None]
        loss = -((lp * places).sum(1) / counts * adv).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()


def functional(world: World) -> None:
    """Small pure functions, no classes, no repeated prompts: each completion is sampled alone, and
    each scored alone; the gradients add up."""
    model, proc, G = world.model, world.processor, 4
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def render(row: dict[str, Any]) -> str:
        chat = [{"role": "user", "content": f"{row['problem']} {row['options']}"}]
        return str(proc.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    def encode(text: str) -> Any:
        return proc(text=text, return_tensors="pt")["input_ids"]

    @torch.no_grad()
    def sample(ids: Any) -> Any:
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 40}
        return model.eval().generate(ids, attention_mask=torch.ones_like(ids), **how)[
            0, ids.shape[1] :
        ]

    def score(ids: Any, completion: Any) -> Any:
        both = torch.cat([ids[0], completion])[None]
        logits = model.train()(both, attention_mask=torch.ones_like(both)).logits[0, :-1].float()
        chosen = logits.log_softmax(-1)[torch.arange(both.shape[1] - 1), both[0, 1:]]
        return chosen[-len(completion) :].mean()

    def judge(completion: str, answer: str) -> float:
        return 1.0 if answer in completion[-20:] else -0.1 * (len(completion) > 100)

    funcs: list[Any] = [judge]
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        for row in world.rows("text", 2):
            ids = encode(render(row))
            tokens = [sample(ids) for _ in range(G)]
            texts = map(functools.partial(proc.tokenizer.decode, skip_special_tokens=True), tokens)
            rewards = np.array([funcs[0](text, row["answer"]) for text in texts])
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
            for completion, advantage in zip(tokens, advantages, strict=True):
                (-float(advantage) * score(ids, completion) / G).backward()
            opt.step()
            opt.zero_grad()
