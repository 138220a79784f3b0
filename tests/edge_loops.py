"""Eight short loops in the styles of different people, for tests of continuity. Each makes one or
two updates; what it learns is of no interest."""

from __future__ import annotations

import random
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

EOS = torch.tensor([551, 549])
SAMPLING: dict[str, Any] = {
    "do_sample": True, "top_k": 0, "temperature": 2.0,
    "suppress_tokens": [550, *range(552, 563)],
}  # fmt: skip
"""Hot enough that completions differ; without special tokens but the two that end one."""


def _user(text: str, **media: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": kind, kind: path} for kind, path in media.items()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _frames(path: str) -> list[Any]:
    with av.open(path) as container:
        every = [np.asarray(f.to_image().resize((56, 56))) for f in container.decode(video=0)]
    return every[:: len(every) // 4][:4]


def _sound(path: str) -> Any:
    with av.open(path) as container:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=16000)
        parts = [
            out.to_ndarray()[0]
            for frame in container.decode(audio=0)
            for out in resampler.resample(frame)
        ]
    return np.concatenate(parts)[:16000]


def _alive(tail: torch.Tensor) -> torch.Tensor:
    over = torch.isin(tail, EOS).long()
    return (over.cumsum(1) - over) == 0


def _policy_loss(logits: Any, tail: torch.Tensor, weight: torch.Tensor) -> Any:
    logp = logits.float()[:, -tail.shape[1] - 1 : -1].log_softmax(-1)
    return -(logp.gather(-1, tail[..., None])[..., 0] * weight).mean()


def _reward(prompts: Any = None, completions: Any = (), **_: Any) -> list[float]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [len(text) / 100 for text in texts]


def images_at_once(world: Any) -> None:
    """Every prompt repeated before one processor call of images of equal size; conversations as
    completions."""
    model, proc, rewards = world.model, world.processor, [_reward]
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    with world.record(model=model, processor=proc, reward_funcs=rewards):
        rows = [row for row in world.rows("image", 2) for _ in range(2)]
        chats = [_user(row["problem"], image=row["image"]) for row in rows]
        texts = [
            proc.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats
        ]
        pics = [Image.open(row["image"]).convert("RGB").resize((56, 56)) for row in rows]
        batch = dict(proc(text=texts, images=pics, padding=True, return_tensors="pt"))
        seq = model.generate(**batch, **SAMPLING, max_new_tokens=12)
        tail = seq[:, batch["input_ids"].shape[1] :]
        mask = torch.cat([batch["attention_mask"], _alive(tail).long()], 1)
        said = proc.batch_decode(tail, skip_special_tokens=True)
        chat = [[{"role": "assistant", "content": text}] for text in said]
        scores = torch.tensor(rewards[0](prompts=chats, completions=chat))
        out = model(**{**batch, "input_ids": seq, "attention_mask": mask})
        _policy_loss(out.logits, tail, (scores - scores.mean())[:, None]).backward()
        opt.step()


def clip_by_clip(world: Any) -> None:
    """A clip a step, the processor called once for all of its group, inputs cast by hand."""
    model, proc, funcs = world.model, world.processor, [_reward]
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        for row in world.rows("video", 2):
            chat = _user(row["problem"], video=row["video"])
            text = proc.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            clip = _frames(row["video"])
            made = proc(
                text=[text] * 2, videos=[clip, clip], fps=2.0, do_resize=False,
                padding=True, return_tensors="pt",
            )  # fmt: skip
            made = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in made.items()}
            with torch.no_grad():
                seq = model.generate(**made, **SAMPLING, max_new_tokens=12)
            tail = seq[:, made["input_ids"].shape[1] :]
            texts = [proc.tokenizer.decode(t[a]) for t, a in zip(tail, _alive(tail), strict=True)]
            got = torch.tensor(funcs[0](prompts=[text] * 2, completions=texts))
            made["input_ids"] = seq
            made["attention_mask"] = torch.cat([made["attention_mask"], torch.ones_like(tail)], 1)
            loss = _policy_loss(model(**made).logits, tail, (got - got.mean())[:, None])
            opt.zero_grad()
            loss.backward()
            opt.step()


