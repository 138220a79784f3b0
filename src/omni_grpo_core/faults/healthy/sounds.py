"""Loops over sound alone: files read in four ways, each to 16 kHz mono."""

from __future__ import annotations

import wave
from typing import Any

import av
import librosa
import numpy as np
import soundfile
import torch
from qwen_omni_utils import process_mm_info

from omni_grpo_core.faults.healthy.world import World


def heard_by_soundfile(world: World) -> None:
    """Both recordings in one call, of different length; the reward is a pair of lists."""
    model, processor, G = world.model, world.processor, 4
    rows = world.rows("audio", 2)

    def pitch(prompts: Any, completions: Any, target: Any, **_: Any) -> list[float]:
        return [float(t in c) for c, t in zip(completions, target, strict=True)]

    def tidy(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [1 - min(c.count("<"), 10) / 10 for c in completions]

    funcs: list[Any] = [pitch, tidy]
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with world.record(model=model, processor=processor, reward_funcs=funcs):
        texts, waves = [], []
        for row in rows:
            samples, rate = soundfile.read(row["audio"], dtype="float32", always_2d=True)
            mono = librosa.resample(samples.mean(1), orig_sr=rate, target_sr=16000)
            chat = [{"role": "user", "content": [
                {"type": "audio", "audio": row["audio"]}, {"type": "text", "text": row["problem"]},
            ]}]  # fmt: skip
            text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            texts += [text] * G
            waves += [mono] * G
        inputs = processor(
            text=texts, audio=waves, sampling_rate=16000, padding=True, return_tensors="pt"
        )
        inputs["input_features"] = inputs["input_features"].to(model.dtype)
        with torch.no_grad():
            seq = model.eval().generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=40
            )
        start = inputs["input_ids"].shape[1]
        comp = seq[:, start:]
        ended = torch.isin(comp, torch.tensor([551, 549])).long()
        mask = ended.cumsum(1) - ended == 0
        said = processor.batch_decode(comp, skip_special_tokens=True)
        target = [r["options"]["ABCD".index(r["answer"])][3:] for r in rows for _ in range(G)]
        one, two = (torch.tensor(f(texts, said, target=target)) for f in funcs)
        adv = torch.zeros(len(seq))
        for g in range(len(rows)):
            part = slice(g * G, (g + 1) * G)
            for values, weight in ((one, 1.0), (two, 0.3)):  # each normalised on its own
                adv[part] += (
                    weight * (values[part] - values[part].mean()) / (values[part].std() + 1e-4)
                )
        whole = {**inputs, "input_ids": seq}
        whole["attention_mask"] = torch.cat([inputs["attention_mask"], mask.long()], 1)
        lp = model.train()(**whole).logits[:, start - 1 : -1].float().log_softmax(-1)
        lp = lp.gather(-1, comp[..., None])[..., 0]
        loss = -((lp - lp.detach()).exp() * adv[:, None] * mask).sum() / mask.sum()
        loss.backward()
        opt.step()
        opt.zero_grad()


def heard_by_librosa(world: World) -> None:
    """A class with methods; ``process_mm_info`` reads the files; Adafactor-like plain SGD."""

    class Trainer:
        def __init__(self) -> None:
            self.model, self.proc = world.model, world.processor
            self.rewards: list[Any] = [self.length]
            self.optim = torch.optim.SGD(self.model.parameters(), lr=1e-3)

        def length(self, completions: Any, **_: Any) -> list[float]:
            return [-abs(len(c) - 60) / 60 for c in completions]

        def prompt(self, row: dict[str, Any]) -> list[dict[str, Any]]:
            return [
                {"role": "system", "content": "You can hear."},
                {"role": "user", "content": [
                    {"type": "audio", "audio": librosa.load(row["audio"], sr=16000)[0]},
                    {"type": "text", "text": row["problem"]},
                ]},
            ]  # fmt: skip

        def sample(self, row: dict[str, Any]) -> None:
            chats = [self.prompt(row) for _ in range(3)]
            text = self.proc.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
            audio, image, video = process_mm_info(chats, use_audio_in_video=False)
            self.batch = self.proc(
                text=text, audio=audio, images=image, videos=video, padding=True,
                return_tensors="pt",
            ).to(self.model.dtype)  # fmt: skip
            self.model.eval()
            with torch.inference_mode():
                ids = self.model.generate(
                    **self.batch, do_sample=True, temperature=0.7, top_k=0, max_new_tokens=40
                )
            self.ids = ids.clone()
            self.width = self.ids.shape[1] - self.batch["input_ids"].shape[1]

        def learn(self) -> None:
            new = self.ids[:, -self.width :]
            stop = torch.isin(new, torch.tensor([551, 549])).long()
            mask = (stop.cumsum(1) - stop == 0).long()
            texts = self.proc.batch_decode(new, skip_special_tokens=True)
            r = torch.tensor(self.rewards[0](completions=texts))
            adv = (r - r.mean()) / (r.std() + 1e-4)
            batch = dict(self.batch)
            batch["input_ids"] = self.ids
            batch["attention_mask"] = torch.cat([batch["attention_mask"], mask], 1)
            self.model.train()
            logits = self.model(**batch).logits[:, -self.width - 1 : -1].float() / 0.7
            lp = logits.log_softmax(-1).gather(-1, new[..., None])[..., 0]
            self.optim.zero_grad()
            (-(adv[:, None] * lp * mask).sum(1) / mask.sum(1)).mean().backward()
            self.optim.step()

    trainer = Trainer()
    with world.record(model=trainer.model, processor=trainer.proc, reward_funcs=trainer.rewards):
        for row in world.rows("audio", 2):
            trainer.sample(row)
            trainer.learn()


