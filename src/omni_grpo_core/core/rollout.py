"""Batch -> Rollout: G completions for every row, from one prefill of its prompt."""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from omni_grpo_core.core.forward import decode_step, first_positions, prefill, sampling_logprobs
from omni_grpo_core.core.observers import observed
from omni_grpo_core.core.policy import Policy, generating
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io import device_memory
from omni_grpo_core.types import Batch, Completion, Rollout


@observed("rollout")
@torch.no_grad()
def rollout(
    policy: Policy,
    batch: Batch,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    first: int = 0,
) -> Rollout:
    """Sample ``group_size`` completions per row; ``temperature`` 0 is greedy.

    The prompt is computed once and its cache copied G times. Every group draws from its own random
    stream, seeded by ``seed`` and the sample's id, so that a completion depends neither on the
    order of the batch nor on its other rows. ``first``: of the group, the completion to begin with:
    other processes sample those before it. Runs in eval mode without gradient checkpointing,
    whatever the model's mode, and restores that mode.

    Raises:
        ConfigError: a group size or a length below 1, a temperature that is negative or not
            finite, or more completions than fit into CPU memory.
    """
    check_request(policy, batch, group_size, max_new_tokens, temperature)
    uniforms = batch_draws(policy, batch, seed, group_size, max_new_tokens, first)
    with generating(policy.model):
        start = prefill(policy, batch)
        start.cache.batch_repeat_interleave(group_size)
        logits = start.logits.values.repeat_interleave(group_size, dim=0)
        mask = batch.attention_mask.repeat_interleave(group_size, dim=0).to(policy.device)
        place = first_positions(batch, start.positions).repeat_interleave(group_size)
        place = place.to(policy.device)
        eos = torch.tensor(policy.eos_token_ids, device=policy.device)
        running = torch.ones(len(logits), dtype=torch.bool, device=policy.device)
        tokens: list[Tensor] = []
        logprobs: list[Tensor] = []
        kept: list[Tensor] = []
        for step in range(max_new_tokens):
            scores = sampling_logprobs(policy, logits, temperature or 1.0)
            drawn = uniforms[:, step] if temperature else None
            chosen = choose(scores, drawn, policy.eos_token_ids[0])
            chosen = torch.where(running, chosen, policy.pad_token_id)
            tokens.append(chosen)
            logprobs.append(scores.gather(1, chosen[:, None])[:, 0])
            kept.append(running)
            running = running & ~torch.isin(chosen, eos)
            if step + 1 == max_new_tokens or not running.any():
                break
            mask = torch.cat([mask, kept[-1][:, None].to(mask.dtype)], dim=1)
            logits = decode_step(policy, chosen, mask, place + step, start.cache)
    sampled = Sampled(
        torch.stack(tokens, 1), torch.stack(logprobs, 1), torch.stack(kept, 1), running
    )
    completions = completions_of(policy, batch, group_size, sampled, first)
    return Rollout(completions, group_size, temperature, seed)


def check_request(
    policy: Policy, batch: Batch, group_size: int, max_new_tokens: int, temperature: float
) -> None:
    """Raises ``ConfigError`` as :func:`rollout` does."""
    if group_size < 1 or max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise ConfigError(
            "rollout",
            got=f"group_size {group_size}, max_new_tokens {max_new_tokens}, "
            f"temperature {temperature:g}",
            want="group_size >= 1, max_new_tokens >= 1, temperature >= 0 and finite",
            fix="correct the setting",
        )
    _require_memory(policy, batch, group_size, max_new_tokens)


def _require_memory(policy: Policy, batch: Batch, group_size: int, max_new_tokens: int) -> None:
    """A process that runs out of CPU memory is killed silently; a CUDA device raises.

    Counts each completion's cache, its draws, and its logits, which are held twice in float32 and
    twice in float64 when the next token is chosen.
    """
    text = policy.model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    each = max_new_tokens * 8
    if policy.device.type == "cpu":
        length = batch.input_ids.shape[1] + max_new_tokens
        cell = 2 * text.num_key_value_heads * head * policy.model.dtype.itemsize
        each += length * text.num_hidden_layers * cell + 24 * len(policy.suppressed)
    needed, free = len(batch.rows) * group_size * each, device_memory("cpu")
    if free is not None and needed > free:
        raise ConfigError(
            "memory",
            got=f"{needed / 2**30:.3g} GiB needed for {len(batch.rows)} times group_size "
            f"{group_size} completions of up to {max_new_tokens} tokens",
            want=f"at most the {free / 2**30:.3g} GiB that are free",
            fix="lower settings: group_size or max_new_tokens, or use fewer rows at once",
        )


