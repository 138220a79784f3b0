"""Which rows of a rollout have the same prompt, media included."""

from __future__ import annotations

import re

import torch

from omni_grpo_core.doctor.rollouts import RolloutRecord, prompt_length
from omni_grpo_core.trace.calls import GenerateCall

_PLACEHOLDER = re.compile(r"<\|(IMAGE|VIDEO|AUDIO)\|>", re.IGNORECASE)


def prompt_labels(call: GenerateCall, rollout: RolloutRecord | None = None) -> list[int] | None:
    """The prompt of each row of a rollout: (N,), numbered in order of appearance.

    Media are distinguished by the embeddings that entered the text model, where they were kept,
    else by what the processor got in the same rollout.
    """
    prompts, sequences = call.inputs.get("input_ids"), call.sequences
    if prompts is None or sequences is None:
        return None
    ids = sequences[:, : prompt_length(call)]
    embeds = call.inputs_embeds
    if embeds is not None and len(embeds) != len(ids):
        embeds = None
    shown = None if embeds is not None else _media_of_rows(rollout, len(ids))
    seen: list[int] = []
    labels: list[int] = []
    for row in range(len(ids)):
        for label, first in enumerate(seen):
            same = bool(torch.equal(ids[row], ids[first]))
            if same and embeds is not None:
                gap = (embeds[row].float() - embeds[first].float()).abs().max()
                # copies of an item differ at most by rounding that depends on the batch position
                same = bool(gap <= 0.02 * embeds[first].float().abs().max())
            elif same and shown is not None:
                same = shown[row] == shown[first]
            if same:
                labels.append(label)
                break
        else:
            labels.append(len(seen))
            seen.append(row)
    return labels


def _media_of_rows(rollout: RolloutRecord | None, rows: int) -> list[tuple[str, ...]] | None:
    """Digests of each row's images and clips, by the placeholders of its text; ``None`` unless one
    processor call made them all."""
    call = rollout.processed[-1] if rollout is not None and len(rollout.processed) == 1 else None
    if call is None or len(call.texts) != rows:
        return None
    left = {"IMAGE": list(call.images), "VIDEO": list(call.videos)}
    found: list[tuple[str, ...]] = []
    for text in call.texts:
        own: list[str] = []
        for kind in map(str.upper, _PLACEHOLDER.findall(text)):
            if kind not in left:
                continue  # sound may be inside a clip: then it has no placeholder of its own
            if not left[kind]:
                return None
            own.append(left[kind].pop(0).sha256)
        found.append(tuple(own))
    return None if any(left.values()) else found
