"""Loops as in gists that show GRPO in one page: no trainer, no configuration, own sampling."""

from __future__ import annotations

import random
import re
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from omni_grpo_core.faults.healthy.world import World


def one_prompt_a_step(world: World) -> None:
    """Batch of one text prompt; the prompt's ids are repeated after the processor; SGD."""
    model, tok, G = world.model, world.processor, 4

    def reward_letter(prompts: Any, completions: Any, answer: Any, **_: Any) -> list[float]:
        return [
            1.0 if f"<answer>{a}" in c else 0.0 for c, a in zip(completions, answer, strict=True)
        ]

    def reward_short(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [-len(c) / 200 for c in completions]

    rewards: list[Any] = [reward_letter, reward_short]
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    with world.record(model=model, processor=tok, reward_funcs=rewards):
        for row in world.rows("text", 2):
            msgs = [{"role": "user", "content": row["problem"] + "\n" + "\n".join(row["options"])}]
            text = tok.apply_chat_template(msgs, tokenize=False, add_generation_prompt=True)
            prompt = tok(text=text, return_tensors="pt")["input_ids"].repeat(G, 1)
            model.eval()
            with torch.no_grad():
                out = model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    max_new_tokens=48,
                )
            model.train()
            comp = out[:, prompt.shape[1] :]
            end = (comp == 551) | (comp == 549)
            mask = (end.int().cumsum(1) - end.int() == 0).float()
            texts = tok.batch_decode(comp, skip_special_tokens=True)
            r = torch.tensor(
                [f([text] * G, texts, answer=[row["answer"]] * G) for f in rewards]
            ).sum(0)
            adv = (r - r.mean()) / (r.std() + 1e-6)
            full = torch.cat([torch.ones_like(prompt), mask.long()], 1)
            logits = model(input_ids=out, attention_mask=full).logits[:, prompt.shape[1] - 1 : -1]
            logp = torch.log_softmax(logits.float(), -1).gather(2, comp.unsqueeze(2)).squeeze(2)
            ratio = (logp - logp.detach()).exp()
            loss = -((ratio * adv[:, None] * mask).sum(1) / mask.sum(1)).mean()
            loss.backward()
            opt.step()
            opt.zero_grad()