_BLOCK = 512
"""Tokens whose probabilities are added up in one go: a device adds up a whole vocabulary slowly."""


def choose(logprobs: Tensor, uniforms: Tensor | None, instead: int = 0) -> Tensor:
    """Greedy without ``uniforms``; else the token whose slice of the cumulative distribution
    contains the uniform draw: its block of the vocabulary first, then the token in it. float64: a
    float32 sum over 150k probabilities is off by 1e-5. ``instead``: where the distribution is NaN,
    a token that can be scored, so that it is found there."""
    rows, size = logprobs.shape
    if uniforms is None:
        found = logprobs.argmax(-1)
    else:
        probabilities = logprobs.double().exp()
        blocks = pad(probabilities, (0, -size % _BLOCK)).view(rows, -1, _BLOCK)
        ends = blocks.sum(-1).cumsum(-1)
        target = uniforms[:, None] * ends[:, -1:]
        block = torch.searchsorted(ends, target, right=True).clamp_max(ends.shape[-1] - 1)
        inside = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK))[:, 0].cumsum(-1)
        before = pad(ends, (1, 0)).gather(1, block)
        # rounding may leave the draw at the very end of the block, behind its last likely token
        within = (target - before).minimum(inside[:, -1:] * (1 - 1e-15))
        found = (block * _BLOCK + torch.searchsorted(inside, within, right=True))[:, 0]
    return torch.where(logprobs[:, 0].isnan(), instead, found)


def draw_distance(logprobs: Tensor, uniforms: Tensor, tokens: Tensor) -> Tensor:
    """How far each draw lies outside its token's slice of the cumulative distribution, in
    probability; 0 inside. A flipped token is noise if this is within the probabilities' error.

    ``logprobs``: (..., V); ``tokens``: int64, (...); ``uniforms``: (...) or a scalar, from
    :func:`draws`.

    >>> logprobs = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(3, -1)
    >>> found = draw_distance(logprobs, torch.tensor([0.875] * 3), torch.tensor([2, 1, 0]))
    >>> [round(apart, 6) for apart in found.tolist()]
    [0.0, 0.125, 0.375]
    """
    cumulative = logprobs.double().exp().cumsum(-1)
    cumulative = pad(cumulative / cumulative[..., -1:], (1, 0))
    begin, end = (cumulative.gather(-1, at[..., None])[..., 0] for at in (tokens, tokens + 1))
    return torch.maximum(begin - uniforms, uniforms - end).clamp_min(0)


def draws(seed: int, sample_id: str, group_size: int, steps: int, first: int = 0) -> Tensor:
    """float64, (G, steps): one row's stream, drawn on the CPU so that all devices sample alike.

    >>> bool((draws(0, "a", 2, 3, first=1) == draws(0, "a", 3, 3)[1:]).all())
    True
    """
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    drawn = torch.rand(first + group_size, steps, generator=generator, dtype=torch.float64)
    return drawn[first:]


def batch_draws(
    policy: Policy, batch: Batch, seed: int, group_size: int, steps: int, first: int = 0
) -> Tensor:
    """float64, (B * G, steps), on the policy's device: every row's own :func:`draws`."""
    streams = [draws(seed, row.sample_id, group_size, steps, first) for row in batch.rows]
    return torch.cat(streams).to(policy.device)


class Sampled(NamedTuple):
    """``tokens``, ``logprobs`` and ``kept``, whether a row was still running: (N, steps).
    ``running``: (N,), the rows that had not ended after the last step."""

    tokens: Tensor
    logprobs: Tensor
    kept: Tensor
    running: Tensor


def completions_of(
    policy: Policy, batch: Batch, group_size: int, sampled: Sampled, first: int = 0
) -> tuple[Completion, ...]:
    """Sampled tokens as completions, G consecutive ones per row of ``batch``, the first of which is
    its group's completion ``first``."""
    token_rows, logprob_rows = sampled.tokens.tolist(), sampled.logprobs.tolist()
    lengths, running = sampled.kept.sum(1).tolist(), sampled.running
    completions = []
    for index, (length, unfinished) in enumerate(zip(lengths, running.tolist(), strict=True)):
        ids = tuple(token_rows[index][:length])
        completions.append(
            Completion(
                group_id=batch.rows[index // group_size].sample_id,
                index=first + index % group_size,
                token_ids=ids,
                text=policy.decode(ids if unfinished else ids[:-1]),
                finish_reason="length" if unfinished else "stop",
                logprobs=tuple(logprob_rows[index][:length]),
            )
        )
    return tuple(completions)
