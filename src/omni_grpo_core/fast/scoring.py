"""The scoring forward on a packed row: each prompt once, then its completions at true lengths."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from omni_grpo_core.core.forward import embed, first_positions
from omni_grpo_core.core.observers import observed
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import TrainError
from omni_grpo_core.fast.attention import PACKED, attention, poison
from omni_grpo_core.fast.head import chunked_logprobs
from omni_grpo_core.fast.layout import PackedRow
from omni_grpo_core.fast.prompts import Prompts
from omni_grpo_core.losses.logprobs import ScoredTokens
from omni_grpo_core.losses.shapes import require_mask, require_shape
from omni_grpo_core.types import Batch, DeepstackEmbeddings, Embeddings, Positions

Kernel = Literal["merged", "masked"]
"""``merged``: two calls and no mask (:mod:`~omni_grpo_core.fast.segments`). ``masked``: the model's
own attention with the mask of the whole row, the reference."""


@observed("scoring")
def packed_scores(
    policy: Policy,
    batch: Batch,
    ids: Tensor,
    mask: Tensor,
    *,
    temperature: float,
    prompts: Prompts | None = None,
    kernel: Kernel = "merged",
) -> ScoredTokens:
    """Logprobs and entropy of completions, (N, C) each, 0 where ``mask`` is False.

    ``ids``: int64, (N, C), right-padded, G consecutive completions for each row of ``batch``.
    ``mask``: bool, (N, C): True on their tokens. ``prompts``: what is known already of the rows.

    Raises ``TrainError`` for a mask with holes and, as the plain one, for shapes that differ.
    """
    require_shape("completion ids", ids, require_mask("mask", mask))
    lengths = mask.sum(1).tolist()
    _check_mask(mask, lengths)
    prompts = prompts or Prompts(policy)
    where, features = prompts.positions(batch), prompts.features(batch)
    embeddings = embed(policy, batch, by_modality=features)
    row = PackedRow.of([len(one.input_ids) for one in batch.rows], lengths, policy.device)
    tokens = ids.to(policy.device)[mask.to(policy.device)]
    hidden = _text_states(policy, batch, embeddings, where, row, tokens, kernel)
    at = row.predicting().to(policy.device)
    flat = chunked_logprobs(policy, hidden, at, tokens, temperature)
    inside = mask.to(policy.device)
    return ScoredTokens(*(_padded(part, inside) for part in (flat.logprobs, flat.entropy)))


def _text_states(
    policy: Policy,
    batch: Batch,
    embeddings: Embeddings,
    where: Positions,
    row: PackedRow,
    tokens: Tensor,
    kernel: Kernel,
) -> Tensor:
    """Hidden states of the whole row, (tokens, H)."""
    parts = [one[pad:] for one, pad in zip(embeddings.inputs_embeds, batch.pads, strict=True)]
    embeds = torch.cat([*parts, policy.model.get_input_embeddings()(tokens)])[None]
    keywords: dict[str, Any] = {
        "inputs_embeds": embeds,
        "position_ids": packed_positions(batch, where, row).to(policy.device),
        "use_cache": False,
        **_deepstack(policy, batch, embeddings, row),
    }
    if kernel == "masked":
        output = policy.text_model(attention_mask=row.mask()[None, None], **keywords)
    else:
        with attention(policy.text_model, PACKED):
            output = policy.text_model(attention_mask=poison(embeds), packed_row=row, **keywords)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def packed_positions(batch: Batch, where: Positions, row: PackedRow) -> Tensor:
    """(3, 1, length): the prompts' own; every completion continues its prompt's."""
    prompts = [where.position_ids[:, index, pad:] for index, pad in enumerate(batch.pads)]
    after = first_positions(batch, where)
    completions = [
        (after[index // row.copies] + torch.arange(length)).expand(3, -1)
        for index, length in enumerate(row.completions)
    ]
    return torch.cat([*prompts, *(part.to(prompts[0]) for part in completions)], dim=1)[:, None]


def _deepstack(
    policy: Policy, batch: Batch, embeddings: Embeddings, row: PackedRow
) -> dict[str, Any]:
    """Vision features for the prompts' placeholders, each once."""
    if not isinstance(embeddings, DeepstackEmbeddings):
        return {}
    visual = torch.zeros(1, row.length, dtype=torch.bool)
    start = 0
    for one, length in zip(batch.rows, row.prompts, strict=True):
        for span in one.spans:
            if span.modality != "audio":
                visual[0, start + span.start : start + span.start + span.length] = True
        start += length
    return {
        "visual_pos_masks": policy.deepstack_mask(visual.to(policy.device)),
        "deepstack_visual_embeds": list(embeddings.deepstack),
    }


def _padded(flat: Tensor, inside: Tensor) -> Tensor:
    return flat.new_zeros(inside.shape).masked_scatter(inside, flat)


def _check_mask(mask: Tensor, lengths: list[int]) -> None:
    prefix = torch.arange(mask.shape[1], device=mask.device) < torch.tensor(
        lengths, device=mask.device
    ).unsqueeze(1)
    if not torch.equal(mask, prefix):
        raise TrainError(
            "completion mask",
            got="a token that is left out before one that counts",
            want="True from each completion's first token to its last",
            fix="pass the mask of the sampled tokens; leave others out of the loss instead",
        )
