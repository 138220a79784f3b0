"""Every forward pass of a policy.

One path for media (towers, then scattered over the placeholders) and one for positions (row by row,
with each row's own audio-in-video decision), so that prefill, decoding and the scoring forward
cannot disagree.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.completions import CompletionTensors
from omni_grpo_core.core.conversation import interleaves
from omni_grpo_core.core.dialect import cache_among, cache_keyword
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.core.towers import Features, audios_alone, features
from omni_grpo_core.errors import BatchError
from omni_grpo_core.types import (
    MODALITIES,
    Batch,
    DeepstackEmbeddings,
    Embeddings,
    Logits,
    Modality,
    Positions,
    Row,
)

GRIDS: Mapping[Modality, tuple[str, ...]] = {
    "image": ("image_grid_thw",),
    "video": ("video_grid_thw", "video_second_per_grid"),
    "audio": ("feature_attention_mask",),
}
"""The tensors on which positions depend."""


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """The pass over the prompts: logits of the next token, float32 (B, V), positions and cache."""

    logits: Logits
    positions: Positions
    cache: Any


def positions(policy: Policy, batch: Batch) -> Positions:
    """Time, height and width position of every token, each row by its own audio-in-video decision.

    transformers computes these with one flag for the whole batch, so rows go one by one.
    Multimodal rotary embedding: Qwen2-VL (arXiv 2409.12191, section 2.1), aligned to real time in
    TMRoPE, Qwen2.5-Omni (arXiv 2503.20215, section 2.1).
    """
    dtype = torch.int64 if policy.family.whole_positions else torch.float32
    # padding is masked out of attention; 1 is the value transformers gives it
    ids = torch.ones(3, *batch.input_ids.shape, dtype=dtype)
    deltas = []
    for index, row in enumerate(batch.rows):
        row_ids = _row_positions(policy, row).to(dtype)
        length = len(row.input_ids)
        ids[:, index, batch.input_ids.shape[1] - length :] = row_ids
        deltas.append(row_ids.max() + 1 - length)
    return Positions(ids, torch.stack(deltas))


def _row_positions(policy: Policy, row: Row) -> Tensor:
    """(3, length), on the CPU. transformers takes one flag for all videos: where they differ, the
    row is cut before each video with another decision, and each stretch counts on."""
    stretches = []
    following: Tensor | int = 0
    for part in uniform_stretches(row):
        tensors = {key: value.to(policy.device) for key, value in part.tensors.items()}
        mask = tensors.get("feature_attention_mask")
        found, _ = policy.model.get_rope_index(
            part.input_ids[None].to(policy.device),
            tensors.get("image_grid_thw"),
            tensors.get("video_grid_thw"),
            torch.ones_like(part.input_ids)[None].to(policy.device),
            part.audio_in_video == "interleaved",
            None if mask is None else mask.sum(-1),
            tensors.get("video_second_per_grid"),
        )
        stretches.append(found[:, 0].cpu() + following)
        following = stretches[-1].max() + 1
    return torch.cat(stretches, dim=1)


def uniform_stretches(row: Row) -> Iterator[Row]:
    """The row, cut before each video whose audio decision differs from the last one's: its ids and
    the tensors that positions depend on, without spans."""
    decided = row.audio_in_video
    if isinstance(decided, str):
        yield row
        return
    first = {(s.modality, s.item): s.start for s in reversed(row.spans)}
    # vision_bos, and audio_bos if the sound is inside
    starts = [
        (index, first["video", index] - (2 if interleaves(decided, index) else 1))
        for index in range(len(decided))
        if not index or decided[index] != decided[index - 1]
    ]
    cuts = [0, *(start for _, start in starts[1:]), len(row.input_ids)]
    for (video, _), (begin, end) in zip(starts, itertools.pairwise(cuts), strict=True):
        tensors: dict[str, Tensor] = {}
        for modality, keys in GRIDS.items():
            items = [i for (m, i), at in first.items() if m == modality and begin <= at < end]
            if items:
                chosen = slice(min(items), max(items) + 1)
                tensors |= {key: row.tensors[key][chosen] for key in keys}
        yield Row(row.sample_id, row.input_ids[begin:end], decided[video], (), tensors)


def embed(
    policy: Policy, batch: Batch, *, by_modality: Mapping[Modality, Features] | None = None
) -> Embeddings:
    """Token embeddings with the towers' features in place of the placeholders, and what the family
    adds to them deeper in the text model. ``by_modality``: features that are known already."""
    ids = batch.input_ids.to(policy.device)
    embeds = policy.model.get_input_embeddings()(ids)
    if by_modality is None:
        by_modality = features(policy, batch)
    cursor = dict.fromkeys(MODALITIES, 0)
    rows = []
    deep: list[tuple[Tensor, ...]] = []
    for index, (row, pad) in enumerate(zip(batch.rows, batch.pads, strict=True)):
        row_features = []
        for span in row.spans:
            begin, end = cursor[span.modality], cursor[span.modality] + span.length
            cursor[span.modality] = end
            found = by_modality[span.modality]
            row_features.append(found.tokens[begin:end].to(embeds.dtype))
            if found.deep:
                deep.append(tuple(layer[begin:end].to(embeds.dtype) for layer in found.deep))
        rows.append(tuple(row_features))
        if row.spans:
            where = torch.cat([torch.arange(s.start, s.start + s.length) for s in row.spans]) + pad
            place = (torch.full_like(where, index).to(ids.device), where.to(ids.device))
            embeds = embeds.index_put(place, torch.cat(row_features))
    if not deep:
        return Embeddings(embeds, tuple(rows))
    layers = tuple(torch.cat(layer) for layer in zip(*deep, strict=True))
    return DeepstackEmbeddings(embeds, tuple(rows), layers)


def text_states(
    policy: Policy,
    batch: Batch,
    embeddings: Embeddings,
    *,
    attention_mask: Tensor,
    position_ids: Tensor,
    use_cache: bool = False,
    copies: int = 1,
    suffix: Tensor | None = None,
) -> Any:
    """The text model's output on a batch's prompts, each repeated ``copies`` times in a row and
    followed by the tokens of ``suffix``, (copies * B, C), if any. Mask and positions cover both."""
    embeds = embeddings.inputs_embeds.repeat_interleave(copies, dim=0)
    more = 0
    if suffix is not None:
        more = suffix.shape[1]
        embeds = torch.cat([embeds, policy.model.get_input_embeddings()(suffix)], dim=1)
    return policy.text_model(
        inputs_embeds=embeds,
        attention_mask=attention_mask.to(policy.device),
        position_ids=position_ids.to(policy.device),
        use_cache=use_cache,
        **_deepstack(policy, batch, embeddings, copies, more),
    )


def _deepstack(
    policy: Policy, batch: Batch, embeddings: Embeddings, copies: int, more: int
) -> dict[str, Any]:
    """The keywords that pass deepstack features to the text model; none for a family without."""
    if not isinstance(embeddings, DeepstackEmbeddings):
        return {}
    visual = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    for index, (row, pad) in enumerate(zip(batch.rows, batch.pads, strict=True)):
        for span in row.spans:
            if span.modality != "audio":
                visual[index, pad + span.start : pad + span.start + span.length] = True
    counts = visual.sum(-1).tolist()
    mask = torch.nn.functional.pad(visual.repeat_interleave(copies, dim=0), (0, more))
    return {
        "visual_pos_masks": policy.deepstack_mask(mask.to(policy.device)),
        "deepstack_visual_embeds": [
            torch.cat([part.repeat(copies, 1) for part in torch.split(layer, counts)])
            for layer in embeddings.deepstack
        ],
    }


def prefill(
    policy: Policy,
    batch: Batch,
    *,
    where: Positions | None = None,
    embeddings: Embeddings | None = None,
) -> Prefill:
    """The pass over the prompts: next-token logits and the cache from which decoding continues.

    ``where`` and ``embeddings`` default to the batch's own; a replay passes others.
    """
    where = where or positions(policy, batch)
    output = text_states(
        policy,
        batch,
        embeddings or embed(policy, batch),
        attention_mask=batch.attention_mask,
        position_ids=where.position_ids,
        use_cache=True,
    )
    logits = policy.model.lm_head(output.last_hidden_state[:, -1]).float()
    return Prefill(Logits(logits), where, cache_among(output))


def decode_step(
    policy: Policy, token_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any
) -> Tensor:
    """Logits after one more token: ``token_ids`` (N,), ``attention_mask`` (N, tokens so far + 1),
    ``position_ids`` (N,) -> float32 (N, V). The cache grows in place."""
    output = policy.text_model(
        inputs_embeds=policy.model.get_input_embeddings()(token_ids[:, None]),
        attention_mask=attention_mask,
        position_ids=position_ids[None, :, None].expand(3, -1, 1),
        use_cache=True,
        **{cache_keyword(policy.text_model): cache},
    )
    logits: Tensor = policy.model.lm_head(output.last_hidden_state[:, -1]).float()
    return logits


def completion_logits(
    policy: Policy,
    batch: Batch,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    where: Positions | None = None,
    embeddings: Embeddings | None = None,
) -> Tensor:
    """The scoring forward: logits that *predict* each completion token, (N, C, V).

    ``completion_ids``, ``completion_mask``: int64, (N, C), right-padded, G consecutive rows for
    each row of ``batch``. The embeddings, not the tower inputs, are copied for the G completions:
    repeating pixel rows would scramble the video patch by patch. ``where`` and ``embeddings``
    default to the batch's own; a replay passes others.
    """
    copies = completion_ids.shape[0] // len(batch.rows)
    completion_ids = completion_ids.to(policy.device)
    where = where or positions(policy, batch)
    steps = torch.arange(completion_ids.shape[1])
    after = first_positions(batch, where).repeat_interleave(copies)[:, None] + steps
    prompt_ids = where.position_ids.repeat_interleave(copies, dim=1)
    position_ids = torch.cat([prompt_ids, after.expand(3, -1, -1)], dim=2)
    mask = batch.attention_mask.repeat_interleave(copies, dim=0)
    output = text_states(
        policy,
        batch,
        embeddings or embed(policy, batch),
        attention_mask=torch.cat([mask, completion_mask.cpu()], dim=1),
        position_ids=position_ids,
        copies=copies,
        suffix=completion_ids,
    )
    length = completion_ids.shape[1]
    # contiguous: torch multiplies a strided batch row by row or at once, which round differently,
    # depending on the weight's requires_grad; a frozen head must score like a trainable one
    hidden = output.last_hidden_state[:, -length - 1 : -1].contiguous()
    logits: Tensor = policy.model.lm_head(hidden)
    return logits


def first_positions(batch: Batch, where: Positions) -> Tensor:
    """Position of each row's first completion token: (B,), the same on all three axes."""
    return batch.attention_mask.sum(-1) + where.deltas


