"""Batch -> Rollout: the plain rollout's completions, over one copy of each prompt's cache.

All groups of the batch are decoded together. On CUDA the pass over one token, the head and the
sampler are one graph, replayed for every token: a layer's sixty small kernels would else each wait
for Python.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from omni_grpo_core.core.forward import (
    Prefill,
    embed,
    first_positions,
    prefill,
    sampling_logprobs,
)
from omni_grpo_core.core.observers import observed
from omni_grpo_core.core.policy import Policy, generating
from omni_grpo_core.core.rollout import (
    Sampled,
    batch_draws,
    check_request,
    choose,
    completions_of,
)
from omni_grpo_core.errors import one_line
from omni_grpo_core.fast.attention import poison
from omni_grpo_core.fast.compiled import Compiled, watched
from omni_grpo_core.fast.prefix import SharedPrefix
from omni_grpo_core.fast.prompts import Prompts
from omni_grpo_core.types import Batch, Rollout

LOOK_EVERY = 8
"""Replays of a CUDA graph between two looks at whether any row still runs: each look waits."""
_WARM_UP = 1
"""Tokens that are decoded without the graph: libraries allocate their workspaces in them."""


@observed("rollout")
@torch.no_grad()
def shared_rollout(
    policy: Policy,
    batch: Batch,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    first: int = 0,
    prompts: Prompts | None = None,
    compiled: Compiled | None = None,
) -> Rollout:
    """The plain rollout's completions: the same draws choose from the same distributions, so that
    ids are equal up to ties within rounding. ``prompts``: what is known already of the rows.
    ``compiled``: from the last rollout, so that nothing is compiled again.

    Raises ``ConfigError`` as the plain one does.
    """
    check_request(policy, batch, group_size, max_new_tokens, temperature)
    with generating(policy.model):
        prompts = prompts or Prompts(policy)
        where, features = prompts.positions(batch), prompts.features(batch)
        embeddings = embed(policy, batch, by_modality=features)
        start = prefill(policy, batch, where=where, embeddings=embeddings)
        uniforms = batch_draws(policy, batch, seed, group_size, max_new_tokens, first)
        run = _Decoding(policy, batch, start, uniforms, temperature)
        run(compiled or Compiled(policy))
    completions = completions_of(policy, batch, group_size, run.sampled, first)
    return Rollout(completions, group_size, temperature, seed)


class _Decoding:
    """Tensors of one rollout, all of fixed shape and changed in place. N rows, C steps.

    ``at``: int64, (1,): the step whose token was chosen last; ``chosen``: that token, (N,).
    """

    def __init__(
        self,
        policy: Policy,
        batch: Batch,
        start: Prefill,
        uniforms: Tensor,
        temperature: float,
    ) -> None:
        self.policy, self.uniforms, self.temperature = policy, uniforms, temperature
        rows, self.steps = uniforms.shape
        copies, device = rows // len(batch.rows), policy.device
        cached = [(layer.keys, layer.values) for layer in start.cache.layers]
        self.prefix = SharedPrefix.of(cached, batch.attention_mask, copies, self.steps)
        self.at = self.prefix.at
        after = first_positions(batch, start.positions).repeat_interleave(copies)
        self.place = after.to(device)
        self.eos = torch.tensor(policy.eos_token_ids, device=device)
        self.chosen = torch.zeros(rows, dtype=torch.int64, device=device)
        self.sampled = Sampled(
            tokens=torch.zeros(rows, self.steps, dtype=torch.int64, device=device),
            logprobs=torch.zeros(rows, self.steps, device=device),
            kept=torch.zeros(rows, self.steps, dtype=torch.bool, device=device),
            running=torch.ones(rows, dtype=torch.bool, device=device),
        )
        self._choose(start.logits.values.repeat_interleave(copies, dim=0))

    def __call__(self, compiled: Compiled) -> None:
        """Every further token, until all rows have ended."""
        advance: Callable[[], None] = self._advance
        done = compiled.proven(self.prefix, advance) if self.steps > 1 else 0
        # what watches the model is Python, which a graph leaves out
        captures = self.chosen.is_cuda and not watched(self.policy)
        look = 1
        with compiled.decoding(self.prefix):
            for step in range(1 + done, self.steps):
                if step % look == 0 and not self.sampled.running.any():
                    break
                if step == _WARM_UP + 1 and captures:
                    advance, look = self._captured(), LOOK_EVERY
                advance()

    def _advance(self) -> None:
        """One token further: pass, head and sampler."""
        prefix, policy = self.prefix, self.policy
        prefix.own.index_fill_(0, self.at, 0.0)
        embeds = policy.model.get_input_embeddings()(self.chosen[:, None])
        where = (self.place + self.at)[None, :, None].expand(3, -1, 1)
        output = policy.text_model(
            inputs_embeds=embeds,
            attention_mask=poison(embeds),
            position_ids=where,
            use_cache=False,
        )
        logits = policy.model.lm_head(output.last_hidden_state[:, -1]).float()
        self.at.add_(1)
        self._choose(logits)

    def _choose(self, logits: Tensor) -> None:
        """The token of step ``at`` for each row; a row that has ended gets padding."""
        scores = sampling_logprobs(self.policy, logits, self.temperature or 1.0)
        uniforms = self.uniforms.index_select(1, self.at)[:, 0] if self.temperature else None
        running = self.sampled.running
        chosen = choose(scores, uniforms, self.policy.eos_token_ids[0])
        chosen = torch.where(running, chosen, self.policy.pad_token_id)
        self.chosen.copy_(chosen)
        logprobs = scores.gather(1, chosen[:, None])[:, 0]
        for whole, column in zip(self.sampled, (chosen, logprobs, running), strict=False):
            whole.index_copy_(1, self.at, column[:, None])
        running.logical_and_(~torch.isin(chosen, self.eos))

    def _captured(self) -> Callable[[], None]:
        """The same as a CUDA graph, which is captured without being run; without one, and with a
        warning, if the device or a library cannot capture it."""
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may ask the device something meanwhile, as that of NCCL does
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._advance()
        except RuntimeError as error:
            warnings.warn(
                f"tokens are decoded without a CUDA graph: {one_line(error)}", stacklevel=2
            )
            return self._advance
        return graph.replay