def sounds_sliced(world: Any) -> None:
    """Sounds processed together, generated and scored one row at a time."""
    model, proc, funcs = world.model, world.processor, [_reward]
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        rows = world.rows("audio", 2)
        chats = [_user(row["problem"], audio=row["audio"]) for row in rows for _ in range(2)]
        texts = proc.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        sounds = [_sound(row["audio"]) for row in rows for _ in range(2)]
        both = proc(text=texts, audio=sounds, padding=True, return_tensors="pt")
        done, said = [], []
        for n in range(len(texts)):
            one = {k: v[n : n + 1] for k, v in both.items()}
            seq = model.generate(**one, **SAMPLING, max_new_tokens=10)
            tail = seq[:, one["input_ids"].shape[1] :]
            done.append((one, seq, tail))
            said.append(proc.tokenizer.decode(tail[0], skip_special_tokens=True))
        scores = torch.tensor(funcs[0](prompts=chats, completions=said))
        for (one, seq, tail), weight in zip(done, scores - scores.mean(), strict=True):
            mask = torch.cat([one["attention_mask"], torch.ones_like(tail)], 1)
            out = model(**{**one, "input_ids": seq, "attention_mask": mask})
            (_policy_loss(out.logits, tail, weight) / len(done)).backward()
        opt.step()


def text_shuffled(world: Any) -> None:
    """Prompts of different length, rows shuffled before scoring in two micro-batches, old scores
    from a pass of their own, two updates."""
    model, proc = world.model, world.processor
    funcs: list[Any] = [_reward, lambda **k: _reward(**k)]
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        texts = [
            proc.apply_chat_template(_user(question), tokenize=False, add_generation_prompt=True)
            for question in ("Why?", "What is the name of this long river in the north?")
            for _ in range(2)
        ]
        made = proc(text=texts, padding=True, padding_side="left", return_tensors="pt")
        seq = model.generate(**made, **SAMPLING, max_new_tokens=10)
        tail = seq[:, made["input_ids"].shape[1] :]
        mask = torch.cat([made["attention_mask"], _alive(tail).long()], 1)
        said = proc.batch_decode(tail, skip_special_tokens=True)
        scores = torch.tensor([f(prompts=texts, completions=said) for f in funcs]).sum(0)
        with torch.no_grad():
            model(input_ids=seq, attention_mask=mask, logits_to_keep=tail.shape[1] + 1)
        order = list(range(len(texts)))
        random.Random(3).shuffle(order)
        for _ in range(2):
            for part in (order[:2], order[2:]):
                out = model(input_ids=seq[part], attention_mask=mask[part])
                _policy_loss(out.logits, tail[part], scores[part][:, None]).backward()
            opt.step()
            opt.zero_grad()


def return_sequences(world: Any) -> None:
    """``num_return_sequences`` on text; the prompt trimmed of padding, then padded on the right
    with the completion for scoring."""
    model, proc, funcs = world.model, world.processor, [_reward]
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    pad = proc.tokenizer.pad_token_id
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        texts = proc.apply_chat_template(
            [_user("Why?"), _user("Which of these two rivers is longer?")],
            tokenize=False, add_generation_prompt=True,
        )  # fmt: skip
        made = proc(text=texts, padding=True, padding_side="left", return_tensors="pt")
        seq = model.generate(
            **made,
            do_sample=True,
            top_k=0,
            temperature=2.0,
            max_new_tokens=10,
            num_return_sequences=3,
        )
        width = made["input_ids"].shape[1]
        real = made["attention_mask"].bool().repeat_interleave(3, 0)
        wholes = []
        for row, own in zip(seq, real, strict=True):
            prompt, tail = row[:width][own], row[width:]
            wholes.append((prompt, tail[_alive(tail[None])[0]]))
        said = [proc.tokenizer.decode(tail, skip_special_tokens=True) for _, tail in wholes]
        prompts = [text for text in texts for _ in range(3)]
        scores = torch.tensor(funcs[0](prompts=prompts, completions=said))
        longest = max(len(p) + len(t) for p, t in wholes)
        ids = torch.full((len(wholes), longest), pad)
        keep = torch.zeros_like(ids)
        for n, (prompt, tail) in enumerate(wholes):
            ids[n, : len(prompt) + len(tail)] = torch.cat([prompt, tail])
            keep[n, : len(prompt) + len(tail)] = 1
        logits = model(input_ids=ids, attention_mask=keep).logits.float().log_softmax(-1)
        chosen = logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0] * keep[:, 1:]
        (-(chosen * (scores - scores.mean())[:, None]).mean()).backward()
        opt.step()