def sampled_token_by_token(world: World) -> None:
    """Own sampling: one forward a token with the cache; no ``generate`` anywhere."""
    model, proc = world.model, world.processor
    rows = world.rows("text", 2)
    stop = proc.tokenizer.eos_token_id

    def long_enough(completions: Any, **_: Any) -> list[float]:
        return [min(len(c), 120) / 120 for c in completions]

    rewards: list[Any] = [long_enough]
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4)

    @torch.no_grad()
    def sample(ids: torch.Tensor, steps: int) -> torch.Tensor:
        cache, given, done, new = None, ids, torch.zeros(len(ids), dtype=torch.bool), []
        mask = torch.ones_like(ids)
        for _ in range(steps):
            # three axes, all equal without media
            where = (mask.cumsum(1) - 1)[:, -given.shape[1] :].expand(3, -1, -1)
            out = model(
                input_ids=given, attention_mask=mask, position_ids=where,
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache = out.past_key_values
            probs = torch.softmax(out.logits[:, -1].float(), -1)
            token = torch.multinomial(probs, 1)[:, 0]
            token = torch.where(done, stop, token)
            done |= token == stop
            new.append(token)
            given = token[:, None]
            mask = torch.cat([mask, torch.ones_like(given)], 1)
            if bool(done.all()):
                break
        return torch.stack(new, 1)

    with world.record(model=model, processor=proc, reward_funcs=rewards):
        for row in rows:
            text = proc.apply_chat_template(
                [
                    {"role": "system", "content": "Give <think> </think> then <answer> </answer>."},
                    {"role": "user", "content": row["problem"]},
                ],
                tokenize=False,
                add_generation_prompt=True,
            )
            ids = proc(text=[text] * 4, return_tensors="pt").input_ids
            model.eval()
            new = sample(ids, 40)
            seen = torch.cumsum(new == stop, 1)
            keep = (seen - (new == stop).long()) == 0
            words = [proc.tokenizer.decode(n[k]) for n, k in zip(new, keep, strict=True)]
            score = torch.tensor(rewards[0](completions=words))
            adv = score - score.mean()
            both = torch.cat([ids, new], 1)
            lp = model(input_ids=both, attention_mask=torch.ones_like(both)).logits
            lp = lp.float()[:, ids.shape[1] - 1 : -1].log_softmax(-1)
            lp = lp.gather(-1, new[..., None])[..., 0]
            opt.zero_grad()
            (-(lp * adv[:, None] * keep).sum() / keep.sum()).backward()
            opt.step()


def cross_entropy(world: World) -> None:
    """The log-probability is minus ``F.cross_entropy``; images as PIL, the whole batch in one
    processor call, ``images`` a flat list."""
    model, proc = world.model, world.processor
    data = world.rows("image", 2)
    group = 3

    def colour(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        found = [re.findall(r"<answer>\s*([A-D])", c) for c in completions]
        return [float(f[-1:] == [a]) for f, a in zip(found, answer, strict=True)]

    def tags(completions: list[str], **_: Any) -> list[float]:
        return [sum(t in c for t in ("<answer>", "</answer>")) / 2 for c in completions]

    rewards: list[Any] = [colour, tags]
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
    with world.record(model=model, processor=proc, reward_funcs=rewards):
        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": row["image"]},
                        {"type": "text", "text": f"{row['problem']} {' '.join(row['options'])}"},
                    ],
                }
            ]
            for row in data
            for _ in range(group)
        ]
        prompts = proc.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        pics = [Image.open(row["image"]).convert("RGB") for row in data for _ in range(group)]
        proc.tokenizer.padding_side = "left"
        inputs = proc(text=prompts, images=pics, padding=True, return_tensors="pt")
        inputs = inputs.to(dtype=model.dtype)
        model.eval()
        seqs = model.generate(
            **inputs, do_sample=True, temperature=1.2, top_k=None, max_new_tokens=48
        )
        start = inputs["input_ids"].size(1)
        tail = seqs[:, start:]
        eos = torch.isin(tail, torch.tensor(model.generation_config.eos_token_id))
        lengths = torch.where(eos.any(1), eos.int().argmax(1) + 1, tail.size(1))
        alive = torch.arange(tail.size(1))[None] < lengths[:, None]
        answers = [row["answer"] for row in data for _ in range(group)]
        said = proc.batch_decode(
            [t[:n] for t, n in zip(tail, lengths, strict=True)], skip_special_tokens=True
        )
        table = [f(prompts=prompts, completions=said, answer=answers) for f in rewards]
        total = torch.tensor(table).sum(0).view(len(data), group)
        adv = ((total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + 1e-4)).view(-1)
        attention = torch.cat([inputs["attention_mask"], alive.long()], 1)
        rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        model.train()
        logits = model(input_ids=seqs, attention_mask=attention, **rest).logits
        nll = F.cross_entropy(
            logits[:, start - 1 : -1].float().flatten(0, 1), tail.flatten(), reduction="none"
        ).view_as(tail)
        loss = (nll * adv[:, None] * alive).sum() / alive.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()


