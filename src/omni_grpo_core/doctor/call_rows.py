"""The inputs of one recorded call, row by row, with what each row's placeholders should hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from omni_grpo_core.core.batch import expected_lengths, find_spans, placeholder_ids
from omni_grpo_core.core.processing import ID_DTYPE
from omni_grpo_core.errors import BatchError
from omni_grpo_core.types import MODALITIES, AudioInVideo, Modality, Row

if TYPE_CHECKING:
    from torch import Tensor

    from omni_grpo_core.core.policy import Policy

GRIDS: Mapping[Modality, str] = {
    "image": "image_grid_thw",
    "video": "video_grid_thw",
    "audio": "feature_attention_mask",
}
PIXELS: Mapping[Modality, str] = {
    "image": "pixel_values",
    "video": "pixel_values_videos",
    "audio": "input_features",
}


@dataclass(frozen=True, slots=True, eq=False)
class CallRow:
    """One row of a call. ``kept``: bool, (L,): the tokens that the recorded mask keeps. ``row``:
    the same without padding, with its own media; ``None`` where the call's media cannot be split
    by row, because counts disagree."""

    index: int
    kept: Tensor
    row: Row | None


@dataclass(frozen=True, slots=True)
class Counts:
    """Placeholders of each row and features of each item, of one modality in one call."""

    modality: Modality
    tokens: tuple[int, ...]
    items: tuple[int, ...]

    @property
    def agree(self) -> bool:
        """In total and row by row: a whole number of items fills each row exactly."""
        ends = {0, *accumulate(self.items)}
        return sum(self.tokens) == sum(self.items) and set(accumulate(self.tokens)) <= ends

    @property
    def first_wrong(self) -> int:
        """The first row that no whole number of items fills."""
        ends = {0, *accumulate(self.items)}
        sums = list(accumulate(self.tokens))
        wrong = (index for index, end in enumerate(sums) if end not in ends)
        return next(wrong, len(self.tokens) - 1)


def counts_of(inputs: Mapping[str, Tensor], policy: Policy) -> tuple[Counts, ...]:
    """Placeholders and features of every modality in a call."""
    ids = _in_rows(inputs["input_ids"])
    tensors = {key: inputs[key] for key in GRIDS.values() if key in inputs}
    lengths = expected_lengths(tensors, policy.processor, policy.family)
    tokens = placeholder_ids(policy.processor)
    found = []
    for modality in MODALITIES:
        by_row = tuple(int(n) for n in (ids == tokens[modality]).sum(1).tolist())
        if any(by_row) or lengths[modality]:
            found.append(Counts(modality, by_row, tuple(lengths[modality])))
    return tuple(found)


def is_interleaved(ids: Sequence[int], policy: Policy) -> bool:
    """Whether some video of a row has its sound inside: audio begins right after vision."""
    convert = policy.processor.tokenizer.convert_tokens_to_ids
    vision = convert(policy.processor.vision_bos_token)
    audio = convert(policy.processor.audio_bos_token)
    return any(a == vision and b == audio for a, b in pairwise(ids))


def call_rows(inputs: Mapping[str, Tensor], policy: Policy) -> tuple[CallRow, ...]:
    """The rows of a call by its own mask, each with the media that its placeholders take."""
    ids = _in_rows(inputs["input_ids"])
    mask = inputs.get("attention_mask")
    mask = None if mask is None else _in_rows(mask)
    if mask is None or mask.shape != ids.shape:
        mask = (ids != policy.pad_token_id).to(ID_DTYPE)
    tensors = {
        key: inputs[key]
        for modality in MODALITIES
        for key in (GRIDS[modality], PIXELS[modality])
        if key in inputs
    }
    counts = {one.modality: one for one in counts_of(inputs, policy)}
    # features of a modality without placeholders belong to no row
    counts = {modality: one for modality, one in counts.items() if any(one.tokens)}
    whole = all(one.agree for one in counts.values())
    used = dict.fromkeys(MODALITIES, 0)
    patches = dict.fromkeys(MODALITIES, 0)
    seconds = inputs.get("video_second_per_grid")
    found = []
    for index in range(len(ids)):
        kept = mask[index].bool()
        own: dict[str, Tensor] = {}
        for modality, one in counts.items() if whole else ():
            items = _take(one.items[used[modality] :], one.tokens[index])
            begin = used[modality]
            used[modality] += items
            if not items:
                continue
            grid, pixels = GRIDS[modality], PIXELS[modality]
            own[grid] = tensors[grid][begin : begin + items]
            if modality == "audio":
                if pixels in tensors:
                    own[pixels] = tensors[pixels][begin : begin + items]
                continue
            many = int(own[grid].prod(-1).sum())
            if pixels in tensors:
                own[pixels] = tensors[pixels][patches[modality] : patches[modality] + many]
            patches[modality] += many
            if modality == "video" and seconds is not None:
                own["video_second_per_grid"] = torch.as_tensor(seconds)[begin : begin + items]
        found.append(CallRow(index, kept, _row(ids[index][kept], own, policy) if whole else None))
    return tuple(found)


def _in_rows(values: Tensor) -> Tensor:
    """(N, L), also where a call on one row left out its axis."""
    return values if values.dim() > 1 else values[None]


def _row(ids: Tensor, tensors: Mapping[str, Tensor], policy: Policy) -> Row | None:
    ids = ids.to(ID_DTYPE)
    mode: AudioInVideo = "interleaved" if is_interleaved(ids.tolist(), policy) else "off"
    lengths = expected_lengths(tensors, policy.processor, policy.family)
    try:
        spans = find_spans(ids, placeholder_ids(policy.processor), lengths, "row")
    except BatchError:  # more tokens than items, or fewer: reported by the counts
        return None
    return Row("row", ids, mode, spans, tensors)


def _take(items: Sequence[int], tokens: int) -> int:
    """How many of the next items fill ``tokens`` placeholders."""
    number = total = 0
    while total < tokens and number < len(items):
        total += items[number]
        number += 1
    return number
