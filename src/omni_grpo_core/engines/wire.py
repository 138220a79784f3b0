"""Requests and answers as bytes: a header in JSON and the arrays behind it, in safetensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from omni_grpo_core.engines.requests import Answer, Drawn, Request, Sampling
from omni_grpo_core.engines.weights import unshared
from omni_grpo_core.types import Audio, Image, Media, Video


def pack_requests(requests: Sequence[Request], sampling: Sampling) -> bytes:
    """A call of ``generate``."""
    arrays: dict[str, Tensor] = {}
    rows = []
    for at, request in enumerate(requests):
        media = request.media
        for kind, tensors in (
            ("image", [image.pixels for image in media.images]),
            ("video", [video.frames for video in media.videos]),
            ("audio", [audio.samples for audio in media.audios]),
        ):
            arrays |= {f"{at}.{kind}.{n}": tensor.contiguous() for n, tensor in enumerate(tensors)}
        rows.append(
            {
                "text": request.text,
                "sample_id": media.sample_id,
                "decoder": media.decoder,
                "images": len(media.images),
                "videos": [(v.sample_fps, v.source_fps, v.duration) for v in media.videos],
                "audios": [audio.from_video for audio in media.audios],
                "audio_in_video": request.audio_in_video,
                "second_per_grid": request.second_per_grid,
                "seed": request.seed,
            }
        )
    header = json.dumps({"rows": rows, "sampling": asdict(sampling)}).encode()
    return len(header).to_bytes(8, "little") + header + save(unshared(arrays))


def unpack_requests(body: bytes) -> tuple[list[Request], Sampling]:
    """What :func:`pack_requests` packed."""
    split = 8 + int.from_bytes(body[:8], "little")
    header, arrays = json.loads(body[8:split]), load(body[split:])
    requests = [
        Request(row["text"], _media(at, row, arrays), row["audio_in_video"],
                tuple(row["second_per_grid"]), row["seed"])
        for at, row in enumerate(header["rows"])
    ]  # fmt: skip
    return requests, Sampling(**{k: _tuple(v) for k, v in header["sampling"].items()})


def pack_answers(answers: Sequence[Answer]) -> bytes:
    """What ``generate`` returns."""
    return json.dumps([asdict(answer) for answer in answers]).encode()


def unpack_answers(body: bytes) -> list[Answer]:
    """What :func:`pack_answers` packed: Python writes floats so that they are read back equal."""
    return [
        Answer(
            tuple(one["prompt_ids"]),
            tuple(Drawn(**{k: _tuple(v) for k, v in drawn.items()}) for drawn in one["drawn"]),
        )
        for one in json.loads(body)
    ]


def _media(at: int, row: dict[str, Any], arrays: dict[str, Tensor]) -> Media:
    return Media(
        row["sample_id"],
        tuple(Image(arrays[f"{at}.image.{n}"]) for n in range(row["images"])),
        tuple(Video(arrays[f"{at}.video.{n}"], *rates) for n, rates in enumerate(row["videos"])),
        tuple(
            Audio(arrays[f"{at}.audio.{n}"], from_video)
            for n, from_video in enumerate(row["audios"])
        ),
        row["decoder"],
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
