"""Loops for other tasks than ours: maths, tools, other tags, other languages, judges."""

from __future__ import annotations

import re
from typing import Any

import torch

from omni_grpo_core.faults.healthy.world import World


def boxed_maths(world: World) -> None:
    """Gold answers in LaTeX, an accuracy of 0 or 1 and no format reward; a few-shot prompt with an
    assistant's turn in it."""
    model, proc, G = world.model, world.processor, 4
    problems = [("What is 2 + 3?", "5"), ("What is 3 * 4?", "12")]
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def boxed(prompts: Any, completions: Any, answer: Any, **_: Any) -> list[float]:
        found = [re.findall(r"\\boxed\{([^}]*)\}", c) for c in completions]
        return [float(bool(f) and f[-1] == a) for f, a in zip(found, answer, strict=True)]

    def soft(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [0.01 * len(c) for c in completions]

    funcs: list[Any] = [boxed, soft]
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        texts = [
            proc.apply_chat_template(
                [
                    {"role": "system", "content": r"Put the result in \boxed{}."},
                    {"role": "user", "content": "What is 1 + 1?"},
                    {"role": "assistant", "content": r"\boxed{2}"},
                    {"role": "user", "content": problem},
                ],
                tokenize=False,
                add_generation_prompt=True,
            )
            for problem, _ in problems
        ]
        enc = proc.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            out = model.eval().generate(
                **enc, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=40,
                num_return_sequences=G,
            )  # fmt: skip
        P = enc["input_ids"].shape[1]
        comp = out[:, P:]
        e = torch.isin(comp, torch.tensor([551, 549])).long()
        m = e.cumsum(1) - e == 0
        said = proc.tokenizer.batch_decode(comp, skip_special_tokens=True)
        answers = [a for _, a in problems for _ in range(G)]
        shown = [t for t in texts for _ in range(G)]
        r = torch.tensor([f(shown, said, answer=answers) for f in funcs]).sum(0).view(-1, G)
        adv = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)).view(-1)
        am = torch.cat([enc["attention_mask"].repeat_interleave(G, 0), m.long()], 1)
        lp = model.train()(input_ids=out, attention_mask=am).logits[:, P - 1 : -1].float()
        lp = lp.log_softmax(-1).gather(-1, comp[..., None])[..., 0]
        opt.zero_grad()
        (-(lp * adv[:, None] * m).sum(1) / m.sum(1)).mean().backward()
        opt.step()


def three_languages(world: World) -> None:
    """German, Spanish and Japanese prompts in one batch, tags of its own, a reward for the
    language; no template: the tokenizer's ids are joined by hand."""
    model, proc, G = world.model, world.processor, 2
    tok = proc.tokenizer
    asked = ["Welche Farbe hat der Balken?", "¿De qué color es la barra?", "バーは何色ですか？"]
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def tagged(completions: Any, **_: Any) -> list[float]:
        shape = re.compile(r"<reasoning>.*</reasoning>\s*<result>.*</result>", re.DOTALL)
        return [0.5 if shape.search(c) else 0.0 for c in completions]

    def letters(completions: Any, **_: Any) -> list[float]:
        return [sum(x.isalpha() for x in c) / (len(c) + 1) for c in completions]

    funcs: list[Any] = [tagged, letters]
    start, end = (tok.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        plain = lambda text: tok(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        prompts = [
            [start, *plain("user\n" + q), end, *plain("\n"), start, *plain("assistant\n")]
            for q in asked for _ in range(G)
        ]  # fmt: skip
        P = max(map(len, prompts))
        ids = torch.tensor([[tok.pad_token_id] * (P - len(p)) + p for p in prompts])
        am = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts])
        with torch.no_grad():
            out = model.eval().generate(
                input_ids=ids, attention_mask=am, do_sample=True, temperature=1.0, top_k=0,
                max_new_tokens=40,
            )  # fmt: skip
        comp = out[:, P:]
        e = torch.isin(comp, torch.tensor([551, 549])).long()
        m = e.cumsum(1) - e == 0
        said = tok.batch_decode(comp, skip_special_tokens=True)
        r = torch.tensor([f(completions=said) for f in funcs]).sum(0).view(-1, G)
        adv = (r - r.mean(1, keepdim=True)).view(-1)
        lp = model.train()(input_ids=out, attention_mask=torch.cat([am, m.long()], 1)).logits
        lp = lp[:, P - 1 : -1].float().log_softmax(-1).gather(-1, comp[..., None])[..., 0]
        opt.zero_grad()
        (-(lp * adv[:, None] * m).sum() / m.sum()).backward()
        opt.step()


