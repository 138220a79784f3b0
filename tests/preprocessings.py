"""A preprocessing as people write it for Qwen-Omni models, in steps that a mistake replaces.

Written after qwen-omni-utils' recipe, with PyAV, Pillow and torchvision; it calls nothing of this
package, so that a mistake is planted by what it does and not by what we know of it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import PIL.ImageOps
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

Messages = list[dict[str, Any]]
Output = dict[str, Any]
Frames = list[NDArray[np.uint8]]
FPS, MOST = 4.0, 16


class Careful:
    """Without a mistake: what our batch has, for media settings of 4 frames a second and sides that
    are not changed."""

    generation_prompt = True
    tracks = True
    bicubic = InterpolationMode.BICUBIC

    def chat(self, messages: Messages) -> Messages:
        return messages

    def text(self, messages: Messages, processor: Any) -> str:
        text = processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=self.generation_prompt
        )
        return text if isinstance(text, str) else str(text[0])

    def frames(self, path: str) -> tuple[Frames, float]:
        with av.open(path) as container:
            stream = container.streams.video[0]
            decoded = container.decode(stream)
            return [f.to_ndarray(format="rgb24") for f in decoded], float(stream.average_rate or 0)

    def numbers(self, total: int) -> list[int]:
        """Of ``total`` frames at 8 a second, 4 a second."""
        count = int(min(max(total / 8 * FPS, 4), MOST, total) // 2 * 2)
        return torch.linspace(0, total - 1, count).round().long().tolist()

    def clip(self, path: str, side: int) -> tuple[Tensor, float]:
        frames, rate = self.frames(path)
        numbers = self.numbers(len(frames))
        clip = torch.from_numpy(np.stack([frames[n] for n in numbers])).permute(0, 3, 1, 2)
        size = [2 * side, 3 * side]
        clip = resize(clip, size, interpolation=self.bicubic, antialias=True).float()
        return clip, len(numbers) / len(frames) * rate

    def opened(self, path: str) -> PIL.Image.Image:
        image = PIL.ImageOps.exif_transpose(PIL.Image.open(path))
        if image.mode != "RGBA":
            return image.convert("RGB")
        ground = PIL.Image.new("RGB", image.size, "white")
        ground.paste(image, mask=image.getchannel("A"))
        return ground

    def picture(self, path: str, side: int) -> Any:
        image = self.opened(path)
        wide = image.width > image.height
        return image.resize((3 * side, 2 * side) if wide else (2 * side, 3 * side))

    def sound(self, path: str) -> NDArray[np.float32]:
        with av.open(path) as container:
            stream = container.streams.audio[0]
            resampler = av.AudioResampler("fltp", stream.layout.name, 16_000)
            parts = [
                one.to_ndarray()
                for frame in (*container.decode(stream), None)
                for one in resampler.resample(frame)
            ]
        mixed: NDArray[np.float32] = np.concatenate(parts, 1).mean(0)
        return mixed.astype(np.float32)

    def media(self, messages: Messages, side: int) -> dict[str, list[Any]]:
        parts = [part for message in messages for part in message["content"]]
        listed = any(part["type"] == "audio" for part in parts)
        media: dict[str, list[Any]] = {"images": [], "videos": [], "audio": [], "rates": []}
        self.inside = False
        self.of_clip: list[int | None] = []
        for part in parts:
            if part["type"] == "image":
                media["images"].append(self.picture(part["image"], side))
            elif part["type"] == "audio":
                media["audio"].append(self.sound(part["audio"]))
                self.of_clip.append(None)
            elif part["type"] == "video":
                clip, rate = self.clip(part["video"], side)
                media["videos"].append(clip)
                media["rates"].append(rate)
                with av.open(part["video"]) as container:
                    heard = self.tracks and not listed and bool(container.streams.audio)
                if heard:
                    self.inside = True
                    media["audio"].append(self.sound(part["video"]))
                    self.of_clip.append(len(media["videos"]) - 1)
        return media

    def flags(self, rates: list[float]) -> Output:
        return {"do_resize": False, **({"fps": rates[0]} if rates else {})}

    def after(self, output: Output, processor: Any) -> Output:
        return output

    def __call__(self, messages: Messages, processor: Any) -> Output:
        messages = self.chat(messages)
        text = self.text(messages, processor)
        part = processor.image_processor
        media = self.media(messages, part.patch_size * part.merge_size)
        rates = media.pop("rates")
        inside: Output = {"use_audio_in_video": self.inside}
        if hasattr(processor, "load_audio_from_video"):  # since transformers 5.23
            inside = {"load_audio_from_video": self.inside}
            if self.inside:
                inside["audio_from_video_indices"] = self.of_clip
        output = processor(
            text=[text],
            **{kind: items or None for kind, items in media.items()},
            **inside,
            return_tensors="pt",
            padding=True,
            **self.flags(rates),
        )
        return self.after(dict(output), processor)


# --------------------------------------------------------------------------- files


def drawing(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """A slope of colours with sharp squares in it: each kernel makes something else of it."""
    y, x = np.mgrid[0:height, 0:width]
    made = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (height + width)], -1)
    chance = np.random.default_rng(seed)
    for _ in range(6):
        top, left = chance.integers(0, height - 8), chance.integers(0, width - 8)
        made[top : top + height // 4, left : left + width // 4] = chance.integers(0, 256, 3)
    return made.astype(np.uint8)


def tone(seconds: float, rate: int, channels: int) -> NDArray[np.float32]:
    """(n, channels): another pitch in each, rising."""
    at = np.arange(round(seconds * rate)) / rate
    waves = [0.3 * np.sin(2 * np.pi * (300 * (c + 1) + 40 * at) * at) for c in range(channels)]
    return np.stack(waves, 1).astype(np.float32)


def write_clip(path: Path, frames: int, *, rate: int = 0, channels: int = 1, seed: int = 0) -> None:
    """64 x 96 pixels, 8 frames a second, the view moving over a drawing; with ``rate`` a track."""
    whole = drawing(128, 192, seed)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=8)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        video.options = {"crf": "18"}
        audio = container.add_stream("aac", rate=rate or 16_000) if rate else None
        if audio is not None:
            audio.layout = "stereo" if channels == 2 else "mono"
        for n in range(frames):
            y, x = n * 64 // frames, n * 96 // frames
            view = np.ascontiguousarray(whole[y : y + 64, x : x + 96])
            container.mux(video.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None:
            queue = av.AudioFifo()
            wave = np.ascontiguousarray(tone(frames / 8, rate, channels).T)
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout=audio.layout.name)
            frame.sample_rate, frame.pts = rate, 0
            queue.write(frame)
            for _ in range(math.ceil(wave.shape[1] / 1024)):
                container.mux(audio.encode(queue.read(1024, partial=True)))
            container.mux(audio.encode(None))


ROWS: dict[str, tuple[str, Any]] = {
    "picture": ("image", "wide.png"),
    "pictures": ("image", ["tall.png", "wide.png"]),
    "transparent": ("image", "clear.png"),
    "turned": ("image", "turned.jpg"),
    "silent clip": ("video", "silent.mp4"),
    "odd clip": ("video", "odd.mp4"),
    "long clip": ("video", "long.mp4"),
    "clip and sound": ("video", {"video": "odd.mp4", "audio": "stereo.wav"}),
    "sound": ("audio", "mono.wav"),
    "stereo": ("audio", "stereo.wav"),
    "two sounds": ("audio", ["short.wav", "mono.wav"]),
    "two clips": ("video", ["silent.mp4", "other.mp4"]),
    "text": ("text", None),
}
"""By name: the modality of a row and its files. ``odd``: 17 frames; ``long``: 40, more than are
taken, with a stereo track at 44.1 kHz."""


def write_files(folder: Path) -> list[dict[str, Any]]:
    """The files of :data:`ROWS`, and the rows in HumanOmniV2's format."""
    PIL.Image.fromarray(drawing(64, 96, 1)).save(folder / "wide.png")
    PIL.Image.fromarray(drawing(96, 64, 2)).save(folder / "tall.png")
    alpha = np.tile(np.linspace(0, 255, 96), (64, 1)).astype(np.uint8)
    clear = np.dstack([drawing(64, 96, 3), alpha])
    PIL.Image.fromarray(clear).save(folder / "clear.png")
    turned = PIL.Image.fromarray(drawing(64, 96, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif, quality=95)
    write_clip(folder / "silent.mp4", 24, seed=5)
    write_clip(folder / "other.mp4", 24, seed=6)
    write_clip(folder / "odd.mp4", 17, rate=16_000, seed=7)
    write_clip(folder / "long.mp4", 40, rate=44_100, channels=2, seed=8)
    soundfile.write(folder / "mono.wav", tone(1.7, 44_100, 1), 44_100, subtype="FLOAT")
    soundfile.write(folder / "short.wav", tone(1.3, 16_000, 1), 16_000, subtype="FLOAT")
    soundfile.write(folder / "stereo.wav", tone(2.3, 48_000, 2), 48_000, subtype="FLOAT")
    return [
        {
            "problem_id": name,
            "problem": "Which way does it move?",
            "problem_type": "multiple choice",
            "options": ["A. left", "B. right"],
            "solution": "<context>c</context><think>t</think><answer>A</answer>",
            "data_type": kind,
            **({} if files is None else {"path": files}),
        }
        for name, (kind, files) in ROWS.items()
    ]
