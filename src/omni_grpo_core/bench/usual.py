"""The usual way: every completion is a row of its own, with its own copy of the media, through the
library's own ``generate`` and ``forward``, as public trainers for these models do it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.dialect import modes_restored
from omni_grpo_core.core.policy import Policy, library_generate
from omni_grpo_core.types import Batch


def inputs(policy: Policy, copies: Batch) -> dict[str, Any]:
    """What the model is called with. ``copies``: a row for every completion, media included."""
    placed = {
        key: value.to(policy.device)
        for key, value in {
            "input_ids": copies.input_ids,
            "attention_mask": copies.attention_mask,
            **copies.tensors,
        }.items()
    }
    for key, value in placed.items():
        if key in ("pixel_values", "pixel_values_videos", "input_features"):
            placed[key] = value.to(policy.model.dtype)
    return {**placed, "use_audio_in_video": copies.rows[0].audio_in_video == "interleaved"}


def sample(policy: Policy, given: dict[str, Any], tokens: int) -> Tensor:
    """``tokens`` new tokens for every row, (N, tokens). Media tokens may be among them: suppressing
    nearly a whole vocabulary, as the shipped tokenizer needs it, would cost more than the model."""
    with torch.no_grad():
        found = library_generate(
            policy,
            given,
            do_sample=True,
            top_k=0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )
    return found[:, -tokens:]


def logprobs(
    policy: Policy, given: dict[str, Any], ids: Tensor, mask: Tensor, *, temperature: float
) -> Tensor:
    """Of the completions' tokens, (N, C): logits of every position, a log-softmax row by row."""
    whole = {
        **given,
        "input_ids": torch.cat([given["input_ids"], ids], dim=1),
        "attention_mask": torch.cat([given["attention_mask"], mask.to(torch.int64)], dim=1),
    }
    predicting = policy.model(**whole).logits[:, -ids.shape[1] - 1 : -1]
    rows = [
        (row / temperature)
        .masked_fill(policy.suppressed, -torch.inf)
        .log_softmax(-1)
        .gather(1, chosen[:, None])[:, 0]
        for row, chosen in zip(predicting, ids, strict=True)
    ]
    return torch.stack(rows)


@contextmanager
def training(model: Any, *, checkpointing: bool) -> Iterator[None]:
    """Train mode, with the library's own switch for ``checkpointing``, as ``Trainer`` calls it.
    From transformers 5 on it makes the inputs of the towers require gradients: the backward pass
    then goes through every copy of them, although they are frozen."""
    with modes_restored(model):
        model.train()
        if checkpointing:
            newest = getattr(model, "activation_checkpointing_enable", None)
            (newest or model.gradient_checkpointing_enable)({"use_reentrant": False})
        try:
            yield
        finally:
            if hasattr(model, "_require_grads_hook"):
                model.disable_input_require_grads()
