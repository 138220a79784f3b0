"""Loops that differ in what a reward is compared with: RLOO, ReMax, REINFORCE++, Dr. GRPO, GSPO."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from omni_grpo_core.faults.healthy.world import World


def rloo(world: World) -> None:
    """Leave-one-out baseline, no scaling, no clipping: plain REINFORCE on the summed log-prob."""
    policy, processor, k = world.model, world.processor, 4
    rows = world.rows("text", 2)

    def right_letter(prompts: Any, completions: Any, letters: Any) -> list[float]:
        """-1, 0 or 1: no answer, a wrong one, the right one."""
        scores = []
        for text, letter in zip(completions, letters, strict=True):
            found = re.search(r"([A-D])</answer>", text)
            scores.append(-1.0 if found is None else float(found[1] == letter))
        return scores

    reward_fns: list[Any] = [right_letter]
    optim = torch.optim.RMSprop(policy.parameters(), lr=1e-5)
    queries = [
        [
            {"role": "system", "content": "First <think>reason</think>, then <answer>X</answer>."},
            {"role": "user", "content": "\n".join([r["problem"], *r["options"]])},
        ]
        for r in rows
    ]
    with world.record(model=policy, processor=processor, reward_funcs=reward_fns):
        strings = processor.apply_chat_template(queries, tokenize=False, add_generation_prompt=True)
        encoded = processor(text=strings, padding=True, padding_side="left", return_tensors="pt")
        policy.eval()
        with torch.no_grad():
            responses = policy.generate(
                **encoded, do_sample=True, top_k=0, temperature=1.0, max_new_tokens=50,
                num_return_sequences=k,
            )[:, encoded["input_ids"].shape[1] :]  # fmt: skip
        context = encoded["input_ids"].repeat_interleave(k, 0)
        context_mask = encoded["attention_mask"].repeat_interleave(k, 0)
        finished = (responses == processor.tokenizer.eos_token_id) | (
            responses == processor.tokenizer.pad_token_id
        )
        after = finished.cumsum(1) > 1
        decoded = [
            processor.tokenizer.decode(r[~a], skip_special_tokens=True)
            for r, a in zip(responses, after, strict=True)
        ]
        letters = [r["answer"] for r in rows for _ in range(k)]
        scores = torch.tensor(
            reward_fns[0]([s for s in strings for _ in range(k)], decoded, letters=letters)
        ).reshape(-1, k)
        baseline = (scores.sum(1, keepdim=True) - scores) / (k - 1)
        advantages = (scores - baseline).flatten()
        out = policy(
            input_ids=torch.cat((context, responses), 1),
            attention_mask=torch.cat((context_mask, (~after).long()), 1),
        )
        logits = out.logits[:, context.shape[1] - 1 : -1].float()
        chosen = torch.gather(logits.log_softmax(-1), 2, responses[..., None])[..., 0]
        sequence = chosen.masked_fill(after, 0).sum(1)
        loss = -(advantages * sequence).mean()
        optim.zero_grad()
        loss.backward()
        optim.step()


def remax(world: World) -> None:
    """ReMax: the reward of a greedy completion is the baseline of a sampled one; two calls of
    ``generate``, the greedy one never scored by the model."""
    model, proc = world.model, world.processor
    rows = world.rows("image", 2)
    eos = torch.tensor([551, 549])

    class Judge:
        """A reward as a plain object, called by keyword."""

        __name__ = "letter_judge"

        def __call__(self, *, completions: Any, answer: Any, **_: Any) -> Any:
            hits = [f"{a}</answer>" in c for c, a in zip(completions, answer, strict=True)]
            lengths = [len(c) for c in completions]
            return np.asarray(hits, dtype=np.float64) - np.asarray(lengths) / 1000

    judges: list[Any] = [Judge()]
    opt = torch.optim.AdamW(model.parameters(), lr=3e-5)

    def speak(inputs: Any, **how: Any) -> tuple[Any, Any, list[str]]:
        with torch.no_grad():
            whole = model.generate(**inputs, max_new_tokens=48, **how)
        new = whole[:, inputs["input_ids"].shape[1] :]
        stop = torch.isin(new, eos)
        keep = stop.cumsum(1) - stop.long() == 0
        words = [
            proc.decode(n[k].tolist(), skip_special_tokens=True)
            for n, k in zip(new, keep, strict=True)
        ]
        return whole, keep, words

    with world.record(model=model, processor=proc, reward_funcs=judges):
        texts = [
            proc.apply_chat_template(
                [{"role": "user", "content": [
                    {"type": "image", "image": r["image"]},
                    {"type": "text", "text": "Options: " + ", ".join(r["options"])},
                    {"type": "text", "text": r["problem"]},
                ]}], tokenize=False, add_generation_prompt=True,
            ) for r in rows
        ]  # fmt: skip
        pictures = [np.asarray(Image.open(r["image"]).convert("RGB")) for r in rows]
        inputs = proc(text=texts, images=pictures, return_tensors="pt", padding="longest")
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        model.eval()
        _, _, best = speak(inputs, do_sample=False)
        whole, keep, sampled = speak(inputs, do_sample=True, temperature=1.0, top_k=0)
        gold = [r["answer"] for r in rows]
        gain = judges[0](completions=sampled, answer=gold) - judges[0](
            completions=best, answer=gold
        )
        model.train()
        scores = {**inputs, "input_ids": whole}
        scores["attention_mask"] = torch.cat([inputs["attention_mask"], keep.long()], 1)
        n = keep.shape[1]
        lp = model(**scores).logits[:, -n - 1 : -1].float().log_softmax(-1)
        lp = lp.gather(2, whole[:, -n:, None]).squeeze(2) * keep
        (-(torch.as_tensor(gain).float()[:, None] * lp).sum() / len(rows)).backward()
        opt.step()


def reinforce_plus_plus(world: World) -> None:
    """The group's mean is subtracted and the whole batch's deviation divides; token mean; a KL
    penalty (k2) in the loss; the reference shares the frozen towers of a copy."""
    model, proc, n = world.model, world.processor, 4
    import copy

    ref = copy.deepcopy(model).eval()
    for p in ref.parameters():
        p.requires_grad = False
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5, eps=1e-5)

    def overlap(prompts: Any, completions: Any, solution: Any, **_: Any) -> list[float]:
        pairs = zip(completions, solution, strict=True)
        return [len({*c.split()} & {*s.split()}) / len({*s.split()}) for c, s in pairs]

    rewards: list[Any] = [overlap]
    with world.record(model=model, processor=proc, reward_funcs=rewards):
        data = world.rows("text", 2)
        flat = [r for r in data for _ in range(n)]
        chats = [
            [{"role": "user", "content": [{"type": "text", "text": r["problem"]}]}] for r in flat
        ]
        texts = proc.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        enc = proc(text=texts, padding=True, return_tensors="pt")
        model.eval()
        out = model.generate(**enc, do_sample=True, temperature=1.5, top_k=0, max_new_tokens=40)
        model.train()
        start = enc.input_ids.shape[1]
        act = out[:, start:]
        hit = torch.isin(act, torch.tensor([549, 551]))
        am = (hit.long().cumsum(1) - hit.long()).eq(0)
        said = proc.batch_decode(act.masked_fill(~am, 549), skip_special_tokens=True)
        r = torch.tensor(
            rewards[0](prompts=texts, completions=said, solution=[d["solution"] for d in flat])
        )
        centred = r - r.view(-1, n).mean(1).repeat_interleave(n)
        adv = centred / (centred.std() + 1e-8)

        def score(which: Any) -> Any:
            mask = torch.cat([enc.attention_mask, am.long()], 1)
            lg = which(input_ids=out, attention_mask=mask).logits[:, start - 1 : -1]
            return torch.log_softmax(lg.float(), 2).gather(2, act.unsqueeze(2)).squeeze(2)

        with torch.no_grad():
            base = score(ref)
        logp = score(model)
        k2 = 0.5 * (logp - base) ** 2
        pg = -torch.exp(logp - logp.detach()) * adv.unsqueeze(1)
        loss = ((pg + 0.01 * k2) * am).sum() / am.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()


@dataclass
class Sample:
    """One completion of ``dr_grpo``."""

    prompt: Any
    ids: Any
    text: str
    reward: float = 0.0


def dr_grpo(world: World) -> None:
    """No deviation, no lengths: the sum is divided by the cap. A batch of one, four times, with
    gradient accumulation; media straight from the first call."""
    model, processor = world.model, world.processor
    cap, group = 48, 4
    row = world.rows("image", 1)[0]
    opt = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def whole_answer(completions: Any, **_: Any) -> list[float]:
        shape = re.compile(r".*<answer>[A-D]</answer>", re.DOTALL)
        return [1.0 if shape.fullmatch(c) else 0.0 for c in completions]

    def brevity(completions: Any, **_: Any) -> list[float]:
        return [math.exp(-len(c) / 100) for c in completions]

    funcs: list[Any] = [whole_answer, brevity]

    def samples(inputs: Any) -> Iterator[Sample]:
        for _ in range(group):
            with torch.no_grad():
                seq = model.generate(
                    **inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=cap
                )
            ids = seq[0, inputs["input_ids"].shape[1] :]
            yield Sample(inputs, ids, processor.decode(ids, skip_special_tokens=True))

    with world.record(model=model, processor=processor, reward_funcs=funcs):
        chat = [{"role": "user", "content": [
            {"type": "image", "image": row["image"]}, {"type": "text", "text": row["problem"]},
        ]}]  # fmt: skip
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=text, images=Image.open(row["image"]), return_tensors="pt")
        inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        model.eval()
        batch = list(samples(inputs))
        model.train()
        for one in batch:
            one.reward = sum(f(completions=[one.text])[0] for f in funcs)
        mean = sum(one.reward for one in batch) / group
        for one in batch:
            ids = torch.cat([one.prompt["input_ids"], one.ids[None]], 1)
            scored = {**one.prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = model(**scored).logits[0, -len(one.ids) - 1 : -1].float()
            logp = logits.log_softmax(-1)[torch.arange(len(one.ids)), one.ids]
            loss = -(one.reward - mean) * logp.sum() / cap / group
            loss.backward()
        opt.step()
        opt.zero_grad()


def gspo(world: World) -> None:
    """Sequence-level ratios (the mean of the tokens' log-ratio), tiny clip range, two updates."""
    model, proc, G = world.model, world.processor, 4
    rows = world.rows("text", 2)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: (step + 1) / 10)

    def by_format(prompts: Any, completions: Any, **_: Any) -> list[float]:
        shape = r"^<context>.+?</context><think>.+?</think><answer>.+?</answer>$"
        return [0.5 * (re.match(shape, c) is not None) for c in completions]

    def by_words(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [len(set(c.split())) / 40 for c in completions]

    funcs: list[Any] = [by_format, by_words]
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        tok = proc.tokenizer
        texts = [
            tok.apply_chat_template(
                [{"role": "system", "content": ""}, {"role": "user", "content": r["problem"]}],
                tokenize=False, add_generation_prompt=True,
            ) for r in rows for _ in range(G)
        ]  # fmt: skip
        tok.padding_side = "left"
        enc = tok(texts, padding=True, return_tensors="pt")
        model.eval()
        with torch.no_grad():
            out = model.generate(
                enc.input_ids, attention_mask=enc.attention_mask, do_sample=True, top_k=0,
                max_new_tokens=44, return_dict_in_generate=True,
            ).sequences  # fmt: skip
        model.train()
        comp = out[:, enc.input_ids.shape[1] :]
        stop = torch.isin(comp, torch.tensor([551, 549])).int()
        mask = (stop.cumsum(1) - stop == 0).float()
        texts_out = tok.batch_decode(comp, skip_special_tokens=True)
        score = torch.tensor([f(prompts=texts, completions=texts_out) for f in funcs]).sum(0)
        groups = score.view(-1, G)
        adv = ((groups - groups.mean(1, True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
        full = torch.cat([enc.attention_mask, mask.long()], 1)

        def logp() -> Any:
            lg = model(input_ids=out, attention_mask=full, logits_to_keep=comp.shape[1] + 1).logits
            lg = lg[:, -comp.shape[1] - 1 : -1].float()  # not every version keeps only those
            return lg.gather(2, comp[..., None])[..., 0] - lg.logsumexp(2)

        with torch.no_grad():
            old = logp()
        for _ in range(2):
            new = logp()
            ratio = torch.exp(((new - old) * mask).sum(1) / mask.sum(1))
            loss = -torch.min(ratio * adv, ratio.clamp(1 - 3e-4, 1 + 4e-4) * adv).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()


def entropy_bonus(world: World) -> None:
    """A2C habits: an entropy bonus, a moving baseline over steps instead of a group's mean."""
    model, proc = world.model, world.processor
    bonus, baseline = 0.01, 0.0
    opt = torch.optim.Adam(model.parameters(), lr=1e-5)
    cheer: Callable[..., list[float]] = lambda completions, **_: [  # noqa: E731
        1.0 - abs(len(c) - 90) / 90 for c in completions
    ]
    funcs: list[Any] = [cheer]
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        for row in world.rows("text", 2):
            text = proc.apply_chat_template(
                [{"role": "user", "content": row["problem"]}],
                tokenize=False, add_generation_prompt=True,
            )  # fmt: skip
            x = proc(text=[text] * 3, return_tensors="pt")
            model.eval()
            with torch.no_grad():
                y = model.generate(**x, do_sample=True, top_k=0, temperature=1.0, max_new_tokens=48)
            model.train()
            c = y[:, x.input_ids.shape[1] :]
            e = torch.isin(c, torch.tensor([549, 551]))
            m = e.cumsum(1) - e.long() == 0
            r = torch.tensor(funcs[0](completions=proc.batch_decode(c, skip_special_tokens=True)))
            a = r - baseline
            baseline = 0.9 * baseline + 0.1 * float(r.mean())
            am = torch.cat([x.attention_mask, m.long()], 1)
            logits = model(input_ids=y, attention_mask=am).logits[:, x.input_ids.shape[1] - 1 : -1]
            dist = torch.distributions.Categorical(logits=logits.float())
            value = -(dist.log_prob(c) * a[:, None]) - bonus * dist.entropy()
            opt.zero_grad()
            (value[m].mean()).backward()
            opt.step()