def heard_by_numpy(world: World) -> None:
    """The standard library's ``wave`` and numpy; two sounds in one row's message."""
    model, proc, G = world.model, world.processor, 3
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def read(path: str) -> Any:
        with wave.open(path) as file:
            assert file.getsampwidth() == 2
            raw = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
            raw = raw.reshape(-1, file.getnchannels()).mean(1) / 32768
            rate = file.getframerate()
        at = np.arange(int(len(raw) * 16000 / rate)) * rate / 16000
        return np.interp(at, np.arange(len(raw)), raw).astype(np.float32)

    def hm(completions: Any, **_: Any) -> list[float]:
        return [float(c.count("tone")) - 0.01 * len(c) for c in completions]

    funcs: list[Any] = [hm]
    rows = world.rows("audio", 2)
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        parts: list[Any] = [{"type": "audio", "audio": r["audio"]} for r in rows]
        parts.append({"type": "text", "text": "Which of the two tones is higher?"})
        text = proc.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
        enc = proc(
            text=[text] * G, audio=[read(r["audio"]) for _ in range(G) for r in rows],
            return_tensors="pt", padding=True,
        ).to(model.dtype)  # fmt: skip
        with torch.no_grad():
            y = model.eval().generate(
                **enc, do_sample=True, top_k=0, temperature=1.1, max_new_tokens=40
            )
        L = enc["input_ids"].shape[1]
        c = y[:, L:]
        e = torch.isin(c, torch.tensor([551, 549])).long()
        m = e.cumsum(1) - e == 0
        r = torch.tensor(funcs[0](completions=proc.batch_decode(c, skip_special_tokens=True)))
        enc["input_ids"] = y
        enc["attention_mask"] = torch.cat([enc["attention_mask"], m.long()], 1)
        lp = model.train()(**enc).logits[:, L - 1 : -1].float().log_softmax(-1)
        lp = lp.gather(-1, c[..., None])[..., 0]
        opt.zero_grad()
        (-((r - r.mean())[:, None] * lp * m).sum() / 40 / G).backward()
        opt.step()


def heard_by_av(world: World) -> None:
    """Clip and sound as two items whatever the clip carries, resampled by PyAV; rows alternate
    between sound alone and text alone."""
    model, proc, G = world.model, world.processor, 2
    rows = [*world.rows("audio", 1), *world.rows("text", 1)]
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def load(path: str) -> Any:
        out = []
        with av.open(path) as f:
            r = av.AudioResampler("flt", "mono", 16000)
            for frame in f.decode(audio=0):
                out += r.resample(frame)
            out += r.resample(None)
        return np.concatenate([x.to_ndarray().ravel() for x in out])

    def some_letter(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [sum(c.count(x) for x in "ABCD") / 5 for c in completions]

    funcs: list[Any] = [some_letter]
    with world.record(model=model, processor=proc, reward_funcs=funcs):
        texts, sounds = [], []
        for row in rows:
            parts: list[Any] = [{"type": "text", "text": row["problem"]}]
            if "audio" in row:
                parts.insert(0, {"type": "audio", "audio": row["audio"]})
                sounds += [load(row["audio"])] * G
            text = proc.apply_chat_template(
                [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
            )
            texts += [text] * G
        enc = proc(text=texts, audio=sounds, padding=True, padding_side="left", return_tensors="pt")
        enc["input_features"] = enc["input_features"].to(model.dtype)
        with torch.no_grad():
            y = model.eval().generate(
                **enc, do_sample=True, top_k=0, temperature=1.0, max_new_tokens=40
            )
        L = enc["input_ids"].shape[1]
        c = y[:, L:]
        e = torch.isin(c, torch.tensor([551, 549])).long()
        m = e.cumsum(1) - e == 0
        r = torch.tensor(funcs[0](texts, proc.batch_decode(c, skip_special_tokens=True))).view(
            -1, G
        )
        a = (r - r.mean(1, keepdim=True)).flatten()
        given = {k: v for k, v in enc.items() if k not in ("input_ids", "attention_mask")}
        full = torch.cat([enc["attention_mask"], m.long()], 1)
        lp = model.train()(input_ids=y, attention_mask=full, **given).logits[:, L - 1 : -1]
        lp = lp.float().log_softmax(-1).gather(-1, c[..., None])[..., 0]
        opt.zero_grad()
        (-(a[:, None] * lp * m).sum() / m.sum()).backward()
        opt.step()