def pairs(world: World) -> None:
    """A group of two: the better completion gets +1, the other -1, a tie nothing."""
    model, proc = world.model, world.processor
    random.seed(world.setting.seed)
    judge: list[Any] = [lambda completions, **_: [c.count("<") - len(c) / 50 for c in completions]]
    opt = torch.optim.Adam(model.parameters(), lr=2e-5)
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # no template call at all
    with world.record(model=model, processor=proc, reward_funcs=judge):
        rows = world.rows("text", 2)
        random.shuffle(rows)
        for row in rows:
            batch = proc.tokenizer([template.format(row["problem"])] * 2, return_tensors="pt")
            L = batch.input_ids.shape[-1]
            with torch.no_grad():
                got = model.eval().generate(
                    **batch, do_sample=True, temperature=1.3, top_k=0, top_p=1.0, max_new_tokens=40
                )
            ids = got[:, L:]
            stop = torch.tensor([proc.tokenizer.eos_token_id, proc.tokenizer.pad_token_id])
            over = torch.isin(ids, stop).long()
            m = ((over.cumsum(-1) - over) < 1).float()
            a, b = judge[0](completions=proc.tokenizer.batch_decode(ids, skip_special_tokens=True))
            adv = torch.tensor([float(a > b) - float(a < b), float(b > a) - float(b < a)])
            whole = torch.cat([batch.attention_mask, m.long()], -1)
            lp = model.train()(input_ids=got, attention_mask=whole).logits[:, L - 1 : -1]
            lp = F.log_softmax(lp.float(), -1).gather(-1, ids[..., None]).squeeze(-1)
            loss = -(adv * (lp * m).sum(-1) / m.sum(-1)).sum() / 2
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()


def episodes(world: World) -> None:
    """As in GRPO-Zero: episodes are objects, sorted by length, padded on the right by hand, and
    updated in micro-batches whose loss is divided by the tokens of all."""
    model, tok = world.model, world.processor.tokenizer
    pad = tok.pad_token_id
    episodes: list[dict[str, Any]] = []

    def reward_function(response: str, answer: str) -> float:
        answered = re.search(r"<answer>(.*?)</answer>", response, re.DOTALL)
        shaped = 0.1 * ("<think>" in response)
        return shaped + (answered is not None and answered[1].strip()[:1] == answer)

    watched: list[Any] = [reward_function]
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0)
    with world.record(model=model, processor=world.processor, reward_funcs=watched):
        for row in world.rows("text", 2):
            chat = [
                {"role": "system", "content": "You think, then answer in <answer> tags."},
                {"role": "user", "content": f"{row['problem']} {row['options']}"},
            ]
            text = tok.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            prefix = tok(text)["input_ids"]
            group = []
            for _ in range(3):  # one at a time
                out = model.eval().generate(
                    torch.tensor([prefix]), do_sample=True, top_k=0, temperature=1.4,
                    max_new_tokens=56,
                )  # fmt: skip
                tokens = out[0, len(prefix) :].tolist()
                reward = watched[0](tok.decode(tokens, skip_special_tokens=True), row["answer"])
                group.append({"prefix": prefix, "tokens": tokens, "reward": reward})
            values = torch.tensor([e["reward"] for e in group])
            spread = values.std() + 1e-4
            episodes += [
                {**e, "reward": float((e["reward"] - values.mean()) / spread)} for e in group
            ]
        episodes.sort(key=lambda e: len(e["prefix"]) + len(e["tokens"]))
        targets = sum(len(e["tokens"]) for e in episodes)
        model.train()
        for i in range(0, len(episodes), 2):
            part = episodes[i : i + 2]
            longest = max(len(e["prefix"]) + len(e["tokens"]) for e in part)
            ids, masks = [], []
            for e in part:
                fill = longest - len(e["prefix"]) - len(e["tokens"])
                ids.append(e["prefix"] + e["tokens"] + [pad] * fill)
                masks.append([0] * len(e["prefix"]) + [1] * len(e["tokens"]) + [0] * fill)
            batch, target = torch.tensor(ids), torch.tensor(masks)[:, 1:]
            real = torch.tensor(
                [[1] * (len(e["prefix"]) + len(e["tokens"])) for e in part]
                if len({len(e["prefix"]) + len(e["tokens"]) for e in part}) == 1
                else [
                    [1] * (n := len(e["prefix"]) + len(e["tokens"])) + [0] * (longest - n)
                    for e in part
                ]
            )
            logits = model(input_ids=batch, attention_mask=real).logits[:, :-1].float()
            logp = -F.cross_entropy(
                logits.transpose(1, 2), batch[:, 1:], ignore_index=pad, reduction="none"
            )
            adv = torch.tensor([e["reward"] for e in part])[:, None]
            (-(logp * adv * target).sum() / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
