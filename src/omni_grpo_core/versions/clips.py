"""What the installed transformers does with a clip that has no track, and with one passed as a
path: calls as users write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import transformers.video_processing_utils as reading
from torch import Tensor

from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.forward import positions
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.types import Media, Prompt, Row
from omni_grpo_core.versions.library import captured_warnings


def mute_clip(policy: Policy, clips: Sequence[tuple[Prompt, Media, Row]]) -> dict[str, Any]:
    """A clip without a track before one with, in one call with audio-in-video on.

    Each comes with the row that is right for it alone. ``ids`` and ``positions``: how many rows
    have the same ones; ``told``: whether there was a warning; ``refused``: what was raised instead.
    """
    prompts, media, rows = zip(*clips, strict=True)
    keywords: dict[str, Any] = {"use_audio_in_video": True}
    if hasattr(policy.processor, "load_audio_from_video"):
        keywords = {"load_audio_from_video": True, "audio_from_video_indices": [1]}
    with captured_warnings() as lines:
        try:
            output = policy.processor(
                text=[prompt.text for prompt in prompts],
                videos=[video.frames for one in media for video in one.videos],
                audio=[audio.samples.numpy() for one in media for audio in one.audios],
                fps=media[0].videos[0].sample_fps,
                do_resize=False,
                padding=True,
                return_tensors="pt",
                **keywords,
            )
        except Exception as error:  # whatever this version raises is the fact
            message = (str(error).strip() or "no message").splitlines()[0]
            return {"rows": len(rows), "refused": f"{type(error).__name__}: {message}"}
    return {
        "rows": len(rows),
        "ids": sum(
            ids[mask.bool()].tolist() == row.input_ids.tolist()
            for ids, mask, row in zip(
                output["input_ids"], output["attention_mask"], rows, strict=True
            )
        ),
        "positions": _same_positions(policy, output, rows),
        "told": any("audio" in line for line in lines),
    }


def _same_positions(policy: Policy, output: Mapping[str, Any], rows: Sequence[Row]) -> int:
    """Count rows whose positions in the batch, with its one flag, equal those of the row alone."""
    alone = positions(policy, collate(rows, policy.pad_token_id)).position_ids
    together, _ = policy.model.get_rope_index(
        output["input_ids"],
        None,
        output["video_grid_thw"],
        output["attention_mask"],
        True,
        output["feature_attention_mask"].sum(-1),
        torch.as_tensor(output["video_second_per_grid"]),
    )
    kept = output["attention_mask"].bool()
    return sum(
        torch.equal(own[:, mask], wanted[:, mask].to(own.dtype))
        for own, wanted, mask in zip(together.unbind(1), alone.unbind(1), kept, strict=True)
    )


def by_path(policy: Policy, path: str, fps: float) -> dict[str, Any]:
    """Which decoder the video processor chooses for a path, and which frames it requests.

    ``here``: the decoder in this environment, or why none; ``chosen``: with every decoder
    available; ``frames``: the indices requested, which are the library's; PyAV always decodes.
    """
    with _watched(everything=False) as (chosen, _):
        here = _read(policy, path, fps)
    here = chosen[0] if chosen else here
    with _watched(everything=True) as (chosen, frames):
        refused = _read(policy, path, fps)
    # whether the processor accepts frames of this size does not matter here
    found = {"chosen": chosen[0], "frames": frames[0]} if frames else {"refused": refused}
    return {"here": here, **found}


def _read(policy: Policy, path: str, fps: float) -> str | None:
    try:
        policy.processor.video_processor(
            videos=[path], fps=fps, do_sample_frames=True, do_resize=False, return_tensors="pt"
        )
    except Exception as error:  # whatever this version raises is the fact
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return None


@contextmanager
def _watched(*, everything: bool) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Decoders chosen and frames requested; ``everything``: as if every decoder were installed."""
    chosen: list[str] = []
    frames: list[list[int]] = []
    original = getattr(reading, "load_video", None)

    def load(video: Any, *args: Any, **keywords: Any) -> Any:
        choose: Callable[..., Tensor] = keywords["sample_indices_fn"]

        def noted(*given: Any, **more: Any) -> Tensor:
            numbers = choose(*given, **more)
            frames.append([int(number) for number in numbers])
            return numbers

        chosen.append(keywords["backend"])
        return original(video, **{**keywords, "backend": "pyav", "sample_indices_fn": noted})  # type: ignore[misc]

    changes: dict[str, Any] = {} if original is None else {"load_video": load}
    if everything:
        names = ("is_torchcodec_available", "is_torchcodec_usable")
        changes |= {n: lambda *a, **k: True for n in names if hasattr(reading, n)}
    with captured_warnings(), patch.multiple(reading, **changes):
        yield chosen, frames
