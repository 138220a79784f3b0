"""The frames and sounds of one row, as given to the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omni_grpo_core.pipeline.checks import SILENT
from omni_grpo_core.report.html import Tick
from omni_grpo_core.report.html.pictures import (
    Picture,
    Spectrogram,
    frame_picture,
    mel_picture,
    seconds_of,
    ticks,
    waveform_picture,
)
from omni_grpo_core.types import Audio, Media, Row, Video

_MOST_STEPS = 8
"""Time steps shown per video, evenly spaced."""


Frame = tuple[Picture, str, str]
"""The picture, its alt text, and its caption."""


@dataclass(frozen=True, slots=True)
class Clip:
    """An image (one step) or a video. ``steps``: the label of a time step, and the frames that
    the vision tower merges into it."""

    title: str
    facts: str
    steps: tuple[tuple[str, tuple[Frame, ...]], ...]


@dataclass(frozen=True, slots=True)
class Sound:
    """If the row has no features for it, ``mel`` is ``None`` and its texts are empty."""

    title: str
    facts: str
    waveform: Picture
    wave_alt: str
    mel: Spectrogram | None
    mel_alt: str
    mel_facts: str
    ticks: tuple[Tick, ...]


def clips(media: Media, row: Row) -> tuple[Clip, ...]:
    """Images first, then videos, each in reading order."""
    made = []
    for item, image in enumerate(media.images):
        picture = frame_picture(image.pixels)
        frame = (picture, f"image {item}, {_size(picture)}", "")
        tokens = _tokens(row, "image", item)
        facts = f"{_size(picture)} → {tokens} tokens{_copy(picture)}"
        made.append(Clip(f"image {item}", facts, (("", (frame,)),)))
    made += [_video(video, row, item) for item, video in enumerate(media.videos)]
    return tuple(made)


def sounds(media: Media, row: Row) -> tuple[Sound, ...]:
    """Every audio item: its waveform, and its features as the batch holds them."""
    return tuple(_sound(audio, row, item) for item, audio in enumerate(media.audios))


def _video(video: Video, row: Row, item: int) -> Clip:
    count = len(video.frames)
    tokens = _tokens(row, "video", item)
    grid = row.tensors.get("video_grid_thw")
    steps = min(int(grid[item, 0]), count) if grid is not None and item < len(grid) else count
    chosen = torch.linspace(0, steps - 1, min(steps, _MOST_STEPS)).round().int().tolist()
    shown = []
    for step in chosen:
        # as many frames per step as the tower merges; with an odd count the last step has one fewer
        begin, end = step * -(-count // steps), min((step + 1) * -(-count // steps), count)
        frames = tuple(_frame(video, item, index) for index in range(begin, end))
        shown.append((f"step {step} · {tokens // steps} tokens", frames))
    facts = (
        f"{count} frames of {video.frames.shape[-1]}×{video.frames.shape[-2]} px, sampled at "
        f"{video.sample_fps:g} per second out of {video.source_fps:g}, from a clip of "
        f"{video.duration:g} s → {steps} time steps, {tokens} tokens"
    )
    if len(shown) < steps:
        facts += f"; {len(shown)} of the {steps} steps are shown"
    facts += "".join({_copy(picture) for _, frames in shown for picture, _, _ in frames})
    return Clip(f"video {item}", facts, tuple(shown))


def _frame(video: Video, item: int, index: int) -> Frame:
    picture = frame_picture(video.frames[index])
    time = f"{index / video.sample_fps:.2f} s" if video.sample_fps else "unknown time"
    alt = f"video {item}, frame {index + 1} of {len(video.frames)} at {time}"
    return picture, alt, time


def _sound(audio: Audio, row: Row, item: int) -> Sound:
    seconds = seconds_of(audio.samples)
    peak = float(audio.samples.abs().max()) if len(audio.samples) else 0.0
    origin = "" if audio.from_video is None else f", the track inside video {audio.from_video}"
    mel, mel_facts, mel_alt = None, "", ""
    features = row.tensors.get("input_features")
    mask = row.tensors.get("feature_attention_mask")
    if features is not None and item < len(features):
        kept = features[item] if mask is None else features[item][:, mask[item].bool()]
        mel = mel_picture(kept)
        mel_facts = f"{kept.shape[0]} mel bands × {kept.shape[1]} frames of 10 ms"
        mel_alt = (
            f"log-mel spectrogram of audio {item}: {mel_facts}; "
            f"values from {mel.low:.2f} (quiet) to {mel.high:.2f} (loud)"
        )
    return Sound(
        title=f"audio {item}{origin}",
        facts=f"{seconds:.2f} s at 16 kHz, peak {peak:.2f} of 1"
        f"{', silent' if peak < SILENT else ''} → {_tokens(row, 'audio', item)} tokens",
        waveform=waveform_picture(audio.samples),
        wave_alt=f"waveform of audio {item}: {seconds:.2f} seconds, peak {peak:.2f}",
        mel=mel,
        mel_alt=mel_alt,
        mel_facts=mel_facts,
        ticks=ticks(seconds),
    )


def _tokens(row: Row, modality: str, item: int) -> int:
    return sum(s.length for s in row.spans if s.modality == modality and s.item == item)


def _copy(picture: Picture) -> str:
    return "" if picture.exact else "; shown as a compressed copy"


def _size(picture: Picture) -> str:
    return f"{picture.width}×{picture.height} px"
