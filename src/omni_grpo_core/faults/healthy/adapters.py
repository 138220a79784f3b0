"""Loops that train a part of the model: adapters, a head, a text model; and their references."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import numpy as np
import torch
from PIL import Image

from omni_grpo_core.faults.healthy.world import World


def adapter_off_as_reference(world: World) -> None:
    """With adapters the reference is the model without them, else a frozen copy; k3 in the loss."""
    model, proc, G, beta = world.model, world.processor, 4, 0.1
    reference = model if world.setting.lora else copy.deepcopy(model).eval()
    trainable = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trainable, lr=2e-4, weight_decay=0.01)

    def cheerful(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [c.count("!") + 0.05 * len(c.split()) for c in completions]

    funcs: list[Any] = [cheerful]

    def logprobs(which: Any, batch: dict[str, Any], keep: int) -> Any:
        logits = which(**batch).logits[:, -keep - 1 : -1].float()
        index = batch["input_ids"][:, -keep:]
        return torch.log_softmax(logits, -1).gather(-1, index[..., None])[..., 0]

    with world.record(model=model, processor=proc, reward_funcs=funcs):
        for row in world.rows("text", 2):
            text = proc.apply_chat_template(
                [{"role": "user", "content": row["problem"]}], tokenize=False,
                add_generation_prompt=True,
            )  # fmt: skip
            enc = proc(text=[text] * G, return_tensors="pt")
            with torch.no_grad():
                out = model.eval().generate(
                    **enc, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=40
                )
            comp = out[:, enc["input_ids"].shape[1] :]
            ended = torch.isin(comp, torch.tensor([551, 549])).long()
            mask = ended.cumsum(1) - ended == 0
            batch = {
                "input_ids": out,
                "attention_mask": torch.cat([enc["attention_mask"], mask.long()], 1),
            }
            off = model.disable_adapter() if world.setting.lora else contextlib.nullcontext()
            with torch.no_grad(), off:
                ref = logprobs(reference, batch, comp.shape[1])
            said = proc.batch_decode(comp, skip_special_tokens=True)
            r = torch.tensor(funcs[0]([text] * G, said))
            adv = (r - r.mean()) / (r.std() + 1e-4)
            model.train()
            lp = logprobs(model, batch, comp.shape[1])
            kl = (ref - lp).exp() - (ref - lp) - 1
            loss = -((lp - lp.detach()).exp() * adv[:, None] - beta * kl)
            loss = (loss * mask).sum(1).div(mask.sum(1)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 0.5)
            opt.step()
            opt.zero_grad()


def frozen_towers(world: World) -> None:
    """Vision and audio towers frozen by name; activations checkpointed in the scoring forward
    only; completions generated in eval mode with the cache on."""
    model, proc, G = world.model, world.processor, 3
    for name, parameter in model.named_parameters():
        if "visual" in name or "audio_tower" in name:
            parameter.requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if world.setting.lora:
        model.enable_input_require_grads()
    opt = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5)

    def brief(completions: Any, **_: Any) -> list[float]:
        return [max(0.0, 1 - len(c) / 200) for c in completions]

    funcs: list[Any] = [brief]
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        for row in world.rows("image", 2):
            chat = [{"role": "user", "content": [
                {"type": "image", "image": row["image"]}, {"type": "text", "text": row["problem"]},
            ]}]  # fmt: skip
            text = proc.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            enc = proc(text=[text] * G, images=[Image.open(row["image"])] * G, return_tensors="pt")
            enc = enc.to(model.dtype)
            model.eval()
            with torch.no_grad():
                out = model.generate(
                    **enc, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=40,
                    use_cache=True,
                )  # fmt: skip
            model.train()
            P = enc["input_ids"].shape[1]
            comp = out[:, P:]
            e = torch.isin(comp, torch.tensor([551, 549])).long()
            m = e.cumsum(1) - e == 0
            r = torch.tensor(
                funcs[0](completions=proc.batch_decode(comp, skip_special_tokens=True))
            )
            enc["input_ids"] = out
            enc["attention_mask"] = torch.cat([enc["attention_mask"], m.long()], 1)
            lp = model(**enc, use_cache=False).logits[:, P - 1 : -1].float().log_softmax(-1)
            lp = lp.gather(-1, comp[..., None])[..., 0]
            (-((r - r.mean())[:, None] * lp * m).sum() / m.sum()).backward()
            opt.step()
            opt.zero_grad()


def head_alone(world: World) -> None:
    """Only the output head is trained; the forward runs under ``no_grad`` up to it."""
    model, proc, G = world.model, world.processor, 4
    base = model.get_base_model() if world.setting.lora else model
    model.requires_grad_(False)
    base.lm_head.requires_grad_(True)
    opt = torch.optim.SGD(base.lm_head.parameters(), lr=0.05)

    def variety(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [len({*c.split()}) / (1 + len(c.split())) for c in completions]

    def ended(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [0.1 * c.endswith(">") for c in completions]

    funcs: list[Any] = [variety, ended]
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        row = world.rows("text", 1)[0]
        for step in range(2):
            text = proc.apply_chat_template(
                [{"role": "user", "content": row["problem"] + " " * step}], tokenize=False,
                add_generation_prompt=True,
            )  # fmt: skip
            enc = proc(text=[text] * G, return_tensors="pt")
            out = model.generate(**enc, do_sample=True, temperature=1.2, top_k=0, max_new_tokens=40)
            comp = out[:, enc["input_ids"].shape[1] :]
            e = torch.isin(comp, torch.tensor([551, 549])).long()
            m = e.cumsum(1) - e == 0
            said = proc.batch_decode(comp, skip_special_tokens=True)
            r = torch.tensor([f([text] * G, said) for f in funcs]).sum(0)
            adv = (r - r.mean()) / (r.std() + 1e-6)
            am = torch.cat([enc["attention_mask"], m.long()], 1)
            lg = model(input_ids=out, attention_mask=am).logits[:, -comp.shape[1] - 1 : -1]
            lp = (lg.float() / 1.2).log_softmax(-1).gather(-1, comp[..., None])[..., 0]
            loss = -(adv[:, None] * lp * m).sum(1).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()


def accelerated(world: World) -> None:
    """Accelerate prepares model and optimizer, its clip and backward are used; two groups of
    parameters with their own learning rates and a warm-up that begins above 0."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    proc, G = world.processor, 3
    decay = [p for p in world.model.parameters() if p.requires_grad and p.dim() > 1]
    plain = [p for p in world.model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decay, "lr": 1e-5}, {"params": plain or decay[:0], "lr": 1e-4}]
    opt = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-5)
    warm = torch.optim.lr_scheduler.LinearLR(opt, start_factor=0.25, total_iters=4)
    model, opt, warm = accelerator.prepare(world.model, opt, warm)

    def halves(completions: Any, **_: Any) -> list[float]:
        return [0.5 if len(c) % 2 else -0.5 for c in completions]

    def size(completions: Any, **_: Any) -> list[float]:
        return [len(c) / 1000 for c in completions]

    funcs: list[Any] = [halves, size]
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        for row in world.rows("text", 2):
            with accelerator.accumulate(model):
                text = proc.apply_chat_template(
                    [{"role": "user", "content": row["problem"]}], tokenize=False,
                    add_generation_prompt=True,
                )  # fmt: skip
                enc = proc(text=[text] * G, return_tensors="pt").to(accelerator.device)
                model.eval()
                with torch.no_grad():
                    out = accelerator.unwrap_model(model).generate(
                        **enc, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=40
                    )
                model.train()
                P = enc["input_ids"].shape[1]
                comp = out[:, P:]
                e = torch.isin(comp, torch.tensor([551, 549])).long()
                m = e.cumsum(1) - e == 0
                said = proc.batch_decode(comp, skip_special_tokens=True)
                r = torch.tensor([f(completions=said) for f in funcs]).sum(0)
                adv = (r - r.mean()) / (r.std() + 1e-4)
                am = torch.cat([enc["attention_mask"], m.long()], 1)
                lp = model(input_ids=out, attention_mask=am).logits[:, P - 1 : -1].float()
                lp = lp.log_softmax(-1).gather(-1, comp[..., None])[..., 0]
                accelerator.backward(-((lp * adv[:, None] * m).sum(1) / m.sum(1)).mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                warm.step()
                opt.zero_grad()


def autocast(world: World) -> None:
    """Weights as loaded, forwards under bfloat16 autocast, the log-softmax in float32."""
    model, proc, G = world.model, world.processor, 4
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def many(prompts: Any, completions: Any, **_: Any) -> Any:
        return torch.tensor([float(c.count("e")) for c in completions])

    funcs: list[Any] = [many]
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        for row in world.rows("image", 2):
            chat = [
                {"role": "system", "content": [{"type": "text", "text": "Look closely."}]},
                {"role": "user", "content": [
                    {"type": "image", "image": row["image"]},
                    {"type": "text", "text": row["problem"]},
                ]},
            ]  # fmt: skip
            text = proc.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            picture = np.asarray(Image.open(row["image"]).convert("RGB"))
            enc = proc(text=[text] * G, images=[picture] * G, return_tensors="pt").to(model.dtype)
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                out = model.eval().generate(
                    **enc, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=40
                )
            P = enc["input_ids"].shape[1]
            comp = out[:, P:]
            e = torch.isin(comp, torch.tensor([551, 549])).long()
            m = e.cumsum(1) - e == 0
            r = funcs[0]([text] * G, proc.batch_decode(comp, skip_special_tokens=True))
            adv = (r - r.mean()) / (r.std() + 1e-4)
            enc["input_ids"] = out
            enc["attention_mask"] = torch.cat([enc["attention_mask"], m.long()], 1)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model.train()(**enc).logits
            lp = logits[:, P - 1 : -1].float().log_softmax(-1).gather(-1, comp[..., None])[..., 0]
            loss = -((lp - lp.detach()).exp() * adv[:, None] * m).sum() / m.sum()
            opt.zero_grad()
            loss.backward()
            opt.step()
