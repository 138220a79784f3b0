"""The processor's calls for one prompt. A part of ``batch.py``.

transformers' omni processors take one frame rate and one audio-in-video flag for all videos of a
call. So a prompt is cut before each video whose rate or flag differs from the last one's, each
stretch is processed alone, and the results are joined: every clip gets what it would get alone. A
cut lies before a special token, where tokenizers split too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from PIL import Image as PILImage
from torch import Tensor

from omni_grpo_core.core.family import Family
from omni_grpo_core.types import Audio, Image, Media, Modality, Video

ID_DTYPE = torch.int64
MODEL_KEYS: Mapping[Modality, tuple[str, ...]] = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw", "video_second_per_grid"),
    "audio": ("input_features", "feature_attention_mask"),
}
"""What the model takes of each modality, by its keywords."""
_ARRAYS = "np" if Version(version("transformers")) >= Version("5.14") else "pt"
"""What the processor returns. With tensors the omni processors make numpy warn: they count in numpy
arrays, and torch's ``__array__`` takes no ``copy``. 4.x's image processors accept only tensors."""


def tokens_of(processor: Any) -> dict[Modality, str]:
    """Each modality's placeholder."""
    return {
        "image": processor.image_token,
        "video": processor.video_token,
        "audio": processor.audio_token,
    }


def processed(
    text: str, media: Media, processor: Any, family: Family
) -> tuple[Tensor, dict[str, Tensor]]:
    """Token ids, int64 (length,), of a rendered prompt with its placeholders expanded, and the
    model's tensors by keyword."""
    outputs = [_call(part, processor, family) for part in _stretches(text, media, processor)]
    ids = torch.cat([_tensor(output["input_ids"])[0].to(ID_DTYPE) for output in outputs])
    tensors = {}
    for key in (key for keys in MODEL_KEYS.values() for key in keys):
        parts = [_tensor(output[key]) for output in outputs if key in output]
        if parts:
            tensors[key] = concatenate(parts)
    return ids, tensors


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Items concatenated; audio features are padded to the widest."""
    width = max(part.shape[-1] for part in parts)
    if parts[0].dim() > 1 and any(part.shape[-1] != width for part in parts):
        parts = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts]
    return torch.cat(list(parts))


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Part of a prompt, its media, and which of its videos each audio is interleaved in."""

    text: str
    images: Sequence[Image]
    videos: Sequence[Video]
    audios: Sequence[Audio]
    tracks: Sequence[int | None]


def _stretches(text: str, media: Media, processor: Any) -> Iterator[_Stretch]:
    tokens = tokens_of(processor)
    inside = {audio.from_video for audio in media.audios}
    kinds = [(video.sample_fps, index in inside) for index, video in enumerate(media.videos)]
    cuts, first = [0], [0]
    for index, found in enumerate(re.finditer(re.escape(tokens["video"]), text)):
        if index and kinds[index] != kinds[index - 1]:
            cuts.append(text.rindex(processor.vision_bos_token, 0, found.start()))
            first.append(index)
    images, audios = 0, 0
    ends = zip((*cuts[1:], len(text)), (*first[1:], len(media.videos)), strict=True)
    for begin, video, (end, last) in zip(cuts, first, ends, strict=True):
        piece = text[begin:end]
        shown = images + piece.count(tokens["image"])
        heard = audios + piece.count(tokens["audio"]) + sum(i in inside for i in range(video, last))
        sounds = media.audios[audios:heard]
        yield _Stretch(
            piece,
            media.images[images:shown],
            media.videos[video:last],
            sounds,
            [None if a.from_video is None else a.from_video - video for a in sounds],
        )
        images, audios = shown, heard


def _call(part: _Stretch, processor: Any, family: Family) -> Any:
    """The installed transformers' own call. ``fps`` must be one number: a list raises, omitting it
    silently means 2.0. From 5.23 on the audio-in-video keyword is ``load_audio_from_video``, and
    decoded tracks must be distinguished from audio items by ``audio_from_video_indices``."""
    keywords: dict[str, Any] = {}
    if part.videos:
        keywords["fps"] = part.videos[0].sample_fps
    if any(track is not None for track in part.tracks):
        if hasattr(processor, "load_audio_from_video"):
            keywords["load_audio_from_video"] = True
            keywords["audio_from_video_indices"] = list(part.tracks)
        else:
            keywords["use_audio_in_video"] = True
    if part.audios and not family.audio_limited:
        # 4.57 cuts at the extractor's length, as if the tower could not take more
        keywords["audio_kwargs"] = {"truncation": False}
    return processor(
        text=[part.text],
        images=[pil_image(image.pixels) for image in part.images] or None,
        videos=[video.frames for video in part.videos] or None,
        audio=[audio.samples.numpy() for audio in part.audios] or None,
        return_tensors=_ARRAYS,
        do_resize=False,
        **keywords,
    )


def pil_image(pixels: Tensor) -> PILImage.Image:
    """A picture as processors take it."""
    return PILImage.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _tensor(values: Any) -> Tensor:
    """As the processor itself would make it: torch makes Python floats float32."""
    tensor = torch.as_tensor(values)
    return tensor.float() if tensor.dtype == torch.float64 else tensor
