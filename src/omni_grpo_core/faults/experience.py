"""Rows of a rollout as objects, and the collator that batches them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from omni_grpo_core.faults.fixtures import Drawn
from omni_grpo_core.faults.seams import Rolled
from omni_grpo_core.types import Media

IDS, MASK = "input_ids", "attention_mask"


@dataclass(frozen=True, slots=True, eq=False)
class Experience:
    """One row. ``prompt``: its ids and mask, (L,), and its media's inputs. ``response``: (C,), as
    sampled. ``advantage``: (), or (C,) with a partial reward. ``mask``: bool, (C,)."""

    drawn: Drawn
    prompt: dict[str, Tensor]
    response: Tensor
    mask: Tensor
    text: str
    rewards: Tensor
    advantage: Tensor

    def __len__(self) -> int:
        return len(self.prompt[IDS]) + int(self.mask.sum())


def by_row(inputs: Mapping[str, Tensor], media: Sequence[Media]) -> Iterator[dict[str, Tensor]]:
    """The inputs of each row, without padding; ``media``: of each row, or of each prompt."""
    taken: Counter[str] = Counter()

    def take(name: str, number: int) -> dict[str, Tensor]:
        """The next entries of a tensor that was passed on."""
        start = taken[name]
        taken[name] += number
        return {name: inputs[name][start : start + number]} if name in inputs else {}

    rows = len(inputs[IDS])
    for row in range(rows):
        own = media[row * len(media) // rows]
        attended = inputs[MASK][row].bool()
        piece = {name: inputs[name][row][attended] for name in (IDS, MASK)}
        piece |= take("image_grid_thw", len(own.images)) | take("video_grid_thw", len(own.videos))
        for grid, patches in (
            ("image_grid_thw", "pixel_values"),
            ("video_grid_thw", "pixel_values_videos"),
        ):
            piece |= take(patches, int(piece[grid].prod(1).sum())) if grid in piece else {}
        piece |= take("video_second_per_grid", len(own.videos))
        for name in ("input_features", "feature_attention_mask"):
            piece |= take(name, len(own.audios))
        yield piece


def collated(batch: Sequence[Experience], fill: int) -> Rolled:
    """One batch, prompts padded on the left with the token ``fill``."""
    longest = max(len(one.prompt[IDS]) for one in batch)
    padding = {IDS: fill, MASK: 0}
    inputs: dict[str, Tensor] = {}
    for name in batch[0].prompt:
        held = [one.prompt[name] for one in batch]
        if name in padding:
            held = [pad(v, (longest - len(v), 0), value=padding[name])[None] for v in held]
        inputs[name] = torch.cat(held)
    return Rolled(
        drawn=[one.drawn for one in batch],
        inputs=inputs,
        ids=torch.stack([one.response for one in batch]),
        mask=torch.stack([one.mask for one in batch]),
        texts=[one.text for one in batch],
        rewards=torch.stack([one.rewards for one in batch]),
        advantages=torch.stack([one.advantage for one in batch]),
    )
