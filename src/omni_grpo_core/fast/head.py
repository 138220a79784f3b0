"""From hidden states to logprobs, some positions at a time: never the logits of all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.losses.logprobs import ScoredTokens, completion_logprobs

CHUNK_LOGITS = 2**26
"""Logits that exist at a time, in the model's dtype, and as many in their gradient."""


def chunked_logprobs(
    policy: Policy, hidden: Tensor, at: Tensor, ids: Tensor, temperature: float
) -> ScoredTokens:
    """Logprobs and entropy of ``ids``, int64 (T,), each predicted by the hidden state ``at`` its
    place in ``hidden``, (L, H): (T,) each.

    The head is called as a module, so that adapters on it, autocast and sharding work; its logits
    are computed again in the backward pass.
    """
    step = max(1, CHUNK_LOGITS // len(policy.suppressed))
    kept = torch.is_grad_enabled()
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, max(1, len(ids)), step):  # one without any: its gradient is 0, not none
        chunk = slice(start, start + step)
        given = policy, hidden[at[chunk]], ids[chunk], temperature
        parts.append(checkpoint(_chunk, *given, use_reentrant=False) if kept else _chunk(*given))
    logprobs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return ScoredTokens(logprobs, entropy)


def _chunk(policy: Policy, hidden: Tensor, ids: Tensor, temperature: float) -> Any:
    scored = completion_logprobs(
        policy.model.lm_head(hidden)[None],
        ids[None],
        torch.ones_like(ids, dtype=torch.bool)[None],
        temperature=temperature,
        suppressed=policy.suppressed,
    )
    return scored.logprobs[0], scored.entropy[0]