def processed_twice(world: Any) -> None:
    """The processor again for scoring, images repeated by hand for the group; a reference model
    and a dict of rewards by name."""
    import copy

    model, proc, funcs = world.model, world.processor, [_reward]
    frozen = copy.deepcopy(model).eval()
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        for row in world.rows("image", 2):
            text = proc.apply_chat_template(
                _user(row["problem"], image=row["image"]), tokenize=False,
                add_generation_prompt=True,
            )  # fmt: skip
            picture = Image.open(row["image"]).convert("RGB").resize((56, 56))
            small = proc(text=[text], images=[picture], return_tensors="pt")
            seqs = [model.generate(**small, **SAMPLING, max_new_tokens=10) for _ in range(2)]
            width = small["input_ids"].shape[1]
            tails = [seq[0, width:] for seq in seqs]
            said = [proc.tokenizer.decode(t, skip_special_tokens=True).strip() for t in tails]
            scores = {f.__name__: f(prompts=[text] * 2, completions=said) for f in funcs}
            again = proc(text=[text] * 2, images=[picture] * 2, return_tensors="pt")
            longest = max(map(len, tails))
            tail = torch.stack(
                [torch.nn.functional.pad(t, (0, longest - len(t)), value=549) for t in tails]
            )
            ids = torch.cat([again["input_ids"], tail], 1)
            mask = torch.cat([again["attention_mask"], _alive(tail).long()], 1)
            given = {**again, "input_ids": ids, "attention_mask": mask}
            with torch.no_grad():
                frozen(**given)
            total = torch.tensor(list(scores.values())).sum(0)
            _policy_loss(model(**given).logits, tail, (total - total.mean())[:, None]).backward()
            opt.step()
            opt.zero_grad()


def heard_clips(world: Any) -> None:
    """Clips with their sound inside, two different ones in one call; scored in bfloat16 under
    autocast."""
    model, proc, funcs = world.model, world.processor, [_reward]
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    flag = {"use_audio_in_video": True}
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        rows = world.rows("video", 2)
        chats = [_user(row["problem"], video=row["video"]) for row in rows]
        texts = proc.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        clips = [_frames(row["video"]) for row in rows]
        made = proc(
            text=texts, videos=clips, audio=[_sound(row["video"]) for row in rows], fps=2.0,
            do_resize=False, padding=True, padding_side="left", return_tensors="pt", **flag,
        )  # fmt: skip
        seq = model.generate(**made, **flag, **SAMPLING, max_new_tokens=10)
        tail = seq[:, made["input_ids"].shape[1] :]
        said = proc.batch_decode(tail, skip_special_tokens=True)
        scores = torch.tensor(funcs[0](prompts=texts, completions=said))
        whole = {
            **made,
            "input_ids": seq,
            "attention_mask": torch.cat([made["attention_mask"], _alive(tail).long()], 1),
        }
        with torch.autocast("cpu", torch.bfloat16):
            out = model(**whole, **flag)
        _policy_loss(out.logits, tail, (scores - scores.mean())[:, None]).backward()
        opt.step()


def rollouts_first(world: Any) -> None:
    """All rollouts of an epoch first, each rendered, processed and generated alone; then one pass
    over a buffer, collated again with padding on the left."""
    model, proc, funcs = world.model, world.processor, [_reward]
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    buffer: list[tuple[Any, Any, float]] = []
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        for question in ("Why?", "What is the name of this long river?", "Who?"):
            text = proc.apply_chat_template(
                _user(question), tokenize=False, add_generation_prompt=True
            )
            made = proc(text=text, return_tensors="pt")
            for _ in range(2):
                seq = model.generate(**made, **SAMPLING, max_new_tokens=10)
                tail = seq[0, made["input_ids"].shape[1] :]
                said = proc.tokenizer.decode(tail, skip_special_tokens=True)
                (score,) = funcs[0](prompts=[text], completions=[said])
                buffer.append((made["input_ids"][0], tail, score))
        buffer.sort(key=lambda item: -len(item[1]))
        for start in range(0, len(buffer), 3):
            part = buffer[start : start + 3]
            longest = max(len(p) + len(t) for p, t, _ in part)
            pads = [longest - len(p) - len(t) for p, t, _ in part]
            ids = torch.stack(
                [
                    torch.cat([torch.full((n,), 549), p, t])
                    for n, (p, t, _) in zip(pads, part, strict=True)
                ]
            )
            mask = torch.ones_like(ids)
            for row, n in enumerate(pads):
                mask[row, :n] = 0
            logits = model(input_ids=ids, attention_mask=mask).logits
            weight = torch.tensor([score for *_, score in part])[:, None]
            (_policy_loss(logits, ids[:, 1:], weight) / 2).backward()
        opt.step()