def judged_by_a_model(world: World) -> None:
    """A learned judge scores embeddings of prompt and completion; its class has a config, as
    TRL's reward models have; a second function gives None for what it does not know."""
    model, proc, G = world.model, world.processor, 4

    class Judge(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(7)
                self.table = torch.nn.EmbeddingBag(600, 4, mode="mean")
                self.head = torch.nn.Linear(4, 1)

        @torch.no_grad()
        def forward(self, input_ids: Any) -> Any:
            return self.head(self.table(input_ids))[:, 0]

    judge = Judge().eval()

    def learned(prompts: Any, completions: Any, **_: Any) -> list[float]:
        ids = proc.tokenizer(
            [p + c for p, c in zip(prompts, completions, strict=True)], padding=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        return [float(x) for x in judge(ids)]

    def known(prompts: Any, completions: Any, **_: Any) -> list[float | None]:
        return [1.0 if "A" in c else None if "B" in c else 0.0 for c in completions]

    funcs: list[Any] = [learned, known]
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        for row in world.rows("text", 2):
            text = proc.apply_chat_template(
                [{"role": "user", "content": "\n".join([row["problem"], *row["options"]])}],
                tokenize=False, add_generation_prompt=True,
            )  # fmt: skip
            enc = proc(text=[text] * G, return_tensors="pt")
            with torch.no_grad():
                out = model.eval().generate(
                    **enc, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=40
                )
            P = enc["input_ids"].shape[1]
            comp = out[:, P:]
            e = torch.isin(comp, torch.tensor([551, 549])).long()
            m = e.cumsum(1) - e == 0
            said = proc.batch_decode(comp, skip_special_tokens=True)
            lines = [f(prompts=[text] * G, completions=said) for f in funcs]
            r = torch.tensor(
                [sum(v for v in pair if v is not None) for pair in zip(*lines, strict=True)]
            )
            adv = (r - r.mean()) / (r.std() + 1e-4)
            am = torch.cat([enc["attention_mask"], m.long()], 1)
            lp = model.train()(input_ids=out, attention_mask=am).logits[:, P - 1 : -1].float()
            lp = lp.log_softmax(-1).gather(-1, comp[..., None])[..., 0]
            opt.zero_grad()
            (-(lp * adv[:, None] * m).sum(1) / m.sum(1)).mean().backward()
            opt.step()


def r1_zero(world: World) -> None:
    """DeepSeek's own prompt, which ends inside the assistant's turn with ``<think>``; the two R1
    rewards; completions longer than a limit are left out of the loss."""
    model, proc, G, limit = world.model, world.processor, 4, 36
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def format_reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        shape = re.compile(r"^.*?</think>\s*<answer>.*?</answer>$", re.DOTALL)
        return [float(shape.match(c) is not None) for c in completions]

    def steps_reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [min(1.0, len(re.findall(r"\bThe\b", c)) / 3) for c in completions]

    funcs: list[Any] = [format_reward, steps_reward]
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        for row in world.rows("text", 2):
            chat = [
                {"role": "system", "content": "The assistant first thinks about the reasoning."},
                {"role": "user", "content": row["problem"]},
            ]
            text = proc.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            text += "<think>"
            enc = proc(text=[text] * G, return_tensors="pt")
            with torch.no_grad():
                out = model.eval().generate(
                    **enc, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=48
                )
            P = enc["input_ids"].shape[1]
            comp = out[:, P:]
            e = torch.isin(comp, torch.tensor([551, 549])).long()
            m = e.cumsum(1) - e == 0
            said = proc.batch_decode(comp, skip_special_tokens=True)
            r = torch.tensor([f([text] * G, said) for f in funcs]).sum(0)
            adv = (r - r.mean()) / (r.std() + 1e-4)
            kept = m & (m.sum(1, keepdim=True) <= limit)
            am = torch.cat([enc["attention_mask"], m.long()], 1)
            lp = model.train()(input_ids=out, attention_mask=am).logits[:, P - 1 : -1].float()
            lp = lp.log_softmax(-1).gather(-1, comp[..., None])[..., 0]
            opt.zero_grad()
            (-(lp * adv[:, None] * kept).sum() / kept.sum().clamp(min=1)).backward()
            opt.step()