def sampling_logprobs(policy: Policy, logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the sampling distribution: float32, at ``temperature``, without the
    suppressed ids, over the last axis. Scoring must use the same, or the ratio is not 1."""
    scores = logits.float() / temperature
    return scores.masked_fill(policy.suppressed, -torch.inf).log_softmax(-1)


def token_logprobs(
    policy: Policy,
    batch: Batch,
    tokens: CompletionTensors,
    temperature: float,
    *,
    where: Positions | None = None,
) -> Tensor:
    """The scoring forward's logprobs of the completions' tokens: float32, (N, C), on the CPU.
    ``where`` as of :func:`completion_logits`."""
    mask = tokens.mask.to(torch.int64)
    logits = completion_logits(policy, batch, tokens.ids, mask, where=where)
    scores = sampling_logprobs(policy, logits, temperature)
    return scores.gather(2, tokens.ids.to(scores.device)[..., None])[..., 0].cpu()


@dataclass(frozen=True, slots=True, eq=False)
class LibraryForward:
    """What transformers' own forward computes for one row, to compare ours with: ``inputs_embeds``
    (length, H), ``deepstack`` (visual placeholders, H) per layer, ``position_ids`` (3, length),
    ``logits`` float32 (V,) after the last token."""

    inputs_embeds: Tensor
    deepstack: tuple[Tensor, ...]
    position_ids: Tensor
    logits: Tensor


def library_keywords(policy: Policy, row: Row) -> dict[str, Any]:
    """One row as a user would pass it to transformers' own ``forward`` or ``generate``.

    Raises:
        BatchError: the installed transformers cannot compute it.
    """
    both = {"pixel_values", "pixel_values_videos"} <= row.tensors.keys()
    if both and not policy.library_joins_pictures:
        raise BatchError(
            f"sample {row.sample_id}",
            got="images and videos in one row, for which this transformers' own forward fails",
            want="one that can be compared with",
            fix="check the row under transformers 5 or later",
        )
    tensors = {key: value.to(policy.device) for key, value in row.tensors.items()}
    for key in ("pixel_values", "pixel_values_videos", "input_features"):
        if key in tensors:
            tensors[key] = tensors[key].to(policy.model.dtype)
    ids = row.input_ids[None].to(policy.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "use_audio_in_video": row.audio_in_video == "interleaved",
        # no flag fits videos with decisions of their own
        **(
            {}
            if isinstance(row.audio_in_video, str)
            else {"position_ids": _row_positions(policy, row)[:, None].to(policy.device)}
        ),
        **tensors,
    }


@torch.no_grad()
def library_forward(policy: Policy, row: Row) -> LibraryForward:
    """One row through the thinker's own ``forward``, with the keywords a user would pass; each of
    several audios as if it were alone."""
    seen: dict[str, Any] = {}

    def look(_module: Any, _args: Any, keywords: dict[str, Any]) -> None:
        seen["embeds"] = keywords["inputs_embeds"]
        seen["positions"] = keywords["position_ids"]
        seen["deepstack"] = keywords.get("deepstack_visual_embeds") or ()

    hook = policy.text_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with audios_alone(policy):
            output = policy.model(**library_keywords(policy, row))
    finally:
        hook.remove()
    # from 5.x on, text positions may precede the three axes
    return LibraryForward(
        inputs_embeds=seen["embeds"][0],
        deepstack=tuple(seen["deepstack"]),
        position_ids=seen["positions"][-3:, 0],
        logits=output.logits[0, -1].float(),
    )
